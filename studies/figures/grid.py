"""Figures of studies over any axis: a quantity against it, lines by a second one; numbers on a log axis, words in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.definition.kinds import Section
from studies.definition.points import written
from studies.figures.style import (
    PAGE,
    UNIT,
    log_limits,
    log_y,
    n_axis,
    new_figure,
    panel,
    series_style,
    styled,
    whole_steps,
    width_for,
)
from studies.findings.applicable import another_loss
from studies.findings.exponents import LEAST
from studies.findings.grid import varied
from studies.findings.written import axis_label, axis_words, setting

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

MOST_LINES = 6
"""Of a numeric axis, in one panel."""
PLACES = {
    "measured_replaced": "at the replaced sample",
    "measured_others": "at the worst other training sample",
    "measured_heldout": "at the worst held-out point",
}
LOSSES = {
    "train_loss": "training loss at the end",
    "held_out_loss": "held-out loss at the end",
    "gap": "generalization gap\n(held-out − training loss)",
}
RATIOS = {
    "T5_over": "T5 over measured,\nworst training sample",
    "path_over": "path length over measured,\nworst training sample",
    "T5_path": "T5 over path length",
}
CONSTANTS = {
    "xi": "ξ: inf over the run\nof λₘᵢₙ(H) [1/time]",
    "drift_share": "kernel drift over\ndisturbance [no unit]",
    "T3_over": "T3 over measured ‖e‖\n[no unit]",
}
DIVERGENCE, LOSS, RATIO = f"divergence of the twins\n[{UNIT}]", "loss [per sample]", "ratio [no unit]"
SIZES = ("measured_sup", "measured_l2", "path_sup", "path_l2", "T4", "T5", "null_sup")
LABELS = (
    dict.fromkeys((*PLACES, *SIZES), DIVERGENCE)
    | dict.fromkeys(LOSSES, LOSS)
    | dict.fromkeys(RATIOS, RATIO)
    | CONSTANTS
)
"""What the vertical axis of a column says; a panel's title says which of them it is."""


def columns_of(labels: Sequence[str]) -> int:
    """Columns of a legend that a page has room for.

    >>> columns_of(["n 6", "n 12"]), columns_of(["optimizer woodbury-momentum"] * 6)
    (2, 3)
    """
    return max(min(len(labels), 100 // (max(map(len, labels), default=0) + 6)), 1)


def lines_of(values: Sequence) -> list:
    """The values of an axis that have a line: all words; of numbers six at most, the smallest and largest among them.

    >>> lines_of([8, 1, 2, 3, 4, 5, 6, 7])
    [1, 2, 4, 5, 7, 8]
    """
    values = sorted(values, key=lambda value: (isinstance(value, str), value))
    if len(values) <= MOST_LINES or not is_numeric(values):
        return values
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, MOST_LINES).round().astype(int))]


def is_numeric(values: Sequence) -> bool:
    return all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in values)


@panel
def draw_over_axis(ax: Axes, frame: pd.DataFrame, axis: str, column: str, by: str | None = None) -> Axes:
    """Median of ``column`` at each value of ``axis``, bars from the smallest to the largest pair, a line per value of ``by``.

    Values that are 0, negative or infinite have no place on the log axis and are left out.
    """
    values = sorted(frame[axis].unique(), key=lambda value: (isinstance(value, str), value))
    numeric = is_numeric(values) and min(values) > 0 and len(values) > 1
    place = {value: float(value) if numeric else float(index) for index, value in enumerate(values)}
    groups = [None] if by is None else sorted(frame[by].unique(), key=lambda value: (isinstance(value, str), value))
    usable = frame[np.isfinite(frame[column]) & (frame[column] > 0)]
    for index, group in enumerate(groups):
        rows = usable if group is None else usable[usable[by] == group]
        found = rows.groupby(axis)[column].agg(["median", "min", "max"])
        found = found.loc[[value for value in values if value in found.index]]
        x = np.array([place[value] for value in found.index])
        shift = (index - (len(groups) - 1) / 2) * 0.05
        x = x * np.exp(shift) if numeric else x + 2 * shift
        style = series_style(index, len(groups))
        if not numeric:
            style["linestyle"] = "none"  # words have no order to draw a line along
        spread = [found["median"] - found["min"], found["max"] - found["median"]]
        label = "median" if group is None else setting(by, group)
        ax.errorbar(x, found["median"], yerr=spread, elinewidth=0.9, capsize=2, label=label, **style)
    if numeric:
        n_axis(ax, [float(value) for value in values])
    else:
        words = [written(value) for value in values]
        slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, words)) > 5 else {}
        ax.set_xticks(range(len(values)), words, **slant)
        ax.set_xlim(-0.6, len(values) - 0.4)
    log_y(ax, *log_limits(usable[column]))
    ax.set_xlabel(axis_label(axis))
    ax.set_ylabel(LABELS.get(column, column.replace("_", " ")))
    return ax


