"""The figure of an optimizer study: what it varies against where the loss settles, accuracy, residual, divergence of twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.grid import columns_of
from studies.figures.style import (
    PAGE,
    UNIT,
    log_limits,
    log_x,
    log_y,
    n_axis,
    new_figure,
    only_ticks,
    panel,
    series_style,
    styled,
)
from studies.findings.rlo import axes_of, means, tuned
from studies.findings.written import axis_label, axis_words, setting

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

# column → (title, logarithmic axis, unit)
QUANTITIES = {
    "loss_tail": ("steady-state loss", True, "per sample"),
    "held_out": ("held-out accuracy", False, "share"),
    "thickness": ("residual thickness ‖z‖/‖d‖", True, "no unit"),
    "held_out_sup": ("divergence of twins, held-out", True, UNIT),
    "sup_at_level": ("divergence of twins, equal loss", True, UNIT),
}


def varying(frames: Frames) -> list[str]:
    """Names of what varies, as a reader knows them."""
    return [axis_words(name) for name in axes_of(frames)]


@styled
def sweep_figure(frames: Frames) -> Figure:
    """A panel for each of :func:`shown`; x is the numeric axis with most values, at the best learning rate where that varies
    too, or the learning rate itself, every other combination a line; without one, or where rules are compared, a row for each
    setting."""
    axes, x = axes_of(frames), _abscissa(frames)
    quantities, tuned_away = shown(frames)
    if tuned_away:
        frames = tuned(frames)
        axes = [name for name in axes if name != "lr"]
    if x is None:
        return _rows(means(frames), quantities, axes)
    return _lines(means(frames), quantities, x, [name for name in axes if name != x])


def shown(frames: Frames) -> tuple[list[str], bool]:
    """The quantities that :func:`sweep_figure` draws, and whether at the best learning rate of each setting."""
    x = _abscissa(frames)
    tuned_away = x != "lr" and "lr" in axes_of(frames)
    table = means(tuned(frames) if tuned_away else frames)
    known = [name for name in QUANTITIES if table[name].notna().any()]
    return known if x is None else [name for name in known if name != "sup_at_level"], tuned_away


def _abscissa(frames: Frames) -> str | None:
    """The numeric axis; None where each setting gets a row."""
    axes = axes_of(frames)
    numeric = [name for name in axes if is_number(frames.summary[name])]
    if not numeric or (numeric == ["lr"] and "rule.name" in axes):
        return None
    # a learning rate means something else for each rule: where there is another axis it is tuned away
    return max(numeric, key=lambda name: (name != "lr", frames.summary[name].nunique()))


@panel
def draw_sweep(ax: Axes, table: pd.DataFrame, quantity: str, x: str, others: Sequence[str] = ()) -> Axes:
    """One quantity against the numeric axis ``x``, a line per combination of ``others``: means over seeds, bars 95 %
    intervals. ``table``: :func:`studies.findings.rlo.means`."""
    log = QUANTITIES[quantity][1]
    groups = list(table.groupby(list(others), sort=False)) if others else [((), table)]
    for i, (values, rows) in enumerate(groups):
        rows = rows.sort_values(x)
        y, half = rows[quantity].to_numpy(), rows[f"{quantity} ±"].to_numpy()  # nan, of one seed: no bar
        low = np.minimum(half, 0.9 * np.abs(y)) if log else half
        given = values if isinstance(values, tuple) else (values,)
        text = ", ".join(setting(key, value) for key, value in zip(others, given, strict=False))
        beside = 1.03 ** (i - (len(groups) - 1) / 2)  # bars of one x next to each other
        ax.errorbar(rows[x] * beside, y, yerr=[low, half], label=text, elinewidth=0.6, **series_style(i, len(groups)))
    ticks = sorted(table[x].unique())
    n_axis(ax, ticks, axis_label(x), margin=1.2)
    only_ticks(ax.xaxis, ticks if len(ticks) < 8 else ticks[::2])
    _value_axis(ax, table, quantity)
    ax.set_ylabel(_label(quantity))
    return ax


@panel
def draw_settings(ax: Axes, table: pd.DataFrame, quantity: str, axes: Sequence[str]) -> Axes:
    """One quantity of every setting, a horizontal line each: means over seeds, bars 95 % intervals.

    ``table``: :func:`studies.findings.rlo.means`; ``axes``: the columns that name a setting.
    """
    log = QUANTITIES[quantity][1]
    places = np.arange(len(table))[::-1]
    value, half = table[quantity].to_numpy(), table[f"{quantity} ±"].to_numpy()  # nan, of one seed: no bar
    low = np.minimum(half, 0.9 * np.abs(value)) if log else half
    ax.errorbar(value, places, xerr=[low, half], fmt="o", color=series_style(3, 4)["color"], elinewidth=0.8)
    if log:
        log_x(ax, *log_limits([*(value + np.nan_to_num(half)), *(value - np.nan_to_num(low))]))
    ax.set_yticks(places, [", ".join(setting(name, row[name]) for name in axes) for _, row in table.iterrows()])
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.tick_params(axis="x", rotation=60)
    ax.set_xlabel(_label(quantity))
    ax.set_ylabel(", ".join(axis_words(name) for name in axes) or "setting")
    return ax


def _label(quantity: str) -> str:
    title, _, unit = QUANTITIES[quantity]
    return f"{title}\n[{unit}]"


def _value_axis(ax: Axes, table: pd.DataFrame, quantity: str) -> None:
    if QUANTITIES[quantity][1]:
        log_y(ax, *log_limits(table[quantity]))
    elif quantity == "held_out":
        ax.set_ylim(0, 1)


def _lines(table: pd.DataFrame, quantities: list[str], x: str, others: list[str]) -> Figure:
    figure = new_figure(PAGE, 4.6)
    panels = figure.subplots(2, 2).ravel()
    for ax, name in zip(panels, quantities, strict=False):
        draw_sweep(ax, table, name, x, others)
    for ax in panels[len(quantities) :]:
        ax.set_visible(False)
    if others:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns_of(labels), handlelength=3.0)
    return figure


def _rows(table: pd.DataFrame, quantities: list[str], axes: list[str]) -> Figure:
    figure = new_figure(PAGE, 0.27 * len(table) + 1.4)
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for ax, name in zip(panels, quantities, strict=True):
        draw_settings(ax, table, name, axes)
        ax.set_xlabel(_label(name).replace(", ", ",\n").replace(" ‖", "\n‖"), fontsize=7)
        if ax is not panels[0]:
            ax.set_ylabel("")
    return figure


def is_number(column) -> bool:
    """True for a column of numbers; truth values are names here."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return is_numeric_dtype(column) and not is_bool_dtype(column)
