"""Every bound and the measurement against n, with the exponents: what grows, what falls, what is above trivial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.lines import LINES, MEASURED, PER_SAMPLE, STACKED, ink, label_lines, legend_of_kinds
from studies.figures.style import PANELS, UNIT, log_limits, log_y, n_axis, new_figure, note_title, styled, width_for
from studies.findings.applicable import another_loss, loss_note, stated, why_missing
from studies.findings.exponents import Exponent, fit_exponent
from studies.findings.written import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPONENTS = (
    "T0",
    "T1",
    "T1c",
    "T2",
    "T3",
    "T2H",
    "T3H",
    "T4",
    "path_l2",
    "measured_l2",
    "T5",
    "path_sup",
    "measured_sup",
    "measured_others",
)
"""What an exponent is fitted for, stacked norms first, then per sample."""
NAMES = {
    "measured_l2": "measured ‖e‖",
    "path_l2": "path of ‖e‖",
    "T5": "T5, per sample",
    "path_sup": "path, per sample",
    "measured_sup": "measured max|eᵢ|",
    "measured_others": "measured, i ≠ k",
}


def masses_of(frame: pd.DataFrame) -> list[float]:
    """Masses of a study, from heavy (close to plain gradient descent) to light (close to Gauss-Newton)."""
    return sorted((float(mass) for mass in frame["mass"].unique()), reverse=True)


def shown_masses(frame: pd.DataFrame) -> list[float]:
    """The masses of a figure with a panel per mass: all of them, or three, the ends among them.

    >>> import pandas as pd
    >>> shown_masses(pd.DataFrame({"mass": [0.1, 0.01, 1.0, 10.0, 3.0]}))
    [10.0, 1.0, 0.01]
    """
    masses = masses_of(frame)
    picks = np.linspace(0, len(masses) - 1, min(PANELS, len(masses))).round().astype(int)
    return [masses[i] for i in picks]


def medians_over_n(rows: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """n, median over the pairs, and the n left out because some pair is infinite there (no statement is made)."""
    grouped = rows.groupby("n")[column]
    medians = grouped.median()
    finite = grouped.apply(lambda values: bool(np.isfinite(values).all()))
    shown = medians[finite & (medians > 0)]
    return shown.index.to_numpy(float), shown.to_numpy(float), [int(n) for n in finite.index[~finite]]


@styled
def draw_bounds_vs_n(ax: Axes, rows: pd.DataFrame, columns: Sequence[str] = STACKED) -> Axes:
    """Medians over the twin pairs of one mass against n, log-log. Infinite bounds are left out and named in the panel.

    The measured line carries a band from the smallest to the largest pair.
    """
    ns = sorted(rows["n"].unique())
    left_out: dict[tuple, list[str]] = {}
    for column in stated(rows, columns):
        x, y, infinite = medians_over_n(rows, column)
        line = LINES[column]
        if infinite:
            left_out.setdefault((why_missing(rows[column]), *infinite), []).append(line.label)
        if not x.size:
            continue
        ax.plot(x, y, **line.style())
        if line.kind == MEASURED:
            spread = rows[rows["n"].isin(x)].groupby("n")[column].agg(["min", "max"])
            ax.fill_between(x, spread["min"], spread["max"], color="0.6", alpha=0.35, linewidth=0)
    log_y(ax, *log_limits(rows[stated(rows, columns)].to_numpy().ravel()))
    ax.set_ylabel(f"divergence of the twins\n[{UNIT}]")
    n_axis(ax, ns)
    for (why, *at), names in left_out.items():
        note = f"{', '.join(names)} not applicable\nat n = {', '.join(map(str, at))} ({why})"
        ax.set_xlabel(f"{ax.get_xlabel()}\n{note}")
    return ax


@styled
def note_above(ax: Axes, rows: pd.DataFrame, column: str) -> Axes:
    """Say where a bound is that lies far above the panel: on one axis with T0 the rest would be a single line."""
    line = LINES[column]
    if another_loss(rows):
        ax.set_title(f"{line.label} not applicable: it needs ½‖y − a‖²", fontsize=6.5, color=ink(line.color))
        return ax
    n, medians, infinite = medians_over_n(rows, column)
    said = [f"{number(medians[0])} at n = {n[0]:g}"] if n.size else []
    said += [f"{number(medians[-1])} at n = {n[-1]:g}"] if n.size > 1 else []
    text = f"↑ {line.label}: " + ",\n".join(said) if said else f"{line.label} not applicable"
    if infinite:
        text += f"\n(none at n = {', '.join(map(str, infinite))}: ξ = 0)"
    ax.set_title(text, fontsize=6.5, color=ink(line.color), loc="center")
    return ax


@styled
def draw_exponents(ax: Axes, fits: dict[str, Exponent], limits: tuple[float, float] | None = None) -> Axes:
    """Exponents of n as points with their intervals, one row each, the numbers beside them.

    Dotted lines: −½ (T0 where ξ does not depend on n: its 1/√n), −1 (contraction of the parameters: Kozachkov, Wensing
    & Slotine, arXiv 2201.06656), 0 (does not depend on n).
    """
    from matplotlib.ticker import MaxNLocator

    none = not any(fit.fitted for fit in fits.values())
    if none:
        ax.text(
            0.5,
            0.5,
            "no exponent:\nneeds at least three n",
            transform=ax.transAxes,
            ha="center",
            va="center",
            fontsize=6.5,
            style="italic",
        )
    for row, (column, fit) in enumerate(fits.items()):
        style = LINES[column].style() | {"linestyle": "", "label": ""}
        text = str(fit).removesuffix(" (no interval)") if fit.fitted else "not fitted"
        if none:
            continue
        ax.text(1.03, row, text, transform=ax.get_yaxis_transform(), fontsize=6.5, va="center")
        if not fit.fitted:
            continue
        if np.isfinite(fit.low):
            ax.plot([fit.low, fit.high], [row, row], color=style["color"], linewidth=1.2, solid_capstyle="butt")
        ax.plot(fit.slope, row, **style)
    ax.set_ylim(len(fits) - 0.4, -0.6)
    ax.set_yticks(range(len(fits)), [NAMES.get(column, LINES[column].label) for column in fits])
    ax.grid(axis="y", visible=False)
    ax.set_xlim(*(limits or exponent_limits(fits.values())))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for reference in (-1, -0.5, 0):
        ax.axvline(reference, color="0.45", linestyle=":", linewidth=0.8, zorder=0)
    for reference, name, height in ((-1, "−1", 1.01), (-0.5, "−½", 1.06)):  # one above the other: they are close
        where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text(reference, height, name, **where, fontsize=6.5, color="0.3")
    ax.set_xlabel("exponent of n, 95 % interval")
    ax.set_ylabel("fitted quantity")
    return ax


def exponent_limits(fits: Iterable[Exponent]) -> tuple[float, float]:
    """Around all intervals, and around −1 … 1 at least."""
    reach = [value for fit in fits for value in (fit.slope, fit.low, fit.high) if np.isfinite(value)]
    low, high = min([-1.0, *reach]), max([1.0, *reach])
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


@styled
def bounds_figure(summary: pd.DataFrame, *, draws: int = 2000) -> Figure:
    """One column of panels per mass (at most three). Rows: the stacked norm, per sample, fitted exponents.

    `summary` holds one width. Rows share their axis. The lines are named at the right-most panel of a row, and in the legend.
    """
    masses = shown_masses(summary)
    panels = max(len(masses), 1)
    figure = new_figure(width_for(panels), 8.4)
    # Two grids: the numbers beside the exponents would take their width from the panels above.
    above, below = figure.subfigures(2, 1, height_ratios=[2.25, 1.15])
    axes = above.subplots(2, panels, sharey="row", squeeze=False, height_ratios=[1.25, 1])
    below_axes = below.subplots(1, panels, sharey=True, squeeze=False)[0]
    rows = [summary[summary["mass"] == mass] for mass in masses]
    fits = [{name: fit_exponent(these, name, draws=draws) for name in stated(summary, EXPONENTS)} for these in rows]
    limits = exponent_limits(fit for these in fits for fit in these.values())
    for column, (mass, these) in enumerate(zip(masses, rows, strict=True)):
        axes[0, column].set_title(f"mass {mass:g}", fontweight="bold")
        draw_bounds_vs_n(axes[0, column], these, STACKED)
        draw_bounds_vs_n(axes[1, column], these, [name for name in PER_SAMPLE if name != "T0"])
        note_above(axes[1, column], these, "T0")
        draw_exponents(below_axes[column], fits[column], limits)
        below_axes[column].set_title(f"mass {mass:g}", fontweight="bold", pad=20)
    for row, columns in enumerate((STACKED, PER_SAMPLE[1:])):
        for ax in axes[row]:
            log_y(ax, *log_limits(summary[stated(summary, columns)].to_numpy().ravel()))
    if note := loss_note(summary):
        note_title(above, note)
    for ax in figure.axes:
        ax.set_ylabel("")
    axes[0, 0].set_ylabel(f"all training outputs, ‖e‖\n[{UNIT}]")
    axes[1, 0].set_ylabel(f"worst sample, maxᵢ |eᵢ|\n[{UNIT}]")
    seeds = summary["seed"].nunique()
    below_axes[0].set_ylabel(f"fitted over all pairs\n({seeds} {'seed' if seeds == 1 else 'seeds'})")
    legend_of_kinds(figure, stated(summary, (*STACKED, *PER_SAMPLE)))
    figure.draw_without_rendering()
    for ax in axes[:, -1]:
        label_lines(ax)
    return figure
