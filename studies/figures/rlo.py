"""The figure of an optimizer study: what it varies against where the loss settles, accuracy, residual, divergence of twins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figures.style import PAGE, log_limits, log_y, new_figure, only_ticks, series_style, styled
from studies.findings.rlo import axes_of, means, tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

# column → (title, logarithmic axis)
QUANTITIES = {
    "loss_tail": ("steady-state loss", True),
    "held_out": ("held-out accuracy", False),
    "thickness": ("residual thickness ‖z‖/‖d‖", True),
    "held_out_sup": ("twins: largest divergence, held-out", True),
}


def varying(frames: Frames) -> list[str]:
    """Names of what varies, as a reader knows them."""
    return [name.rpartition(".")[2] for name in axes_of(frames)]


@styled
def sweep_figure(frames: Frames) -> Figure:
    """Four panels; x is the numeric axis with most values (lr before others), every other combination a line; without a
    numeric axis, or with the learning rate tuned away, one row for each setting."""
    axes = axes_of(frames)
    numeric = [name for name in axes if is_number(frames.summary[name])]
    if not numeric or (
        numeric == ["lr"] and frames.summary["rule.name"].nunique() > 1 if "rule.name" in axes else not numeric
    ):
        return _rows(frames, axes)
    x = max(numeric, key=lambda name: (frames.summary[name].nunique(), name == "lr"))
    if x != "lr" and "lr" in axes:
        frames = tuned(frames)
        axes = [name for name in axes if name != "lr"]
    return _lines(frames, x, [name for name in axes if name != x])


def _lines(frames: Frames, x: str, others: list[str]) -> Figure:
    table = means(frames)
    quantities = _known(table)
    figure = new_figure(PAGE, 4.6)
    panels = figure.subplots(2, 2).flat
    groups = list(table.groupby(others, sort=False)) if others else [((), table)]
    for ax, (name, (title, log)) in zip(panels, quantities.items(), strict=False):
        for i, (values, rows) in enumerate(groups):
            rows = rows.sort_values(x)
            half = rows[f"{name} ±"].fillna(0.0).to_numpy()
            y = rows[name].to_numpy()
            low = np.minimum(half, 0.9 * np.abs(y)) if log else half
            given = values if isinstance(values, tuple) else (values,)
            text = ", ".join(said(key, value) for key, value in zip(others, given, strict=False))
            beside = 1.03 ** (i - (len(groups) - 1) / 2)  # bars of one x next to each other
            ax.errorbar(
                rows[x] * beside, y, yerr=[low, half], label=text, elinewidth=0.6, **series_style(i, len(groups))
            )
        ax.set_xscale("log")
        ticks = sorted(table[x].unique())
        only_ticks(ax.xaxis, ticks if len(ticks) < 8 else ticks[::2])
        if log:
            log_y(ax, *log_limits(table[name]))
        elif name == "held_out":
            ax.set_ylim(0, 1)
        ax.set_title(title, loc="left")
        ax.set_xlabel({"lr": "learning rate", "rule.eta": "η"}.get(x, x.rpartition(".")[2]))
    for ax in list(panels):
        ax.set_visible(False)
    if others:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))
    return figure


def _rows(frames: Frames, axes: list[str]) -> Figure:
    """One horizontal line for each setting, the mean with its interval, a panel for each quantity; the best learning rate."""
    if "lr" in axes:
        frames = tuned(frames)
        axes = [name for name in axes if name != "lr"]
    table = means(frames)
    labels = [", ".join(str(row[name]) for name in axes) for _, row in table.iterrows()]
    quantities = _known(table) | {"sup_at_level": ("twins: at equal training loss", True)}
    figure = new_figure(PAGE, 0.27 * len(table) + 1.1)
    panels = figure.subplots(1, len(quantities), sharey=True)
    places = np.arange(len(table))[::-1]
    for ax, (name, (title, log)) in zip(panels, quantities.items(), strict=True):
        value, half = table[name].to_numpy(), table[f"{name} ±"].fillna(0.0).to_numpy()
        low = np.minimum(half, 0.9 * np.abs(value)) if log else half
        ax.errorbar(value, places, xerr=[low, half], fmt="o", color=series_style(3, 4)["color"], elinewidth=0.8)
        if log and np.isfinite(value).any():
            ax.set_xscale("log")
            ax.set_xlim(*log_limits([*(value + half), *(value - low)]))
        ax.set_title(title.replace(": ", ":\n").replace(" ‖", "\n‖"), loc="left", fontsize=7)
        ax.set_yticks(places, labels)
        ax.tick_params(axis="x", rotation=60)
    return figure


def said(key: str, value) -> str:
    """A setting in a legend.

    >>> said("rule.normalize", True), said("rule.direction", "tanh"), said("width", 64)
    ('normalised', 'tanh', 'width 64')
    """
    if isinstance(value, bool | np.bool_):
        name = {"normalize": "normalised"}.get(key.rpartition(".")[2], key.rpartition(".")[2])
        return name if value else f"not {name}"
    return value if isinstance(value, str) else f"{key.rpartition('.')[2]} {value:g}"


def _known(table) -> dict[str, tuple[str, bool]]:
    return {name: about for name, about in QUANTITIES.items() if table[name].notna().any()}


def is_number(column) -> bool:
    """True for a column of numbers; truth values are names here."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return is_numeric_dtype(column) and not is_bool_dtype(column)
