"""Every bound and the measurement against what a study varies, n first, with the exponents: what grows, what falls, what is
above trivial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.lines import LINES, MEASURED, PER_SAMPLE, STACKED, ink, known_lines, label_lines, legend_of_kinds
from studies.figures.style import (
    PANELS,
    UNIT,
    log_limits,
    log_y,
    n_axis,
    new_figure,
    note_title,
    panel,
    styled,
    width_for,
)
from studies.figures.wording import plural
from studies.findings.applicable import another_loss, loss_note, stated, why_missing
from studies.findings.exponents import LEAST, Exponent, compared, fit_exponent
from studies.findings.written import axis_label, number, plural_of, setting, settings, short_words

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


def panels_of(summary: pd.DataFrame, along: str) -> list[tuple[str, pd.DataFrame]]:
    """(title, rows) of the panels side by side, three at most: one per mass, or per n where they run along the mass."""
    by = "n" if along == "mass" else "mass"
    values = shown_masses(summary) if by == "mass" else sorted(summary["n"].unique())[-PANELS:]
    return [(setting(by, value), summary[summary[by] == value]) for value in values]


def medians_along(rows: pd.DataFrame, column: str, along: str) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Values of the axis, medians over the pairs, and the values left out because some pair is infinite there (no statement
    is made)."""
    grouped = rows.groupby(along)[column]
    medians = grouped.median()
    finite = grouped.apply(lambda values: bool(np.isfinite(values).all()))
    shown = medians[finite & (medians > 0)]
    return shown.index.to_numpy(float), shown.to_numpy(float), list(finite.index[~finite])


@panel
def draw_bounds(ax: Axes, rows: pd.DataFrame, columns: Sequence[str] = STACKED, *, along: str = "n") -> Axes:
    """Medians over the twin pairs of one mass against n, log-log. Infinite bounds are left out and named in the panel.

    The measured line carries a band from the smallest to the largest pair. ``along``: another axis of numbers than n, such
    as "mass" or "width", for rows that differ in it alone.
    """
    known_lines(columns)
    left_out: dict[tuple, list[str]] = {}
    for column in stated(rows, columns):
        x, y, infinite = medians_along(rows, column, along)
        line = LINES[column]
        if infinite:
            left_out.setdefault((why_missing(rows[column]), *infinite), []).append(line.label)
        if not x.size:
            continue
        ax.plot(x, y, **line.style())
        if line.kind == MEASURED:
            spread = rows[rows[along].isin(x)].groupby(along)[column].agg(["min", "max"])
            ax.fill_between(x, spread["min"], spread["max"], color="0.6", alpha=0.35, linewidth=0)
    log_y(ax, *log_limits(rows[stated(rows, columns)].to_numpy().ravel()))
    ax.set_ylabel(f"divergence of the twins\n[{UNIT}]")
    n_axis(ax, sorted(rows[along].unique()), axis_label(along))
    for (why, *at), names in left_out.items():
        note = f"{', '.join(names)} not applicable\nat {settings(along, at)} ({why})"
        ax.set_xlabel(f"{ax.get_xlabel()}\n{note}")
    return ax


@styled
def note_above(ax: Axes, rows: pd.DataFrame, column: str, along: str = "n") -> Axes:
    """Say where a bound is that lies far above the panel: on one axis with T0 the rest would be a single line."""
    line = LINES[column]
    if another_loss(rows):
        ax.set_title(f"{line.label} not applicable: it needs ½‖y − a‖²", fontsize=6.5, color=ink(line.color))
        return ax
    x, medians, infinite = medians_along(rows, column, along)
    said = [f"{number(medians[0])} at {setting(along, x[0])}"] if x.size else []
    said += [f"{number(medians[-1])} at {setting(along, x[-1])}"] if x.size > 1 else []
    text = f"↑ {line.label}: " + ",\n".join(said) if said else f"{line.label} not applicable"
    if infinite:
        text += f"\n(none at {settings(along, infinite)}: ξ = 0)"
    ax.set_title(text, fontsize=6.5, color=ink(line.color), loc="center")
    return ax


