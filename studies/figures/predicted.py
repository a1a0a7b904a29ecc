"""Predicted against measured divergence, and the error of the prediction along the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.definition.kinds import Section
from studies.definition.points import written
from studies.figures.grid import draw_over_axis
from studies.figures.style import PAGE, UNIT, log_limits, log_y, new_figure, series_style, styled
from studies.findings.grid import varied

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

TITLES = {
    "replaced": "at the replaced sample",
    "others": "at the worst other training sample",
    "heldout": "at the worst held-out point",
}


@styled
def draw_predicted(ax: Axes, summary: pd.DataFrame, place: str, by: str) -> Axes:
    """A mark per twin: predicted against measured; the line is equality."""
    x, y = f"measured_{place}", f"predicted_{place}"
    values = sorted(summary[by].unique())
    for index, value in enumerate(values):
        rows = summary[(summary[by] == value) & (summary[x] > 0) & (summary[y] > 0)]
        style = series_style(index, len(values)) | {"linestyle": "none", "markersize": 4}
        ax.plot(rows[x], rows[y], label=f"{by} {written(value)}", **style)
    low, high = log_limits([*summary[x], *summary[y]])
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=0)
    log_y(ax, low, high)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(ax.yaxis.get_major_locator().__class__(subs=(1.0, 2.0, 5.0), numticks=6))
    ax.xaxis.set_major_formatter(ax.yaxis.get_major_formatter())
    ax.minorticks_off()
    ax.set_xlabel("measured, twin trained")
    ax.set_title(TITLES[place], fontsize=7.5)
    return ax


@styled
def predicted_figure(summary: pd.DataFrame, by: str) -> Figure:
    figure = new_figure(PAGE, 2.9)
    axes = figure.subplots(1, 3)
    for ax, place in zip(axes, TITLES, strict=True):
        draw_predicted(ax, summary, place, by)
    axes[0].set_ylabel(f"predicted from one run\n{UNIT}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


@styled
def error_figure(summary: pd.DataFrame, axis: str, by: str | None) -> Figure:
    figure = new_figure(PAGE, 2.9)
    axes = figure.subplots(1, 3)
    for ax, place in zip(axes, TITLES, strict=True):
        measured = summary[f"measured_{place}"]
        error = (summary[f"predicted_{place}"] - measured).abs() / measured.where(measured > 0, np.nan)
        draw_over_axis(ax, summary.assign(error=error), axis, "error", by)
        ax.set_title(TITLES[place], fontsize=7.5)
    axes[0].set_ylabel("relative error of the prediction")
    if by is not None:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


def prediction_sections(frames: Frames) -> list[Section]:
    """The figures of ``kind = "prediction"``."""
    summary, axes = frames.summary, varied(frames) or ["n"]
    by = axes[1] if len(axes) > 1 else None
    return [
        Section(
            "predicted",
            "Predicted against measured divergence",
            "A mark per twin; suprema over training. The prediction is made from the run on S alone, the twin is trained only "
            "to compare. On the black line they are equal; look at how far from it the marks of each kind lie.",
            lambda: predicted_figure(summary, axes[0]),
        ),
        Section(
            "prediction-error",
            f"Error of the prediction against {axes[0]}",
            "|predicted − measured| / measured of the largest divergence. Medians over seeds and twins, bars from the least "
            "to the largest. Predictions that are right to the last digit (error 0) have no place on a log axis.",
            lambda: error_figure(summary, axes[0], by),
        ),
    ]