@panel
def draw_trajectory(ax: Axes, trajectories: pd.DataFrame, axis: str, column: str) -> Axes:
    """Median of ``column`` over seeds and pairs against the step, a line per value of ``axis`` (:func:`lines_of`)."""
    values, drawn = lines_of(trajectories[axis].unique()), []
    for index, value in enumerate(values):
        median = trajectories[trajectories[axis] == value].groupby("step")[column].median()
        median = median[median > 0]
        style = series_style(index, len(values))
        every = max(len(median) // 5, 1)
        ax.plot(median.index, median, label=setting(axis, value), markevery=((index * every) // 6, every), **style)
        drawn += list(median)
    low, high = log_limits(drawn)
    log_y(ax, max(low, high * 1e-4), high)
    whole_steps(ax)
    ax.set_xlabel("training step")
    ax.set_ylabel(LABELS.get(column, column.replace("_", " ")))
    return ax


@styled
def over_axis_figure(
    frame: pd.DataFrame, axis: str, columns: Mapping[str, str], by: str | None = None, unit: str = ""
) -> Figure:
    """A panel per column of ``columns`` (column → its title) against ``axis``; one common legend."""
    shown = {column: title for column, title in columns.items() if column in frame and (frame[column] > 0).any()}
    figure = new_figure(width_for(len(shown)), 2.9)
    axes = figure.subplots(1, max(len(shown), 1), squeeze=False)[0]
    for ax, (column, title) in zip(axes, shown.items(), strict=False):
        draw_over_axis(ax, frame, axis, column, by)
        ax.set_title(title, fontsize=7.5)
        ax.set_ylabel("")
    axes[0].set_ylabel(unit)
    if by is not None:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns_of(labels), handlelength=3.0)
    return figure


@styled
def trajectory_figure(trajectories: pd.DataFrame, axis: str, columns: Mapping[str, str]) -> Figure:
    """A panel per column of ``columns`` (column → its title), medians against the step; one common legend."""
    figure = new_figure(PAGE, 2.9)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        draw_trajectory(ax, trajectories, axis, column)
        ax.set_title(title, fontsize=7.5)
        ax.set_ylabel("")
    axes[0].set_ylabel(DIVERGENCE)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns_of(labels), handlelength=3.0)
    return figure


def loop_sections(frames: Frames) -> list[Section]:
    """The figures of ``kind = "loops"``."""
    summary, axes = frames.summary, varied(frames) or ["n"]
    axis, by = axes[0], axes[1] if len(axes) > 1 else None
    rows = summary.assign(
        T5_over=summary["T5"] / summary["measured_sup"] if "T5" in summary else np.nan,
        path_over=summary["path_sup"] / summary["measured_sup"],
        T5_path=summary["T5"] / summary["path_sup"] if "T5" in summary else np.nan,
    )
    bars = "Medians over seeds and twin pairs, bars from the smallest to the largest pair. "
    found = [
        Section(
            "divergence",
            f"Divergence of the twins against {axis_words(axis)}",
            bars
            + "Supremum over training of the distance between the outputs of the run on S and of its twin. Look at "
            "whether the three places move together: influence that is confined stays at the replaced sample alone.",
            lambda: over_axis_figure(rows, axis, PLACES, by, DIVERGENCE),
        ),
        Section(
            "losses",
            f"Losses and generalization gap against {axis_words(axis)}",
            bars + "Of the run on S after its last step. Look at whether the gap follows the "
            "divergence of the figure above. Negative gaps have no place on a log axis and are left out.",
            lambda: over_axis_figure(rows, axis, LOSSES, by, LOSS),
        ),
        Section(
            "training",
            "Divergence over training",
            "Medians over seeds and pairs against the step. The twins start together, so the first steps leave the axis "
            "downwards. Look at whether the lines level off or still rise at the end: then more steps would part the twins "
            "further." + lines_words(frames.trajectories, axis),
            lambda: trajectory_figure(frames.trajectories, axis, PLACES),
        ),
    ]
    if "T5" in summary and summary["T5"].notna().any():
        found.insert(
            1,
            Section(
                "enclosures",
                "What the enclosure explains",
                bars
                + "T5 encloses the divergence a posteriori, whatever the optimizer; the path length does so without "
                "theory. Look whether T5 over the path length is below 1: above, contraction explains nothing. Infinite "
                "enclosures (the recursion exploded) are left out.",
                lambda: over_axis_figure(rows, axis, RATIOS, by, RATIO),
            ),
        )
    return found


def lines_words(trajectories: pd.DataFrame, axis: str) -> str:
    """A sentence of the caption where not every value has a line."""
    values = trajectories[axis].unique()
    shown = lines_of(values)
    return f" {len(shown)} of {len(values)} values have a line." if len(shown) < len(values) else ""


def alone_with_mass(frames: Frames, axis: str) -> bool:
    """Can bounds be drawn against this axis: three numbers at least, above 0, and beside it nothing but the mass varied?"""
    values = list(frames.summary[axis].unique())
    return set(varied(frames)) <= {axis, "mass"} and len(values) >= LEAST and is_numeric(values) and min(values) > 0


def twin_sections(frames: Frames) -> list[Section]:
    """Along the axes of ``kind = "twins"`` that its page of bounds does not compare: the width and keys of the study."""
    from studies.figures.bounds import bounds_figure, bounds_words

    summary = frames.summary
    axes = [name for name in varied(frames) if name not in ("n", "mass")]
    if not axes:
        return []
    by = next((name for name in varied(frames) if name != axes[0]), None)
    bars = "Medians over seeds and twin pairs, bars from the smallest to the largest pair. "
    rows = summary.assign(
        T5_path=summary["T5"] / summary["path_sup"],
        T3_over=summary["T3"] / summary["measured_l2"] if "T3" in summary else np.nan,
    )
    return (
        [
            Section(
                f"across-{axis.rpartition('.')[2]}",
                f"Divergence of the twins against {axis_words(axis)}",
                bars
                + "Supremum over training, at the replaced sample, at the worst other training sample and at the worst "
                "held-out point. Look at whether the three panels move together, and whether the bars of neighbouring "
                "values are apart.",
                lambda axis=axis: over_axis_figure(rows, axis, PLACES, by if by != axis else None, DIVERGENCE),
            )
            for axis in axes
        ]
        + [
            Section(
                f"bounds-{axis.rpartition('.')[2]}",
                f"Bounds and measurement against {axis_words(axis)}",
                bounds_words(summary, axis),
                lambda axis=axis: bounds_figure(summary, along=axis),
            )
            for axis in axes
            if alone_with_mass(frames, axis)
        ]
        + [
            Section(
                f"constants-{axis.rpartition('.')[2]}",
                f"What the theorem rests on, against {axis_words(axis)}",
                bars + "ξ is the rate of the theorem; the kernel drift is what its proof drops, as a share of the "
                "disturbance that it keeps"
                + (
                    ". Look at whether ξ moves while the divergence stays. "
                    if another_loss(summary)
                    else "; T3 is the sharpest bound under its assumptions. Look at whether ξ moves while T3 over measured "
                    "stays. "
                )
                + "ξ = 0 has no place on a log axis.",
                lambda axis=axis: over_axis_figure(rows, axis, CONSTANTS, by if by != axis else None),
            )
            for axis in axes
        ]
    )
