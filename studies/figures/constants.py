"""The constants of the bounds against n, or the mass: which of them makes T0 grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figures.bounds import masses_of
from studies.figures.grid import columns_of
from studies.figures.style import PAGE, log_limits, log_y, n_axis, new_figure, panel, series_style, styled
from studies.findings.applicable import stated
from studies.findings.exponents import compared
from studies.findings.numbers import ratio
from studies.findings.written import axis_label, setting, settings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONSTANTS = {
    "xi": "ξ: slowest rate, inf λₘᵢₙ(H)\n[1/time]",
    "lambda_max": "λₘₐₓ(H), sup over the run\n[1/time]",
    "h": "h: sup λₘₐₓ of the diagonal\nblocks of J G⁻¹Jᵀ [1/time]",
    "kappa": "κ: sup ‖∂outputs/∂θ‖ per sample\n[network output / parameter]",
    "L": "L: sup ‖∂loss/∂output‖\n[network-output units]",
    "T0_over_floor": "T0/(2L√n): the paper's statement\nover the trivial level [no unit]",
}
DASHES = {"-": "", "--": (4, 2), "-.": (5, 1.5, 1.2, 1.5)}
"""Matplotlib's dash names as seaborn takes them."""


@panel
def draw_constant(ax: Axes, summary: pd.DataFrame, column: str, *, along: str = "n") -> Axes:
    """One constant against n, a line per mass: median over the pairs, bars from the smallest to the largest. ``along``
    "mass": against the mass, a line per n.

    Zeros and infinities have no place on a log axis; where a pair has one, its (n, mass) is not drawn and the panel
    says so.
    """
    from seaborn import lineplot

    by, values = lines_of(summary, along)
    names = [setting(by, value) for value in values]
    styles = {name: series_style(position, len(values)) for position, name in enumerate(names)}
    usable = np.isfinite(summary[column]) & (summary[column] > 0)
    whole = usable.groupby([summary[along], summary[by]]).transform("all").astype(bool)
    left_out = sorted(summary.loc[~whole, along].unique())
    shown = summary[whole].assign(name=summary[by].map(dict(zip(values, names, strict=True))))
    if len(shown):
        lineplot(
            shown, x=along, y=column, hue="name", style="name", hue_order=names, style_order=names, ax=ax,
            estimator="median", errorbar=("pi", 100), err_style="bars", err_kws={"elinewidth": 0.9},
            palette={name: style["color"] for name, style in styles.items()},
            markers={name: style["marker"] for name, style in styles.items()},
            dashes={name: DASHES[style["linestyle"]] for name, style in styles.items()},
            legend=False,
        )  # fmt: skip
    low, high = log_limits(summary[column])
    if high / low < 10:  # a decade at least: noise should not look like a trend
        centre = np.sqrt(low * high)
        low, high = centre / np.sqrt(10), centre * np.sqrt(10)
    log_y(ax, low, high)
    n_axis(ax, sorted(summary[along].unique()), axis_label(along))
    ax.set_ylabel(CONSTANTS.get(column, column))
    if not stated(summary, [column]):
        ax.text(
            0.5, 0.5, "not applicable:\nthe loss is not quadratic", transform=ax.transAxes, ha="center", style="italic"
        )
    elif left_out:
        ax.set_xlabel(f"{ax.get_xlabel()}\nnot drawn at {settings(along, left_out)} (ξ = 0)")
    return ax


@styled
def constants_figure(summary: pd.DataFrame, *, along: str | None = None) -> Figure:
    """ξ, λ_max, h, κ, L, measured along the runs, and T0 over its trivial level, against n, a line per mass; against the mass
    where the study has one n (:func:`studies.findings.exponents.compared`), or against ``along``."""
    from matplotlib.lines import Line2D

    along = compared(summary) if along is None else along
    summary = summary.assign(T0_over_floor=ratio(summary, "T0", "vacuity_floor"))
    figure = new_figure(PAGE, 4.9)
    axes = figure.subplots(2, 3)
    for ax, column in zip(axes.ravel(), CONSTANTS, strict=True):
        draw_constant(ax, summary, column, along=along)
        ax.set_title(ax.get_ylabel(), fontsize=7.5)
        ax.set_ylabel("")
    by, values = lines_of(summary, along)
    labels = [f"measured, {setting(by, value)}" for value in values]
    figure.legend(
        [Line2D([], [], **series_style(position, len(values))) for position in range(len(values))],
        labels,
        loc="outside lower center",
        ncols=columns_of(labels),
        handlelength=3.2,
    )
    return figure


def lines_of(summary: pd.DataFrame, along: str) -> tuple[str, list[float]]:
    """What the lines of a panel stand for, and its values: masses, from heavy to light, or n where the axis is the mass."""
    return ("n", sorted(summary["n"].unique())) if along == "mass" else ("mass", masses_of(summary))
