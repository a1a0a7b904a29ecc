"""A latent-diffusion testbed on digits: the noise-prediction network trained by minimizing movements, solvers compared."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from studies.definition.config import Grid, Study
from studies.definition.fields import Count, Positive, one_or_more
from studies.definition.kinds import Kind, Section, TableSpec
from studies.definition.points import Point

if TYPE_CHECKING:
    import pandas as pd


class DiffusionGrid(Grid):
    """Every solver under every kind of budget."""

    solver: Annotated[list[Literal["Gauss–Newton", "SGD, momentum", "Adam"]], *one_or_more] = Field(
        ["Gauss–Newton", "SGD, momentum", "Adam"]
    )
    budget: Annotated[list[Literal["iterations", "seconds"]], *one_or_more] = Field(["iterations", "seconds"])


class DiffusionStudy(Study):
    """The keys of ``kind = "diffusion"``."""

    AXES: ClassVar[tuple[str, ...]] = ("solver", "budget")

    kind: str = "diffusion"
    iterations: Count = 5
    seconds: Positive = 0.3
    rounds: Count = 30
    size: Count = 150
    latent: Annotated[int, Field(ge=1, le=64)] = 6
    width: Count = 64
    tau: Positive = 1.0
    images: Annotated[int, Field(ge=300, le=1797)] = 1000
    grid: DiffusionGrid = DiffusionGrid()


def run_point(study: DiffusionStudy, point: Point) -> dict[str, "pd.DataFrame"]:
    from studies.experiments.diffusion import movement_tables

    at = study.at(point)
    tables = movement_tables(
        point.solver,
        point.seed,
        budget=point.budget,
        per_step=at.iterations if point.budget == "iterations" else at.seconds,
        rounds=at.rounds,
        size=at.size,
        latent=at.latent,
        width=at.width,
        tau=at.tau,
        images=at.images,
        dtype=at.dtype,
        device=at.device,
    )
    return study.keyed(point, tables)


def work(study: DiffusionStudy, point: Point) -> float:
    """In seconds, roughly: the autoencoder, and the budget of all rounds for every learning rate."""
    at = study.at(point)
    rates = 1 if point.solver == "Gauss–Newton" else 3
    each = at.seconds if point.budget == "seconds" else at.iterations * (0.1 if rates == 1 else 1e-3)
    return 3 + rates * at.rounds * each


def sections(frames) -> list[Section]:
    from studies.experiments.clock import seconds_of
    from studies.figures.diffusion import rounds_figure, samples_figure

    return [
        Section(
            "rounds",
            "Noise-prediction loss along the rounds",
            "Mean squared error of the predicted noise on held-out latents (1 is the prediction 0), round by round, and how "
            "far each round ended from its exact proximal point, as a share of the exact step; means over seeds, bands least "
            "to largest. First-order solvers at the best of three learning rates. Look at whether a "
            "smaller δ (below) comes with a smaller loss (above).",
            lambda: rounds_figure(frames),
        ),
        Section(
            "samples",
            "Samples",
            "Top: held-out digits and their reconstructions, the most that the decoder can show. Below: samples of the "
            f"network trained under each solver, equal {seconds_of(frames.config)} seconds, first seed. Look at "
            "which rows hold digits that could stand in the top one.",
            lambda: samples_figure(frames),
        ),
    ]


def finding(frames) -> list[str]:
    from studies.findings.diffusion import best
    from studies.findings.written import number

    said = []
    for budget, rows in best(frames).groupby("budget"):
        parts = [
            f"{solver} {number(own['loss'].mean())} (energy distance {number(own['energy_distance'].mean())}, "
            f"δ {number(own['inexactness'].mean())} of the step)"
            for solver, own in rows.groupby("solver")
        ]
        said.append(f"Held-out loss at equal {budget}: " + "; ".join(parts) + ".")
    floor = frames.summary["floor"].mean()
    said.append(f"The energy distance of real training latents to the same held-out latents is {number(floor)}.")
    return said


def numbers(frames) -> "list[tuple[str, pd.DataFrame]]":
    from studies.findings.diffusion import best

    table = best(frames).groupby(["budget", "solver"], as_index=False)
    table = table.agg(
        lr=("lr", "first"),
        loss=("loss", "mean"),
        least=("loss", "min"),
        largest=("loss", "max"),
        inexactness=("inexactness", "mean"),
        energy_distance=("energy_distance", "mean"),
        iterations=("iterations", "mean"),
        seconds=("seconds", "mean"),
    )
    return [("Held-out noise-prediction loss, inexactness and energy distance, means over seeds", table)]


DIFFUSION = Kind(
    name="diffusion",
    what="a noise-prediction network in the latent space of digits, trained by movements under equal budgets",
    config=DiffusionStudy,
    tables={
        "summary": TableSpec(("lr",), ("loss", "inexactness", "energy_distance")),
        "rounds": TableSpec(("lr", "round"), ("loss", "inexactness")),
        "samples": TableSpec(("lr", "source", "image"), ("pixel_0",)),
    },
    run_point=run_point,
    work=work,
    sections=sections,
    finding=finding,
    numbers=numbers,
)
