"""Minimizing movements on nonlinear regression: Gauss–Newton against first-order inner solvers under equal budgets."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from studies.definition.config import Grid, Study
from studies.definition.fields import Count, Positive, one_or_more
from studies.definition.kinds import Kind, Section, TableSpec
from studies.definition.points import Point

if TYPE_CHECKING:
    import pandas as pd

SOLVER = Literal["Gauss–Newton", "SGD", "SGD, momentum", "Adam"]


class MovementGrid(Grid):
    """Every problem with every solver."""

    problem: Annotated[list[Literal["wave", "diabetes"]], *one_or_more] = Field(["wave", "diabetes"])
    solver: Annotated[list[SOLVER], *one_or_more] = Field(["Gauss–Newton", "SGD", "SGD, momentum", "Adam"])


class MovementStudy(Study):
    """The keys of ``kind = "movements"``."""

    AXES: ClassVar[tuple[str, ...]] = ("problem", "solver")

    kind: str = "movements"
    n: Count = 40
    width: Count = 64
    tau: Positive = 0.5
    steps: Count = 6
    iterations: Annotated[list[Count], *one_or_more] = Field([1, 2, 5, 10, 20, 50, 100])
    seconds: Annotated[list[Positive], *one_or_more] = Field([0.03, 0.1, 0.3])
    deltas: Annotated[list[Positive], *one_or_more] = Field([0.1, 0.03, 0.01])
    most: Count = 1000
    widths: Annotated[list[Count], *one_or_more] = Field([8, 64, 512])
    grid: MovementGrid = MovementGrid()


def run_point(study: MovementStudy, point: Point) -> dict[str, "pd.DataFrame"]:
    from studies.experiments import movements
    from studies.experiments.clock import clock_of

    at = study.at(point)
    place = {"dtype": at.dtype, "device": at.device}
    tables = movements.solver_tables(
        lambda: movements.problem(point.problem, at.n, at.width, point.seed, **place),
        point.solver,
        iterations=at.iterations,
        seconds=at.seconds,
        deltas=at.deltas,
        most=at.most,
        tau=at.tau,
        steps=at.steps,
        clock=clock_of(at.device),
    )
    tables |= movements.nondegeneracy(
        problem_of=lambda width: movements.problem(point.problem, at.n, width, point.seed, **place),
        widths=at.widths if point.solver == "Gauss–Newton" else (),
        tau=at.tau,
        steps=at.steps,
    )
    return study.keyed(point, tables)


def check(study: MovementStudy) -> None:
    """Every problem of the grid drawn once: a number of samples that it does not have is an error now."""
    from studies.experiments import movements

    for problem, n, seed in {(p.problem, study.at(p).n, p.seed) for p in study.points()}:
        movements.problem(problem, n, 1, seed)


def work(study: MovementStudy, point: Point) -> float:
    """In seconds, roughly: budgets of time as they are, first-order iterations at 0.4 ms, Gauss–Newton's at 3 ms."""
    at = study.at(point)
    rates = 1 if point.solver == "Gauss–Newton" else 3
    each = 3e-3 if point.solver == "Gauss–Newton" else 4e-4
    return rates * at.steps * (sum(at.seconds) + each * (sum(at.iterations) + at.most * len(at.deltas) / 2))


def sections(frames) -> list[Section]:
    from studies.experiments.clock import seconds_of
    from studies.figures.movements import bound_figure, budget_figure
    from studies.figures.wording import plural

    summary, clock = frames.summary, seconds_of(frames.config)
    return [
        Section(
            "budgets",
            "Distance from the exact sequence under equal budgets",
            "Largest distance to the exact proximal sequence over the outer steps, as a share of the way that "
            "sequence goes "
            f"(mean over {plural(summary['seed'].nunique(), 'seed')}, bars: least and largest). Left: equal inner "
            "iterations a step; "
            f"right: equal {clock} seconds. Learning rates of the first-order solvers are the best of three at every "
            "budget. Look at how far "
            "below the others the second-order line runs.",
            lambda: budget_figure(summary, clock),
        ),
        Section(
            "bounds",
            "Measured and allowed",
            "Tracking error of one run (marks) and its bound Σⱼ q^(k−1−j)·δⱼ (lines) at the largest number of inner "
            "iterations, first seed, as shares of the way. No mark may lie above the line of its solver; look at "
            "how close "
            "they are: there the errors of the steps add up without help from the contraction.",
            lambda: bound_figure(frames.steps),
        ),
    ]


