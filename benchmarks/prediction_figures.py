"""Figures of the prediction pages: error against width, and predicted against trained divergence, a panel per method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from studies.figures.style import PAGE, log_limits, log_x, log_y, n_axis, new_figure, series_style, styled

Line = tuple[Sequence[float], Sequence[float], str]  # x, y, label


@styled
def width_figure(panels: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Error against width on log axes, one line per method, a panel per mass; the labels carry the slopes."""
    sheet = new_figure(PAGE, 2.9)
    axes = sheet.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    every = [value for lines in panels.values() for _, y, _ in lines for value in y]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for position, (x, y, label) in enumerate(lines):
            axis.plot(x, y, label=label, **series_style(position, len(lines)))
        n_axis(axis, lines[0][0], label="width of the hidden layers")
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    log_y(axes[0], *log_limits(every))
    axes[0].set_ylabel("relative error of the divergence\non S at the end, median")
    write_png(sheet, path)


@styled
def scatter_figure(
    panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, columns: int = 3, what: str = "sup"
) -> None:
    """Predicted against trained on log axes with equal limits, a panel per method (its title) and the identity line."""
    rows = -(-len(panels) // columns)
    sheet = new_figure(PAGE, 0.4 + 2.25 * rows)
    axes = sheet.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    low, high = log_limits([value for x, y in panels.values() for value in (*x, *y)])
    for axis, (title, (measured, predicted)) in zip(axes, panels.items(), strict=False):
        axis.plot([low, high], [low, high], color="0.55", linewidth=0.8, label="predicted = trained")
        axis.scatter(measured, predicted, s=9, color=series_style(2, 3)["color"], linewidths=0, alpha=0.75)
        axis.set_title(title)
        log_x(axis, low, high)
        log_y(axis, low, high)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(f"trained {what} divergence")
        axis.tick_params(labelbottom=True)
    for axis in axes[: len(panels) : columns]:
        axis.set_ylabel(f"predicted {what} divergence")
    axes[0].legend(loc="upper left")
    write_png(sheet, path)


def write_png(sheet, path: Path) -> None:
    """One .png, whole or not at all, without a date."""
    from studies.results.whole import write_whole

    write_whole(path, lambda file: sheet.canvas.print_png(file, metadata={"Software": None}))


def slope(widths: Sequence[float], errors: Sequence[float]) -> float:
    """Of log error against log width, by least squares.

    >>> round(slope([10, 100, 1000], [1.0, 0.1, 0.01]), 6)
    -1.0
    """
    return float(np.polyfit(np.log(widths), np.log(errors), 1)[0])
