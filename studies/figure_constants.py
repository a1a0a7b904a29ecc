"""The constants of the bounds against n: which of them makes T0 grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figure_bounds import masses_of
from studies.figure_style import PAGE, log_limits, log_y, n_axis, new_figure, series_style, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONSTANTS = {
    "xi": "ξ: slowest rate, inf $\\lambda_\\mathrm{min}(H)$\n[1/time]",
    "lambda_max": "$\\lambda_\\mathrm{max}(H)$, sup over the run\n[1/time]",
    "h": "h: sup $\\lambda_\\mathrm{max}$ of the diagonal\nblocks of J G⁻¹Jᵀ [1/time]",
    "kappa": "κ: sup ‖∂outputs/∂θ‖ per sample\n[network output / parameter]",
    "L": "L: sup ‖∂loss/∂output‖\n[network-output units]",
    "mu": "μ: smallest mass\n[dimensionless]",
}


@styled
def draw_constant(ax: Axes, summary: pd.DataFrame, column: str) -> Axes:
    """One constant against n, a line per mass: median over the pairs, bars from the smallest to the largest.

    Zeros have no place on a log axis; where ξ is 0 the panel says so.
    """
    masses = masses_of(summary)
    ns = sorted(summary["n"].unique())
    zero: set[int] = set()
    for position, mass in enumerate(masses):
        values = summary[summary["mass"] == mass].groupby("n")[column].agg(["median", "min", "max"])
        zero |= {int(n) for n in values.index[values["min"] <= 0]}
        values = values[values["min"] > 0]
        shift = 1.03 ** (position - (len(masses) - 1) / 2)  # bars of neighbouring masses side by side
        style = series_style(position, len(masses))
        ax.plot(values.index * shift, values["median"], **style, label=f"mass {mass:g}")
        ax.vlines(values.index * shift, values["min"], values["max"], color=style["color"], linewidth=0.8, alpha=0.6)
    low, high = log_limits(summary[column])
    if high / low < 10:  # a decade at least: noise should not look like a trend
        centre = np.sqrt(low * high)
        low, high = centre / np.sqrt(10), centre * np.sqrt(10)
    log_y(ax, low, high)
    n_axis(ax, ns)
    if zero:
        ax.set_xlabel(f"{ax.get_xlabel()}\nnot drawn at n = {', '.join(map(str, sorted(zero)))}, where it is 0")
    ax.set_title(CONSTANTS.get(column, column), fontsize=7.5)
    return ax


@styled
def constants_figure(summary: pd.DataFrame) -> Figure:
    """ξ, λ_max, h, κ, L and μ against n, a line per mass. Measured along the runs."""
    figure = new_figure(PAGE, 4.9)
    axes = figure.subplots(2, 3)
    for ax, column in zip(axes.ravel(), CONSTANTS, strict=True):
        draw_constant(ax, summary, column)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        [f"measured, {name}" for name in names],
        loc="outside lower center",
        ncols=max(len(names), 1),
        handlelength=3.2,
    )
    return figure
