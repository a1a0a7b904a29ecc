"""Figures of minimizing movements: tracking error against inner budgets, and measured against allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from studies.figures.style import PAGE, log_limits, log_y, new_figure, only_ticks, series_style, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ORDER = ("SGD", "SGD, momentum", "Adam", "Gauss–Newton")
BUDGETS = {"iterations": "inner iterations of each outer step", "seconds": "CPU seconds of each outer step"}


def look(solver: str) -> dict:
    """The line of a solver, the same in every figure; Gauss–Newton is the darkest."""
    return series_style(ORDER.index(solver), len(ORDER)) if solver in ORDER else {"color": "0.5"}


@styled
def budget_figure(summary: pd.DataFrame) -> Figure:
    """Tracking error as a share of the way against iterations (left) and seconds (right), a row for each problem."""
    from studies.experiments.movements import tuned

    best = tuned(summary)
    problems = list(dict.fromkeys(summary["problem"]))
    figure = new_figure(PAGE, 2.3 * len(problems) + 0.3)
    axes = figure.subplots(len(problems), 2, squeeze=False, sharey="row")
    for row, problem in zip(axes, problems, strict=True):
        own = best[(best["problem"] == problem) & best["budget"].isin(BUDGETS)]
        limits = log_limits(own["tracking"])
        for ax, (budget, label) in zip(row, BUDGETS.items(), strict=True):
            rows = own[own["budget"] == budget]
            for solver in [name for name in ORDER if name in set(rows["solver"])]:
                by = rows[rows["solver"] == solver].groupby("per_step")["tracking"]
                mean, low, high = by.mean(), by.min(), by.max()
                ax.errorbar(
                    mean.index, mean, yerr=[mean - low, high - mean], label=solver, elinewidth=0.6, **look(solver)
                )
            ax.set_xscale("log")
            only_ticks(ax.xaxis, sorted(rows["per_step"].unique()))
            log_y(ax, *limits)
            ax.set_title(problem, loc="left")
            ax.set_xlabel(label)
        row[0].set_ylabel("largest tracking error,\nshare of the way")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


@styled
def bound_figure(steps: pd.DataFrame) -> Figure:
    """‖u^k − ū^k‖ and Σ q^{k−1−j}δ_j along the outer steps, a panel for each problem; each solver's best learning rate."""
    problems = list(dict.fromkeys(steps["problem"]))
    figure = new_figure(PAGE, 2.6)
    axes = figure.subplots(1, len(problems), squeeze=False)[0]
    first = steps[steps["seed"] == steps["seed"].min()]
    for ax, problem in zip(axes, problems, strict=True):
        own = first[first["problem"] == problem]
        for solver in [name for name in ORDER if name in set(own["solver"])]:
            rows = own[own["solver"] == solver]
            rate = rows.groupby("lr")["tracking"].max().idxmin()
            rows = rows[rows["lr"] == rate].sort_values("step")
            style = look(solver)
            ax.plot(
                rows["step"], rows["tracking_bound"], color=style["color"], linestyle=style["linestyle"], label=solver
            )
            ax.plot(rows["step"], rows["tracking"], linestyle="none", marker=style["marker"], color=style["color"])
        log_y(ax, *log_limits([*own["tracking"], *own["tracking_bound"]]))
        ax.set_xticks(sorted(own["step"].unique()))
        ax.set_xlabel("outer step k")
        ax.set_title(problem, loc="left")
    axes[0].set_ylabel("share of the way;\npoints measured, lines allowed")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure
