"""Figures of minimizing movements: tracking error against inner budgets, and measured against allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from studies.figures.style import (
    PAGE,
    log_limits,
    log_y,
    n_axis,
    new_figure,
    panel,
    series_style,
    styled,
    whole_steps,
    width_for,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("SGD", "SGD, momentum", "Adam", "Gauss–Newton")
BUDGETS = {"iterations": "inner iterations of each outer step", "seconds": "{clock} time of each outer step [s]"}


def look(solver: str) -> dict:
    """The line of a solver, the same in every figure; Gauss–Newton is the darkest."""
    return series_style(ORDER.index(solver), len(ORDER)) if solver in ORDER else {"color": "0.5"}


@panel
def draw_budget(ax: Axes, summary: pd.DataFrame, problem: str, budget: str, clock: str = "CPU") -> Axes:
    """Largest tracking error of one problem, as a share of the way, against a budget (``iterations`` or ``seconds``).

    ``clock``: what the seconds are, "CPU" or "wall". A line per solver at its best learning rate: means over seeds, bars
    from the least to the largest.
    """
    from studies.experiments.movements import tuned

    best = tuned(summary)
    own = best[(best["problem"] == problem) & best["budget"].isin(BUDGETS)]
    rows = own[own["budget"] == budget]
    for solver in solvers_of(rows):
        by = rows[rows["solver"] == solver].groupby("per_step")["tracking"]
        mean, low, high = by.mean(), by.min(), by.max()
        ax.errorbar(mean.index, mean, yerr=[mean - low, high - mean], label=solver, elinewidth=0.6, **look(solver))
    if len(rows):
        n_axis(ax, sorted(rows["per_step"].unique()), BUDGETS[budget].format(clock=clock), margin=1.3)
    log_y(ax, *log_limits(own["tracking"]))  # of both budgets: the two panels of a problem compare
    ax.set_ylabel("largest tracking error,\nshare of the way [no unit]")
    return ax


@panel
def draw_bound(ax: Axes, steps: pd.DataFrame, problem: str) -> Axes:
    """‖u^k − ū^k‖ (marks) and Σ q^(k−1−j)·δⱼ (lines) of one problem along the outer steps, as shares of the way; the
    first seed, each solver at its best learning rate."""
    own = steps[(steps["seed"] == steps["seed"].min()) & (steps["problem"] == problem)]
    for solver in solvers_of(own):
        rows = own[own["solver"] == solver]
        rate = rows.groupby("lr")["tracking"].max().idxmin()
        rows = rows[rows["lr"] == rate].sort_values("step")
        style = look(solver)
        ax.plot(rows["step"], rows["tracking_bound"], color=style["color"], linestyle=style["linestyle"], label=solver)
        ax.plot(rows["step"], rows["tracking"], **style | {"linestyle": "none"})
    log_y(ax, *log_limits([*own["tracking"], *own["tracking_bound"]]))
    whole_steps(ax)
    ax.set_xlabel("outer step k")
    ax.set_ylabel("share of the way [no unit]:\nmarks measured, lines allowed")
    return ax


def solvers_of(frame: pd.DataFrame) -> list[str]:
    """The solvers of a frame, in the order in which they are drawn."""
    return [name for name in ORDER if name in set(frame["solver"])]


def solver_legend(figure: Figure, solvers: list[str]) -> None:
    """Dash and marker of each solver, under the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look(solver)) for solver in solvers]
    figure.legend(handles, solvers, loc="outside lower center", ncols=len(solvers), handlelength=3.2)


@styled
def budget_figure(summary: pd.DataFrame, clock: str = "CPU") -> Figure:
    """Tracking error as a share of the way against iterations (left) and ``clock`` seconds (right), a row for each problem."""
    problems = list(dict.fromkeys(summary["problem"]))
    figure = new_figure(PAGE, 2.3 * len(problems) + 0.3)
    axes = figure.subplots(len(problems), 2, squeeze=False, sharey="row")
    for row, problem in zip(axes, problems, strict=True):
        for ax, budget in zip(row, BUDGETS, strict=True):
            draw_budget(ax, summary, problem, budget, clock)
            ax.set_title(problem, loc="left")
        row[1].set_ylabel("")
    solver_legend(figure, solvers_of(summary))
    return figure


@styled
def bound_figure(steps: pd.DataFrame) -> Figure:
    """Measured and allowed tracking error along the outer steps, a panel for each problem."""
    problems = list(dict.fromkeys(steps["problem"]))
    figure = new_figure(width_for(len(problems)), 2.6)
    axes = figure.subplots(1, len(problems), squeeze=False)[0]
    for ax, problem in zip(axes, problems, strict=True):
        draw_bound(ax, steps, problem)
        ax.set_title(problem, loc="left")
        if ax is not axes[0]:
            ax.set_ylabel("")
    solver_legend(figure, solvers_of(steps))
    return figure
