"""The figures of a study: which there are, what each shows in words, and drawing them all into a folder.

Every figure is also a function of its own, for notebooks and papers: it takes frames and returns a `Figure`, and its
panels are functions that take an `Axes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from studies.figures.bounds import bounds_figure, bounds_words, draw_bounds, draw_exponents
from studies.figures.confinement import (
    NO_BOUND,
    confinement_figure,
    draw_held_out,
    draw_place,
    draw_ratios,
    ratios_figure,
)
from studies.figures.constants import constants_figure, draw_constant
from studies.figures.lines import KINDS, LINES
from studies.figures.style import COLUMN, PAGE, STYLE, new_figure, save_figure
from studies.figures.training import draw_divergence, draw_spectrum, spectrum_figure, training_figure
from studies.figures.waterfall import draw_waterfall, waterfall_figure
from studies.figures.wording import plural
from studies.findings.applicable import another_loss
from studies.findings.confinement import equal_loss
from studies.findings.exponents import compared
from studies.findings.written import number, short_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

__all__ = [
    "COLUMN",
    "KINDS",
    "LINES",
    "PAGE",
    "STYLE",
    "Drawing",
    "bounds_figure",
    "confinement_figure",
    "constants_figure",
    "draw_bounds",
    "draw_constant",
    "draw_divergence",
    "draw_exponents",
    "draw_figures",
    "draw_held_out",
    "draw_place",
    "draw_ratios",
    "draw_spectrum",
    "draw_waterfall",
    "drawings",
    "new_figure",
    "ratios_figure",
    "save_figure",
    "spectrum_figure",
    "training_figure",
    "waterfall_figure",
]


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn: file name without ending, title, caption (what it shows, what to see), and how."""

    name: str
    title: str
    caption: str
    make: Callable[[], Figure]


def drawings(frames: Frames) -> list[Drawing]:
    """What can be drawn from the frames of one width. Figures whose table is not there are left out."""
    summary, n = frames.summary, int(frames.summary["n"].max())
    along, another = compared(summary), another_loss(summary)
    found = [
        Drawing(
            "bounds",
            f"Bounds and measurement against {short_words(along)}",
            bounds_words(summary, along),
            lambda: bounds_figure(summary),
        )
    ]
    if not frames.trajectories.empty:
        found.append(
            Drawing(
                "training",
                f"Divergence over training, n = {n}",
                f"n = {n}; lines are medians over the twin pairs, bands their quartiles; the twins start together, so "
                "the first steps leave the axis downwards. Top row: all training outputs, with "
                f"{'T3H' if another else 'T3'} (flow, no kernel drift, on the recorded grid) and the enclosure T4. Bottom "
                "row: the worst sample, with the enclosure T5. Look whether T4 or T5 stays below the path length: where it "
                "runs above, contraction explains nothing that the length of the path does not.",
                lambda: training_figure(frames.trajectories, summary),
            )
        )
    found += [
        Drawing(
            "constants",
            "The constants of the bounds",
            "All measured along the runs; median over the twin pairs, bars from the smallest to the largest. T0 = "
            f"2κ²L/(ξμ√n), μ the mass: look for the constant that moves with {'the mass' if along == 'mass' else 'n'}. "
            "With λ_max(H) fixed, a falling ξ is a worsening condition number of the kernel. "
            + (
                "T0 itself needs ½‖y − a‖². "
                if another
                else "The last panel is what comes of it: T0 over 2L√n, which no divergence can exceed. "
            )
            + "Each panel spans a decade at least.",
            lambda: constants_figure(summary),
        ),
        Drawing(
            "waterfall",
            "What each inequality costs",
            "From the measurement (1, top) to the paper's bound: each bar is one step of the chain, from value/measured of "
            "the bound before it to its own, means of the logarithm over the pairs (so the steps of one n add up), the number "
            "the factor at the largest n. "
            + ("Path" if another else "Rows T3 to T1, T0 undo one inequality of the proof each; path")
            + ", T5 and T4 need the trained twin. A hatched bar runs backwards: T5 below the path (contraction explains "
            "something)"
            + ("" if another else " or T3 below T4 (which covers the drift of the kernel)")
            + ". Bottom: the worst sample alone, for the bounds that speak of it. A step "
            "without a bar is infinite (ξ = 0) or 1. Look for the longest bars: there the chain loses most.",
            lambda: waterfall_figure(summary),
        ),
        Drawing(
            "ratios",
            f"Bound over measured by mass, n = {n}",
            f"n = {n}; medians over the twin pairs; the black line at 1 is the measurement, and a curve below it "
            "would be a bound that these runs break. Bounds on the stack, then on single samples: at the replaced "
            "sample k (T5 and the path length are the largest over the samples, so they bound it too) and at the "
            "others (T5 over those alone). Last panel: the divergence at the worst held-out point over that at the "
            f"replaced sample, bars from the smallest to the largest pair. {NO_BOUND} "
            "Look at which bounds come nearer to 1 as the mass falls.",
            lambda: ratios_figure(summary),
        ),
        Drawing(
            "confinement",
            "Where the influence of the replaced sample goes",
            "Measured divergence against mass, a line per n, medians over the twin pairs with bars from the "
            "smallest to the largest (lines of different n are set a little apart). "
            + mass_words(frames)
            + equal_loss_words(frames)
            + "If a small mass confined the influence, the middle and the right column would both fall to the left.",
            lambda: confinement_figure(summary, frames.trajectories),
        ),
    ]
    if not frames.spectra.empty:
        found.append(
            Drawing(
                "spectrum",
                "Spectrum of H along training",
                "Quantiles of the eigenvalues of H of the run on S, medians over the seeds, at the smallest and the "
                "largest n. ξ, the one number that T0 takes from this spectrum, is its lower edge over the whole "
                "run. Look at how far that edge lies below the median eigenvalue, and whether the spectrum moves: if "
                "it does, the kernel drifts.",
                lambda: spectrum_figure(frames.spectra, summary),
            )
        )
    return found


def mass_words(frames: Frames) -> str:
    """What a small mass means: under the metric it tends to Gauss-Newton, under plain gradient descent it only
    rescales time."""
    if frames.config.get("optimizer") == "sgd" or frames.config.get("scale") == "none":
        return "Without a pulled-back metric the mass only rescales the step: 1/mass. "
    return "Small mass: close to Gauss–Newton; large mass: close to gradient descent. "


def equal_loss_words(frames: Frames) -> str:
    """The second reading of the confinement figure, with its level and the steps at which it is taken."""
    level, rows = equal_loss(frames.trajectories)
    if rows.empty:
        return "Supremum over training. "
    steps = rows.groupby("mass")["step"].median().sort_index(ascending=False)
    at = ", ".join(f"{number(float(step))} at mass {mass:g}" for mass, step in steps.items())
    below = int(rows["starts_below"].sum())
    start = (
        f"; {plural(below, 'pair')} start at or below it and {'is' if below == 1 else 'are'} read there"
        if below
        else ""
    )
    return (
        f"Top row: supremum over training. Bottom row: where the training loss of the run on S comes down to "
        f"{number(level)}, the lowest level that every run reaches, interpolated between two steps linearly in "
        f"log(training loss) (median step {at}{start}). "
    )


def draw_figures(frames: Frames, folder: Path, suffix: str = "") -> Iterator[tuple[Drawing, list[Path]]]:
    """Draw everything into `folder` as .svg, .pdf and .png; yields each drawing with its files."""
    for drawing in drawings(frames):
        yield drawing, save_figure(drawing.make(), folder / f"{drawing.name}{suffix}")
