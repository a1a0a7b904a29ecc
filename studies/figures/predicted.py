"""Predicted against measured divergence, and the error of the prediction along the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.definition.kinds import Section
from studies.figures.grid import columns_of, draw_over_axis
from studies.figures.style import COLUMN, PAGE, UNIT, log_limits, log_x, log_y, new_figure, panel, series_style, styled
from studies.findings.grid import varied
from studies.findings.written import axis_words, setting

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


@panel
def draw_predicted(ax: Axes, summary: pd.DataFrame, place: str, by: str) -> Axes:
    """A mark per twin: predicted against measured; the line is equality."""
    x, y = f"measured_{place}", f"predicted_{place}"
    values = sorted(summary[by].unique())
    for index, value in enumerate(values):
        rows = summary[(summary[by] == value) & (summary[x] > 0) & (summary[y] > 0)]
        style = series_style(index, len(values)) | {"linestyle": "none", "markersize": 4}
        ax.plot(rows[x], rows[y], label=setting(by, value), **style)
    low, high = log_limits([*summary[x], *summary[y]])
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=0)
    log_y(ax, low, high)
    log_x(ax, low, high)
    ax.set_xlabel(f"measured, twin trained\n[{UNIT}]")
    ax.set_ylabel(f"predicted from one run\n[{UNIT}]")
    ax.set_title(TITLES[place], fontsize=7.5)
    return ax


@panel
def draw_prediction_error(ax: Axes, summary: pd.DataFrame, place: str, axis: str, by: str | None = None) -> Axes:
    """|predicted − measured| / measured at one place against ``axis``: medians, bars from the least to the largest."""
    measured = summary[f"measured_{place}"]
    error = (summary[f"predicted_{place}"] - measured).abs() / measured.where(measured > 0, np.nan)
    draw_over_axis(ax, summary.assign(error=error), axis, "error", by)
    ax.set_ylabel("relative error of the\nprediction [no unit]")
    ax.set_title(TITLES[place], fontsize=7.5)
    return ax


@panel
def draw_calibration(ax: Axes, calibration: pd.DataFrame, factor: float) -> Axes:
    """Trained against predicted divergence of the calibration twins of ``stability predict``; lines: equality, and the
    ``factor`` q of its upper limit."""
    low, high = log_limits([*calibration["measured_sup"], *calibration["predicted_sup"]], pad=0.12)
    ax.plot([low, high], [low, high], color="0.55", linewidth=0.8, label="trained = predicted")
    if np.isfinite(factor):
        q = f"trained = {factor:.3g} × predicted (upper limit)"
        ax.plot([low, high], [factor * low, factor * high], color="0.2", linewidth=0.9, linestyle="--", label=q)
    look = {"marker": "o", "linestyle": "none", "color": series_style(1, 3)["color"], "label": "a trained twin"}
    ax.plot(calibration["predicted_sup"], calibration["measured_sup"], **look)
    log_x(ax, low, high)
    log_y(ax, low, high)
    ax.set_xlabel(f"predicted largest divergence [{UNIT}]")
    ax.set_ylabel(f"trained largest divergence\n[{UNIT}]")
    return ax


@styled
def calibration_figure(calibration: pd.DataFrame, factor: float) -> Figure:
    """Predicted against trained divergence of the calibration twins, one column wide."""
    figure = new_figure(COLUMN, COLUMN)
    draw_calibration(figure.subplots(), calibration, factor)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


@styled
def predicted_figure(summary: pd.DataFrame, by: str) -> Figure:
    """Three panels: the replaced sample, the others, held-out points; a mark per twin."""
    figure = new_figure(PAGE, 2.9)
    axes = figure.subplots(1, 3)
    for ax, place in zip(axes, TITLES, strict=True):
        draw_predicted(ax, summary, place, by)
        if ax is not axes[0]:
            ax.set_ylabel("")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns_of(labels))
    return figure


@styled
def error_figure(summary: pd.DataFrame, axis: str, by: str | None) -> Figure:
    """Three panels: the error of the prediction at the replaced sample, the others, held-out points."""
    figure = new_figure(PAGE, 2.9)
    axes = figure.subplots(1, 3)
    for ax, place in zip(axes, TITLES, strict=True):
        draw_prediction_error(ax, summary, place, axis, by)
        if ax is not axes[0]:
            ax.set_ylabel("")
    if by is not None:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns_of(labels))
    return figure


def prediction_sections(frames: Frames) -> list[Section]:
    """The figures of ``kind = "prediction"``."""
    summary, axes = frames.summary, varied(frames) or ["n"]
    by = axes[1] if len(axes) > 1 else None
    return [
        Section(
            "predicted",
            "Predicted against measured divergence",
            "A mark per twin; suprema over training. The prediction is made from the run on S alone, the twin is "
            "trained only "
            "to compare. On the black line they are equal; look at how far from it the marks of each kind lie.",
            lambda: predicted_figure(summary, axes[0]),
        ),
        Section(
            "prediction-error",
            f"Error of the prediction against {axis_words(axes[0])}",
            "|predicted − measured| / measured of the largest divergence. Medians over seeds and twins, bars "
            "from the least "
            "to the largest. Look at whether the error falls along the axis. Predictions that are right to the "
            "last digit (error 0) have no place on a log axis.",
            lambda: error_figure(summary, axes[0], by),
        ),
    ]
