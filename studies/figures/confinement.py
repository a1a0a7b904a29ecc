"""Bounds over what was measured, and where the influence of the replaced sample goes, against the mass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.lines import LINES, drawn_lines, known_lines, label_lines, legend_of_kinds
from studies.figures.style import PAGE, UNIT, log_limits, log_y, n_axis, new_figure, panel, series_style, styled
from studies.findings.applicable import loss_note, stated
from studies.findings.confinement import PLACES, by_place, equal_loss
from studies.findings.written import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panel title: what is measured, and the bounds that speak of it. None speaks of held-out points. T5 and the path length
# are largest over the samples, and the replaced sample is one of them.
RATIOS = {
    "all training outputs, ‖e‖": ("measured_l2", ("T0", "T1", "T1c", "T2", "T3", "T4", "path_l2", "vacuity_floor")),
    "replaced sample k": ("measured_replaced", ("T0", "T5", "path_sup", "trivial_sup")),
    "other training samples, i ≠ k": ("measured_others", ("T0", "T5_others", "trivial_sup")),
}
NO_BOUND = "No bound of the theory covers held-out points."


@panel
def draw_ratios(ax: Axes, rows: pd.DataFrame, measured: str, columns: Sequence[str]) -> Axes:
    """Median over the pairs of bound/measured against mass, rows of one n. 1 is a bound that is met exactly."""
    known_lines(columns)
    rows = rows[rows[measured] > 0]
    left_out: dict[tuple[float, ...], list[str]] = {}
    for column in stated(rows, columns):
        ratio = (rows[column] / rows[measured]).groupby(rows["mass"])
        finite = ratio.apply(lambda values: bool(np.isfinite(values).all()))
        shown = ratio.median()[finite]
        if not finite.all():
            left_out.setdefault(tuple(finite.index[~finite]), []).append(LINES[column].label)
        if len(shown):
            ax.plot(shown.index, shown, **LINES[column].style())
    ax.axhline(1, color="black", linewidth=0.9)
    log_y(ax, *log_limits([1.0, *(y for line in drawn_lines(ax).values() for y in line.get_ydata())]))
    ax.set_ylabel("bound / measured [no unit]")
    if len(rows):
        n_axis(ax, sorted(rows["mass"].unique()), "mass [no unit]", margin=1.3)
    for at, names in left_out.items():
        ax.set_xlabel(
            f"{ax.get_xlabel()}\n{', '.join(names)} not applicable\nat mass {', '.join(f'{m:g}' for m in at)} (ξ = 0)"
        )
    return ax


@panel
def draw_held_out(ax: Axes, rows: pd.DataFrame) -> Axes:
    """Divergence at the worst held-out point over that at the replaced sample against mass, rows of one n.

    Median over the pairs, bars from the smallest to the largest.
    """
    rows = rows[(rows["measured_replaced"] > 0) & (rows["measured_heldout"] > 0)]
    shares = (rows["measured_heldout"] / rows["measured_replaced"]).groupby(rows["mass"])
    shown = shares.agg(["median", "min", "max"])
    ax.plot(shown.index, shown["median"], **LINES["measured_sup"].style())
    ax.vlines(shown.index, shown["min"], shown["max"], color="0.45", linewidth=0.9)
    ax.axhline(1, color="0.45", linestyle=":", linewidth=0.9)
    low, high = log_limits([*shown.to_numpy().ravel(), 1.0])
    log_y(ax, low, high * (high / low) ** 0.25)  # room for the sentence
    if len(rows):
        n_axis(ax, sorted(rows["mass"].unique()), "mass [no unit]", margin=1.3)
    ax.set_ylabel("measured, held-out / replaced [no unit]")
    ax.text(0.5, 0.97, NO_BOUND, transform=ax.transAxes, ha="center", va="top", fontsize=7, style="italic")
    return ax


@styled
def ratios_figure(summary: pd.DataFrame, n: int | None = None) -> Figure:
    """By mass at one n (the largest when not given): bound over measured for the stack, at the replaced sample and at
    the others, and held-out points relative to the replaced sample."""
    n = int(summary["n"].max()) if n is None else n
    rows = summary[summary["n"] == n]
    figure = new_figure(PAGE, 6.0)
    *axes, held_out = figure.subplots(2, 2).ravel()
    for ax, (title, (measured, columns)) in zip(axes, RATIOS.items(), strict=True):
        draw_ratios(ax, rows, measured, columns)
        ax.set_title(title, fontweight="bold")
    values = [line.get_ydata() for ax in axes for line in drawn_lines(ax).values()]
    for ax in axes:
        log_y(ax, *log_limits(np.concatenate([*values, [1.0]])))
        ax.set_ylabel("bound / measured [no unit]" if ax is not axes[1] else "")
    draw_held_out(held_out, rows)
    held_out.set_title("held-out points", fontweight="bold")
    title = f"n = {n}, medians over {len(rows) // max(rows['mass'].nunique(), 1)} pairs at each mass"
    figure.suptitle("\n".join(filter(None, [title, loss_note(rows)])), fontsize=8)
    shown = (column for _, columns in RATIOS.values() for column in stated(rows, columns))
    legend_of_kinds(figure, ["measured_sup", *shown])
    figure.draw_without_rendering()
    for ax in axes:
        label_lines(ax, (ax.get_xlim()[1] / 1.3, 1.0, "measured", "black"))
    return figure


@panel
def draw_place(ax: Axes, table: pd.DataFrame) -> Axes:
    """Divergence at one place against mass, a line per n, bars from the smallest to the largest pair.

    `table`: rows of one place from `studies.findings.confinement.by_place`.
    """
    ns = sorted(table["n"].unique())
    for position, n in enumerate(ns):
        rows = table[(table["n"] == n) & (table["median"] > 0)].sort_values("mass")
        if rows.empty:
            continue
        shift = 1.06 ** (position - (len(ns) - 1) / 2)  # bars of neighbouring n side by side
        style = series_style(position, len(ns))
        x = rows["mass"] * shift
        ax.plot(x, rows["median"], **style, label=f"measured, n = {n}")
        ax.vlines(x, np.maximum(rows["low"], 1e-300), rows["high"], color=style["color"], linewidth=0.7, alpha=0.55)
    log_y(ax, *log_limits(table.loc[table["low"] > 0, ["low", "high"]].to_numpy().ravel()))
    ax.set_ylabel(f"measured divergence\n[{UNIT}]")
    if len(table):
        n_axis(ax, sorted(table["mass"].unique()), "mass [no unit]", margin=1.45)
    return ax


@styled
def confinement_figure(summary: pd.DataFrame, trajectories: pd.DataFrame) -> Figure:
    """Columns: the replaced sample, the others, held-out points. Rows: sup over training, and at equal training
    loss."""
    level, at_level = equal_loss(trajectories)
    tables = {"supremum over training": by_place(summary)}
    if not at_level.empty:
        tables[f"at equal training loss ({number(level)})"] = by_place(at_level)
    figure = new_figure(PAGE, 0.6 + 2.2 * len(tables))
    axes = figure.subplots(len(tables), len(PLACES), sharex=True, sharey=True, squeeze=False)
    for row, (reading, table) in enumerate(tables.items()):
        for column, (place, title) in enumerate(PLACES.items()):
            draw_place(axes[row, column], table[table["place"] == place])
            axes[row, column].set_title(title if row == 0 else "")
            axes[row, column].set_ylabel("")
            axes[row, column].set_xlabel("mass [no unit]" if row == len(tables) - 1 else "")
        axes[row, 0].set_ylabel(f"measured divergence\n{reading}\n[{UNIT}]")
    positive = [table.loc[table["low"] > 0, ["low", "high"]].to_numpy().ravel() for table in tables.values()]
    for ax in axes.ravel():
        log_y(ax, *log_limits(np.concatenate(positive)))
    handles = dict(reversed(pair) for ax in axes.ravel() for pair in zip(*ax.get_legend_handles_labels(), strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=max(len(handles), 1), handlelength=3.2
    )
    return figure
