"""The lines of a study: what each bound is, of which kind, how it is drawn, and labels kept apart."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.style import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MEASURED, PAPER, ASSUMING, POSTERIOR, FREE, TRIVIAL = (
    "measured",
    "the paper's statement",
    "bound under assumptions",
    "a-posteriori enclosure",
    "theory-free",
    "trivial level",
)
# What each kind of line is, in the words of the legend.
KINDS = {
    MEASURED: "the divergence of two trained networks",
    PAPER: "theorem 3 of arXiv 2603.03610, equation P14",
    ASSUMING: "continuous flow, kernel drift neglected: it can be broken by a run that drifts",
    POSTERIOR: "always holds, but needs the trained twin: it explains the divergence, it does not foretell it",
    FREE: "sum of the steps the divergence took; holds always, uses no contraction, needs the twin",
    TRIVIAL: "triangle inequality on the output gradients, true of any two networks",
}


HUES = {"blue": 0, "green": 2, "vermilion": 3, "purple": 4, "grey": 7, "sky": 9}
"""Place of a colour in seaborn's "colorblind" palette, a form of Okabe & Ito's."""


@functools.cache
def hue(name: str) -> str:
    """
    >>> hue("blue"), hue("black")
    ('#0173b2', '#000000')
    """
    from seaborn import color_palette

    return "#000000" if name == "black" else color_palette("colorblind").as_hex()[HUES[name]].lower()


@functools.cache
def ink(color: str) -> str:
    """The colour dark enough for small type on white (lightness 0.33 at most).

    >>> ink("#000000"), ink("#56b4e9")
    ('#000000', '#136695')
    """
    from colorsys import rgb_to_hls

    from matplotlib.colors import to_hex, to_rgb
    from seaborn import set_hls_values

    lightness = rgb_to_hls(*to_rgb(color))[1]
    return to_hex(set_hls_values(color, l=min(lightness, 0.33)))


@dataclass(frozen=True)
class Line:
    """A column of the results as a line: short label, kind, what it is, and how it is drawn."""

    column: str
    label: str
    kind: str
    formula: str
    hue: str
    dash: str
    marker: str

    @property
    def color(self) -> str:
        return hue(self.hue)

    @property
    def title(self) -> str:
        """What a legend says: the label and the kind."""
        return self.kind if self.kind == MEASURED else f"{self.label}: {self.kind}"

    def style(self) -> dict:
        """Keywords of `Axes.plot`."""
        style = {
            "label": self.title,
            "color": self.color,
            "linestyle": self.dash,
            "marker": self.marker,
            "markeredgecolor": "white",
        }
        return style | ({"linewidth": 1.9, "zorder": 3} if self.kind == MEASURED else {})


# Within a kind, dash and marker tell the lines apart, so grey print loses nothing.
T3_FORMULA = "sup of Σ lr·exp(−Σ lr·ξ)‖d‖ on the recorded grid (left end points), with the rate of the moment"
RATE_H = "ρ the rate in the metric H⁻¹ (softmax: of the outputs less their mean over the classes)"
# Every column that is drawn as a line: label, kind, colour, dashes.
LINES = {
    line.column: line
    for line in (
        Line("T0", "T0", PAPER, "2κ²L/(ξμ√n)", "vermilion", "-", "s"),
        Line("T1", "T1", ASSUMING, "2hL/(ξ√n)", "blue", "-", "^"),
        Line("T1c", "T1c", ASSUMING, "2L·col/ξ", "blue", "--", "v"),
        Line("T2", "T2", ASSUMING, "sup‖d‖/ξ", "sky", "-", "D"),
        Line("T3", "T3", ASSUMING, T3_FORMULA, "sky", "--", "p"),
        Line("T2H", "T2H", ASSUMING, f"√(sup λmax(H)/inf λmin(H))·sup‖d‖/inf ρ, {RATE_H}", "blue", ":", "D"),
        Line(
            "T3H",
            "T3H",
            ASSUMING,
            f"sup of √λmax(H)·E, E⁺ = e^(−ρ·lr)E + lr‖d‖ in the metric H⁻¹, {RATE_H}",
            "blue",
            "-.",
            "p",
        ),
        Line("T4", "T4", POSTERIOR, "E⁺ = ‖A‖E + ‖w‖", "green", "-", "P"),
        Line("T5", "T5", POSTERIOR, "outer ellipsoids of e⁺ = Ae + w", "green", "--", "X"),
        Line("T5_others", "T5", POSTERIOR, "outer ellipsoids of e⁺ = Ae + w, i ≠ k", "green", "--", "X"),
        Line("path_l2", "path", FREE, "Σ‖e(t+1) − e(t)‖", "purple", "-.", "h"),
        Line("path_sup", "path", FREE, "maxᵢ Σ|eᵢ(t+1) − eᵢ(t)|", "purple", "-.", "h"),
        Line("measured_l2", "measured", MEASURED, "sup over training of ‖e‖", "black", "-", "o"),
        Line("measured_sup", "measured", MEASURED, "sup over training of maxᵢ |eᵢ|", "black", "-", "o"),
        Line("measured_others", "measured", MEASURED, "sup over training of |eᵢ|, i ≠ k", "black", "-", "o"),
        Line("vacuity_floor", "2L√n", TRIVIAL, "2L√n", "grey", ":", ""),
        Line("trivial_sup", "2L", TRIVIAL, "2L", "grey", ":", ""),
    )
}


def known_lines(columns: Iterable[str]) -> None:
    """Raise ValueError for a name that no line has."""
    from nt_kernel.errors import unknown_name

    for column in columns:
        if column not in LINES:
            raise ValueError(unknown_name("column that is drawn as a line", column, LINES))


# What may stand in one panel: bounds on the stacked norm ‖e‖, and bounds on every single sample.
STACKED = ("T0", "T1", "T1c", "T2", "T3", "T2H", "T3H", "T4", "path_l2", "vacuity_floor", "measured_l2")
PER_SAMPLE = ("T0", "T5", "path_sup", "trivial_sup", "measured_sup")


def spread(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Move positions apart to at least `gap`, in order, as little as a few passes manage, inside [low, high].

    >>> spread([0.5, 0.5], 0.2)
    array([0.4, 0.6])
    """
    positions = np.asarray(positions, float)
    order = np.argsort(positions, kind="stable")
    blocks = [
        [positions[i], 1] for i in order
    ]  # centre, count: touching labels move as one block (pool adjacent violators)
    merged: list[list[float]] = []
    for centre, count in blocks:
        merged.append([centre, count])
        while True:
            last = merged[-1]
            half = gap * (last[1] - 1) / 2
            last[0] = min(max(last[0], low + half), high - half)
            if len(merged) < 2 or last[0] - merged[-2][0] >= gap * (last[1] + merged[-2][1]) / 2 - 1e-12:
                break
            before = merged[-2]
            total = before[1] + last[1]
            merged[-2:] = [[(before[0] * before[1] + last[0] * last[1]) / total, total]]
    result = np.empty_like(positions)
    result[order] = (
        np.concatenate([centre + gap * (np.arange(count) - (count - 1) / 2) for centre, count in merged])
        if merged
        else []
    )
    return result