@styled
def draw_exponents(
    ax: Axes, fits: dict[str, Exponent], limits: tuple[float, float] | None = None, *, along: str = "n"
) -> Axes:
    """Exponents of n (or of ``along``) as points with their intervals, one row each, the numbers beside them.

    Dotted lines, for n: −½ (T0 where ξ does not depend on n: its 1/√n), −1 (contraction of the parameters: Kozachkov, Wensing
    & Slotine, arXiv 2201.06656), 0 (does not depend on n). For the mass −1 is T0 where ξ does not depend on it.
    """
    from matplotlib.ticker import MaxNLocator

    none = not any(fit.fitted for fit in fits.values())
    if none:
        ax.text(
            0.5,
            0.5,
            f"no exponent:\nneeds at least three {plural_of(along)}",
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
    # what a theory says of the exponent, its name and height: one above the other, they are close
    theory = {"n": [(-1, "−1", 1.01), (-0.5, "−½", 1.06)], "mass": [(-1, "−1", 1.01)]}.get(along, [])
    for reference in (*(value for value, *_ in theory), 0):
        ax.axvline(reference, color="0.45", linestyle=":", linewidth=0.8, zorder=0)
    for reference, name, height in theory:
        where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text(reference, height, name, **where, fontsize=6.5, color="0.3")
    ax.set_xlabel(f"exponent of {short_words(along)}, 95 % interval")
    ax.set_ylabel("fitted quantity")
    return ax


def exponent_limits(fits: Iterable[Exponent]) -> tuple[float, float]:
    """Around all intervals, and around −1 … 1 at least."""
    reach = [value for fit in fits for value in (fit.slope, fit.low, fit.high) if np.isfinite(value)]
    low, high = min([-1.0, *reach]), max([1.0, *reach])
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


@styled
def bounds_figure(summary: pd.DataFrame, *, along: str | None = None, draws: int = 2000) -> Figure:
    """One column of panels per mass (at most three). Rows: the stacked norm, per sample, fitted exponents where there are any.

    `summary` holds one width. Rows share their axis. The lines are named at the right-most panel of a row, and in the legend.
    ``along``: the axis, :func:`studies.findings.exponents.compared` when not given; along the mass there is a column per n.
    """
    along = compared(summary) if along is None else along
    shown = panels_of(summary, along)
    titles, rows = [title for title, _ in shown], [these for _, these in shown]
    panels = max(len(shown), 1)
    fits = [
        {name: fit_exponent(these, name, along=along, draws=draws) for name in stated(summary, EXPONENTS)}
        for these in rows
    ]
    fitted = any(fit.fitted for these in fits for fit in these.values())
    figure = new_figure(width_for(panels), 8.4 if fitted else 5.8)
    # Two grids: the numbers beside the exponents would take their width from the panels above.
    above, below = figure.subfigures(2, 1, height_ratios=[2.25, 1.15]) if fitted else (figure.subfigures(1, 1), None)
    axes = above.subplots(2, panels, sharey="row", squeeze=False, height_ratios=[1.25, 1])
    for column, (title, these) in enumerate(shown):
        axes[0, column].set_title(title, fontweight="bold")
        draw_bounds(axes[0, column], these, STACKED, along=along)
        draw_bounds(axes[1, column], these, [name for name in PER_SAMPLE if name != "T0"], along=along)
        note_above(axes[1, column], these, "T0", along)
    for row, columns in enumerate((STACKED, PER_SAMPLE[1:])):
        for ax in axes[row]:
            log_y(ax, *log_limits(summary[stated(summary, columns)].to_numpy().ravel()))
    if note := loss_note(summary):
        note_title(above, note)
    if fitted:
        limits = exponent_limits(fit for these in fits for fit in these.values())
        below_axes = below.subplots(1, panels, sharey=True, squeeze=False)[0]
        for ax, title, these in zip(below_axes, titles, fits, strict=True):
            draw_exponents(ax, these, limits, along=along)
            ax.set_title(title, fontweight="bold", pad=20)
    for ax in figure.axes:
        ax.set_ylabel("")
    axes[0, 0].set_ylabel(f"all training outputs, ‖e‖\n[{UNIT}]")
    axes[1, 0].set_ylabel(f"worst sample, maxᵢ |eᵢ|\n[{UNIT}]")
    if fitted:
        seeds = summary["seed"].nunique()
        below_axes[0].set_ylabel(f"fitted over all pairs\n({seeds} {'seed' if seeds == 1 else 'seeds'})")
    legend_of_kinds(figure, stated(summary, (*STACKED, *PER_SAMPLE)))
    figure.draw_without_rendering()
    for ax in axes[:, -1]:
        label_lines(ax)
    return figure


def bounds_words(summary: pd.DataFrame, along: str) -> str:
    """The caption of :func:`bounds_figure`."""
    said = (
        "Medians over the twin pairs; the grey band runs from the smallest to the largest measured pair. Top row: bounds "
        "on all training outputs together, the norm ‖e‖ of the stacked differences. Next row: bounds on the worst single "
        "sample"
    )
    said += (
        "; T0 to T3 and the trivial level need ½‖y − a‖² and are not drawn. T3H and, where its rate is above 0, T2H stand in "
        "their place: bounds of ‖e‖ by way of the metric H⁻¹. "
        if another_loss(summary)
        else "; T0 is stated for it, but lies so far above that its value is written over the panel. A bound above the "
        "dotted trivial level says less than the triangle inequality does. "
    )
    said += (
        "T4, T5 and the path length need the trained twin. Bounds that are infinite (ξ = 0) are not drawn, and the panel says "
        "where. "
    )
    if summary[along].nunique() >= LEAST:
        name = short_words(along)
        said += (
            f"Bottom row: exponents b of q ~ {name}^b with 95 % intervals (bootstrap over "
            f"{plural(summary['seed'].nunique(), 'seed')}, each with all its replaced samples). "
        )
        said += {
            "n": "Dotted lines: −½ is what T0 has where ξ does not depend on n; −1 belongs to contraction of the parameters "
            "(Kozachkov, Wensing & Slotine, arXiv 2201.06656); 0 is no dependence on n. ",
            "mass": "Dotted lines: −1 is what T0 has where ξ does not depend on the mass; 0 is no dependence. ",
        }.get(along, "Dotted line at 0: no dependence. ")
    if along == "n":
        return said + "Look at whether the bounds rise where the measurement falls or stays."
    return said + "Look at whether the bounds move with the measurement, or alone."
