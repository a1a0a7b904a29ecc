"""One look for all figures: column widths, fonts, axes, colours that survive grey print, saving.

Nothing global is changed: every drawing function runs inside `matplotlib.rc_context`, figures are `Figure` objects
without
pyplot, and files carry no date, so a redraw of the same numbers gives the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.37
"""Width of one column of a two-column page, inches."""
PAGE = 6.97
"""Width of both columns, inches."""
UNIT = "network-output units"
"""Targets are one-hot: 1 is the distance from 0 to the target coordinate."""

STYLE = {
    "font.size": 7.5,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "mathtext.fontset": "dejavusans",
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.8,
    "lines.markeredgewidth": 0.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "contraction-stability",
    "pdf.fonttype": 42,
}

# For lines that stand for n, or for mass: order by darkness, so that grey print keeps the order.
SERIES = (
    ("#88CCEE", "-", "o"),
    ("#44AA99", "--", "s"),
    ("#AA4499", "-.", "^"),
    ("#332288", "-", "D"),
    ("#000000", "--", "v"),
)


def series_style(position: int, count: int) -> dict:
    """Colour, dash and marker of line `position` of `count`; the last one is always dark.

    >>> series_style(2, 3)["color"]
    '#332288'
    """
    chosen = SERIES[1:4] if count == 3 else SERIES[3:4] if count == 1 else SERIES
    color, dash, marker = chosen[position % len(chosen)]
    return {"color": color, "linestyle": dash, "marker": marker, "markeredgecolor": "white"}


def styled(draw: Callable) -> Callable:
    """Decorator: `draw` runs under the style, and the caller's rcParams are what they were afterwards."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


@styled
def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: nothing remembers it, nothing must close it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@styled
def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as .svg, .pdf and .png, each whole or not at all, without dates: same figure, same bytes."""
    from studies.store import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout stands: every further run of it costs as much as the drawing
    metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    paths = []
    for kind, facts in metadata.items():
        paths.append(path.with_name(f"{path.name}.{kind}"))
        write_whole(paths[-1], lambda file, kind=kind, facts=facts: figure.savefig(file, format=kind, metadata=facts))
    return paths


@styled
def n_axis(ax: Axes, values: Sequence[float], label: str = "training samples n", margin: float = 1.18) -> None:
    """Logarithmic axis with the values of the study as its only ticks."""
    ax.set_xscale("log")
    only_ticks(ax.xaxis, values)
    ax.set_xlim(min(values) / margin, max(values) * margin)
    ax.set_xlabel(label)


def only_ticks(axis, values: Sequence[float]) -> None:
    """Ticks of a log axis at `values` alone, written as plain numbers. Set the scale first."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(sorted(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@styled
def log_y(ax: Axes, low: float, high: float) -> None:
    """Logarithmic y axis from `low` to `high`: decades, or 1-2-5 steps as plain numbers where it spans less than
    two."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.set_ylim(low, high)
    short = high / low < 100
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,), numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if short else LogFormatterMathtext())


def log_limits(values: Iterable[float], pad: float = 0.06) -> tuple[float, float]:
    """Limits of a log axis around the finite positive values; (0.1, 10) when there are none.

    >>> low, high = log_limits([1, 100, float("inf")], pad=0.5)
    >>> low, high
    (0.1, 1000.0)
    """
    values = np.asarray(list(values), float)
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 10.0
    low, high = np.log10(values.min()), np.log10(values.max())
    room = max((high - low) * pad, 0.1)
    return float(10 ** (low - room)), float(10 ** (high + room))


def number(value: float) -> str:
    """A number for people: three significant digits, no exponent where it can be helped.

    >>> [number(v) for v in (0.61234, 444.2, 56500, 1.2e6, 3e-14, float("inf"), 0, -0.5)]
    ['0.612', '444', '56\u202f500', '1.2·10⁶', '3·10⁻¹⁴', '∞', '0', '−0.5']
    """
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    rounded = float(f"{size:.3g}")
    if 1e-3 <= rounded < 1e6:
        text = f"{rounded:,.0f}".replace(",", "\u202f") if rounded >= 1000 else f"{rounded:g}"
    else:
        mantissa, power = f"{size:.1e}".split("e")
        text = f"{float(mantissa):g}·10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("−" if value < 0 else "") + text