@styled
def label_ends(ax: Axes, ends: Iterable[tuple[float, float, str, str]], size: float = 6.5) -> None:
    """Write labels to the right of the axes at the height of line ends (x, y, text, colour), moved apart, with leaders.

    Limits, scales and height of `ax` must be final (`figure.draw_without_rendering()` settles a constrained layout).
    """
    ends = list(ends)
    if not ends:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    points = np.array([to_axes.transform((x, y)) for x, y, _, _ in ends])  # [labels, 2]
    height = ax.get_window_extent().height * 72 / ax.figure.dpi  # points
    last = points[:, 0].max()
    for x in np.unique(points[:, 0]):
        group = np.flatnonzero(points[:, 0] == x)
        # A line that ends early is labelled where it ends: a leader across the panel would look like data.
        edge, text_at = (1.0, 1.05) if x == last else (x + 0.02, x + 0.06)
        for i, place in zip(group, spread(points[group, 1], 1.22 * size / height), strict=True):
            _, _, text, color = ends[i]
            leader = [x, edge, text_at], [points[i, 1], points[i, 1], place]
            ax.plot(*leader, transform=ax.transAxes, color=color, linewidth=0.5, alpha=0.6, clip_on=False, zorder=1)
            look = {"color": ink(color), "fontsize": size, "va": "center_baseline"}
            written = ax.text(text_at + 0.015, place, text, transform=ax.transAxes, **look)
            if x < last:
                written.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85})


def drawn_lines(ax: Axes) -> dict[str, Line2D]:
    """The lines of this table that are on `ax`, by their labels."""
    titles = {line.title: line.label for line in LINES.values()}
    return {titles[line.get_label()]: line for line in ax.get_lines() if line.get_label() in titles}


@styled
def label_lines(ax: Axes, *more: tuple[float, float, str, str]) -> None:
    """Label every line of this table at its last point, and `more` (x, y, text, colour) with them."""
    ends = [
        (*(data[-1] for data in line.get_data()), label, line.get_color()) for label, line in drawn_lines(ax).items()
    ]
    label_ends(ax, [*ends, *more])


@styled
def legend_of_kinds(figure: Figure, columns: Iterable[str]) -> None:
    """A legend under the figure: one entry per distinct line, in the order of KINDS."""
    from matplotlib.lines import Line2D

    order = list(KINDS)
    lines = sorted((LINES[column] for column in dict.fromkeys(columns)), key=lambda line: order.index(line.kind))
    titles: dict[tuple, list[str]] = {}  # look: labels; the trivial levels look alike and share an entry
    for line in lines:
        look = {key: value for key, value in line.style().items() if key != "label"}
        labels = titles.setdefault((line.kind, *sorted(look.items())), [])
        if line.label not in labels:
            labels.append(line.label)
    handles = [Line2D([], [], **dict(look)) for _, *look in titles]
    texts = [kind if kind == MEASURED else f"{', '.join(labels)}: {kind}" for (kind, *_), labels in titles.items()]
    across = max(1, int(figure.get_figwidth() / 2.1))
    figure.legend(handles, texts, loc="outside lower center", ncols=across, handlelength=3.2, columnspacing=1.8)
