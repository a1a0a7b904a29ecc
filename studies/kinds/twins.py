"""Twins under metric descent: full batches, G = D + c·JᵀMJ, the whole ladder of bounds (``stability.train_twins``)."""

from typing import TYPE_CHECKING, Literal

from pydantic import ValidationInfo, field_validator

from studies.definition.fields import Count
from studies.definition.kinds import Kind, TableSpec
from studies.definition.points import Point
from studies.definition.training import Rate, TrainingStudy

if TYPE_CHECKING:
    import pandas as pd

    from stability import Replacement
    from studies.data.subsets import Draw

# lr = "auto" is half the limit that λ_max(H) ≤ N gives, which holds for the mean-scaled metric with M = I only.
AUTO_LR_NEEDS = {
    "optimizer": ("woodbury",),
    "scale": ("mean",),
    "output_metric": ("identity", "squared", "fisher_gaussian"),
}


class TwinStudy(TrainingStudy):
    """The keys of ``kind = "twins"``. Any other optimizer, mini-batches and losses: ``kind = "loops"``."""

    optimizer: Literal["woodbury", "sgd"] = "woodbury"
    output_metric: Literal[
        "identity",
        "squared",
        "cross_entropy",
        "logistic",
        "fisher_gaussian",
        "fisher_categorical",
        "fisher_bernoulli",
    ] = "identity"
    scale: Literal["mean", "sum", "none"] = "mean"
    loss: Literal["squared", "mse", "cross_entropy", "logistic", "huber"] = "squared"

    lr: Rate = 0.1
    steps: Count = 200

    @field_validator("lr")
    @classmethod
    def _auto_rests_on_a_bound(cls, lr: float | str, info: ValidationInfo) -> float | str:
        chosen = {name: info.data.get(name, valid[0]) for name, valid in AUTO_LR_NEEDS.items()}
        other = [f"{name}={value}" for name, value in chosen.items() if value not in AUTO_LR_NEEDS[name]]
        if lr == "auto" and other and info.data.get("loss") == "squared":  # other losses: train_twins knows
            needed = ", ".join(f"{name}={' or '.join(valid)}" for name, valid in AUTO_LR_NEEDS.items())
            raise ValueError(f"does not go with {', '.join(other)}: it needs {needed}; write a number, such as lr=0.1")
        return lr

    @property
    def metric_scale(self) -> str:
        """The scale c of the pulled-back term; plain gradient descent has none (G = D), whatever ``scale`` says."""
        return "none" if self.optimizer == "sgd" else self.scale

    def fixed(self) -> dict:
        return super().fixed() | {"scale": self.metric_scale}


def twins_of(study: TwinStudy, point: Point) -> "tuple[Draw, list[Replacement]]":
    """What one point trains on: data, model and its replacements (k, z')."""
    import stability
    from studies.data.subsets import draw

    drawn = draw(study.at(point), point)
    replaced = zip(drawn.replaced, drawn.replacement_x, drawn.replacement_targets, strict=True)
    return drawn, [stability.Replacement(index=k, x=x, target=target) for k, x, target in replaced]


def run_point(study: TwinStudy, point: Point) -> dict[str, "pd.DataFrame"]:
    """Train one point's twins and lay the results out as the four tables of a results folder."""
    import stability
    from studies.kinds.twins_tables import as_tables

    drawn, replacements = twins_of(study, point)
    at = study.at(point)
    result = stability.train_twins(
        drawn.model,
        drawn.x,
        drawn.targets,
        replacements,
        held_out=drawn.held_out,
        steps=at.steps,
        lr=at.lr,
        mass=point.mass,
        output_metric=at.output_metric,
        scale=at.metric_scale,
        loss=at.loss,
        null_twin=True,
    )
    return as_tables(study.columns(point), drawn, result)


def work(study: TwinStudy, point: Point) -> int:
    """In hundredths of a small point of 200 steps. Measured: flat below n = 12, cubic (Cholesky factors) beyond 24."""
    return round(100 * (1 + (point.n / 22) ** 3))


def size(study: TwinStudy, point: Point) -> float:
    """Bytes of the Gram matrices and their factors: a few [np, np] for each of the runs and blocks."""
    from studies.data.datasets import outputs_of

    runs, blocks = study.grid.replacements + 2, study.at(point).model.hidden + 1
    return 8.0 * runs * blocks * (point.n * outputs_of(study.at(point).data)) ** 2


def check(study: TwinStudy) -> None:
    from studies.data.subsets import check_data

    check_data(study)


def sections(frames):
    """What the page of bounds has beside its own figures: the study along its width and its further axes."""
    from studies.figures.grid import twin_sections

    return twin_sections(frames)


TWINS = Kind(
    name="twins",
    what="twins under full-batch metric descent, with the ladder of bounds",
    config=TwinStudy,
    tables={
        "summary": TableSpec(("replaced", "replacement"), ("measured_sup", "measured_l2")),
        "trajectories": TableSpec(("replaced", "replacement", "step")),
        "spectra": TableSpec(("step", "quantile"), ("eigenvalue",)),
        "assumptions": TableSpec(("replaced", "replacement"), ("assumption", "verdict")),
    },
    run_point=run_point,
    work=work,
    size=size,
    check=check,
    sections=sections,
)
