"""One look for all figures: column widths, fonts, axes, colours that survive grey print, saving.

Nothing global is changed: every drawing function runs inside `matplotlib.rc_context`, figures are `Figure` objects that
pyplot does not know, and files carry no date, so a redraw of the same numbers gives the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from studies.findings.written import SUPERSCRIPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.37
"""Width of one column of a two-column page, inches."""
PAGE = 6.97
"""Width of both columns, inches."""
PANELS = 3
"""Panels that a page holds side by side: more would be too narrow for their type."""
RESOLUTION = 200
"""Pixels per inch of the .png."""
UNIT = "network-output units"
"""Targets are one-hot: 1 is the distance from 0 to the target coordinate."""


# The rcParams that every figure is drawn with.
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
    "svg.fonttype": "path",
    "svg.hashsalt": "contraction-stability",
    "pdf.fonttype": 42,
}

SERIES = (("-", "o"), ("--", "s"), ("-.", "^"), ("-", "D"), ("--", "v"), ("-.", "P"))
"""Dash and marker of lines that stand for n, or for mass."""


@functools.cache
def series_colors(count: int) -> tuple[str, ...]:
    """`count` colours from light to dark (seaborn's "crest"): grey print keeps the order.

    >>> [len(series_colors(count)) for count in (1, 3, 8)]
    [1, 3, 8]
    """
    from matplotlib.colors import to_hex
    from seaborn import color_palette

    shades = color_palette("crest", as_cmap=True)(np.linspace(0.1, 1.0, max(count, 2)))
    return tuple(to_hex(shade) for shade in shades[-count:])


def series_style(position: int, count: int) -> dict:
    """Colour, dash and marker of line `position` of `count`; the last one is always dark.

    >>> series_style(2, 3)["linestyle"], series_style(2, 3)["marker"]
    ('-.', '^')
    """
    dash, marker = SERIES[position % len(SERIES)]
    color = series_colors(count)[position]
    return {"color": color, "linestyle": dash, "marker": marker, "markeredgecolor": "white"}


def styled(draw: Callable) -> Callable:
    """Decorator: `draw` runs under the style, and the caller's rcParams are what they were afterwards."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def panel(draw: Callable) -> Callable:
    """Decorator of a ``draw_…(ax, frame, …)``: under the style; ValueError for a table without rows, or without a column
    that it needs."""
    draw = styled(draw)

    @functools.wraps(draw)
    def wrapper(ax, frame, *args, **kwargs):
        if not len(frame):
            raise ValueError(f"{draw.__name__} was given a table without rows")
        try:
            return draw(ax, frame, *args, **kwargs)
        except KeyError as error:
            missing = str(error.args[0]).removeprefix("Column not found: ")  # of a pandas group
            if missing in frame.columns:
                raise
            there = ", ".join(map(str, frame.columns))
            raise ValueError(f"{draw.__name__}: the table has no column {missing!r}; it has {there}") from error

    return wrapper


@styled
def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: nothing remembers it, nothing must close it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def width_for(panels: int) -> float:
    """The width of a figure of so many panels side by side: one column of a paper, or both.

    >>> width_for(1) == COLUMN, width_for(2) == width_for(3) == PAGE
    (True, True)
    """
    return COLUMN if panels <= 1 else PAGE


@styled
def note_title(figure, note: str) -> None:
    """A remark above the panels; a clause a line where the figure is one column wide."""
    narrow = figure.get_figure(root=True).get_figwidth() < PAGE
    figure.suptitle(note.replace("; ", ";\n") if narrow else note, fontsize=7, style="italic")


@styled
def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as .svg, .pdf and .png, each whole or not at all, without dates: same figure, same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    from studies.results.whole import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout stands: every further run of it costs as much as the drawing
    # The canvases are asked directly: `Figure.savefig` draws everything twice.
    writers = {
        "svg": lambda file: FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None}),
        "pdf": lambda file: FigureCanvasPdf(figure).print_pdf(file, metadata={"CreationDate": None}),
        "png": lambda file: FigureCanvasAgg(figure).print_png(file, metadata={"Software": None}),
    }
    paths = []
    for kind, write in writers.items():
        figure.set_dpi(RESOLUTION)  # vector formats leave it at 72
        paths.append(path.with_name(f"{path.name}.{kind}"))
        write_whole(paths[-1], write)
    return paths


@styled
def n_axis(ax: Axes, values: Sequence[float], label: str = "training samples n", margin: float = 1.18) -> None:
    """Logarithmic axis with the values of the study as its only ticks."""
    ax.set_xscale("log")
    only_ticks(ax.xaxis, values)
    if len(values) > 6:
        ax.tick_params(axis="x", labelrotation=60)
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
    """Logarithmic y axis from `low` to `high`."""
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    log_numbers(ax.yaxis, low, high)


@styled
def log_x(ax: Axes, low: float, high: float) -> None:
    """Logarithmic x axis from `low` to `high`."""
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    log_numbers(ax.xaxis, low, high)


def log_numbers(axis, low: float, high: float) -> None:
    """Ticks of a log axis: plain numbers, powers of ten where the axis leaves 0.001 … 10 000."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    from studies.figures.ticks import LogTicks

    plain = high < 1000 * low or (low > 1e-3 and high < 1e4)
    axis.set_major_locator(LogTicks())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if plain else decade(value)))


@styled
def whole_steps(ax: Axes) -> None:
    """Ticks of a counting axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def decade(value: float) -> str:
    """A power of ten as plain text: TeX would be parsed again for every tick of every draw.

    >>> decade(1e5), decade(10.0), decade(1.0), decade(0.01)
    ('10⁵', '10', '1', '10⁻²')
    """
    power = round(np.log10(value)) if value > 0 else 0
    return {0: "1", 1: "10"}.get(power, "10" + str(power).translate(SUPERSCRIPT))


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