def finding(frames) -> list[str]:
    from studies.experiments.clock import seconds_of
    from studies.experiments.movements import tuned
    from studies.findings.written import number

    best = tuned(frames.summary)
    said = []
    at_iterations = best[best["budget"] == "iterations"]
    most = at_iterations["per_step"].max()
    for problem, rows in at_iterations[at_iterations["per_step"] == most].groupby("problem"):
        mean = rows.groupby("solver")["tracking"].mean()
        if "Gauss–Newton" in mean and len(mean) > 1:
            other = mean.drop("Gauss–Newton")
            said.append(
                f"{problem}: at {most:g} inner iterations a step Gauss–Newton ends {number(mean['Gauss–Newton'])} of "
                "the way "
                f"off the exact sequence, the best first-order solver ({other.idxmin()}) {number(other.min())}."
            )
    timed = best[best["budget"] == "seconds"]
    longest = timed["per_step"].max()
    for problem, rows in timed[timed["per_step"] == longest].groupby("problem"):
        mean = rows.groupby("solver")["tracking"].mean()
        if "Gauss–Newton" in mean and len(mean) > 1:
            other = mean.drop("Gauss–Newton")
            said.append(
                f"{problem}, {longest:g} {seconds_of(frames.config)} seconds a step: {number(mean['Gauss–Newton'])} against "
                f"{number(other.min())} "
                f"({other.idxmin()})."
            )
    failed = frames.summary[frames.summary["violated"] != ""]
    said.append(
        f"Inequalities checked on {len(frames.summary)} runs: {len(failed)} runs violate one."
        + (" " + "; ".join(sorted(set(failed["violated"]))) if len(failed) else "")
    )
    return said


def numbers(frames) -> "list[tuple[str, pd.DataFrame]]":
    from studies.experiments.clock import seconds_of
    from studies.experiments.movements import tuned

    best = tuned(frames.summary)
    reach = best[best["budget"] == "delta"].groupby(["problem", "per_step", "solver"], as_index=False)
    reach = reach.agg(
        lr=("lr", "first"),
        steps_within=("reached", "mean"),
        iterations=("iterations", "median"),
        seconds=("seconds", "median"),
    ).rename(columns={"per_step": "δ, share of the way"})
    clock = seconds_of(frames.config)
    title = (
        f"Inner iterations and {clock} seconds until every outer step is within δ or out of iterations, all steps together: "
        "medians over seeds; steps within δ: means"
    )
    found = [(title, reach)]
    if len(frames.degeneracy):
        table = frames.degeneracy.drop(columns=["solver", "reason"]).rename(columns={"reached": "steps_within"})
        found.append(
            ("Local non-degeneracy and interior localisation along Gauss–Newton runs, with negative controls", table)
        )
        found.append(
            (
                "σ_min(J), σ_max(J), ‖θ^k − θ⁰‖ and ‖J(θ^k) − J(θ⁰)‖ after each outer step: medians over seeds",
                sigma_along(frames.sigma),
            )
        )
    return found


def sigma_along(sigma: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each problem, case and outer step, medians over seeds."""
    by = sigma.groupby(["problem", "case", "step"], as_index=False)
    return by[["sigma_min", "sigma_max", "displacement", "change"]].median()


MOVEMENTS = Kind(
    name="movements",
    what="minimizing movements: inner solvers under equal budgets against the exact proximal sequence",
    config=MovementStudy,
    tables={
        "summary": TableSpec(("budget", "per_step", "lr"), ("tracking", "bound", "reached", "outer_steps", "violated")),
        "steps": TableSpec(("lr", "step"), ("tracking", "tracking_bound")),
        "degeneracy": TableSpec(("case",), ("non-degenerate", "iterates inside", "budget inside")),
        "sigma": TableSpec(("case", "step"), ("sigma_min", "sigma_max")),
    },
    run_point=run_point,
    work=work,
    check=check,
    sections=sections,
    finding=finding,
    numbers=numbers,
)
