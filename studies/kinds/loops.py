"""Twins under any optimizer, loss, batch size and model: each run is the ordinary training loop, with shared mini-batches.

What is measured needs no theory: the divergence of the outputs, the length of its path, losses and the generalization gap.
Beside them stands T5 (and T4 where it is cheap), the a-posteriori enclosures of ``stability.certify``.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from studies.definition.config_text import nearest
from studies.definition.fields import IMPORTABLE, Count
from studies.definition.kinds import Kind, TableSpec
from studies.definition.points import Point
from studies.definition.training import Rate, TrainingStudy
from studies.experiments.optimizers import check_name

if TYPE_CHECKING:
    import pandas as pd

LOSSES = ("squared", "mse", "cross_entropy", "logistic", "huber")


class LoopStudy(TrainingStudy):
    """The keys of ``kind = "loops"``.

    ``optimizers``: [optimizers.NAME] with a ``class`` (torch.optim's, woodbury, rlo, package.module:Class) and its arguments;
    ``optimizer``: one of those names, or a class with ``lr`` alone. ``batch``: samples of a step, 0 for all.
    """

    optimizers: dict[str, dict[str, Any]] = Field({})
    optimizer: str = "woodbury"
    lr: Rate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    output_metric: str = "identity"
    scale: Annotated[str, Field(pattern=r"^(mean|sum|mean-jacobian|none)$")] = "mean"
    loss: str = "squared"
    batch: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    steps: Count = 200
    enclosures: bool = True

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str, info: ValidationInfo) -> str:
        check_name(name, info.data.get("optimizers", {}))
        return name

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        if name in LOSSES or re.fullmatch(IMPORTABLE, name):
            return name
        guess = nearest(name, LOSSES)
        raise ValueError(
            f"should be one of {', '.join(LOSSES)}, or package.module:function of (y, a) that gives the losses of the samples"
            + (f", did you mean {guess}?" if guess else "")
        )


def run_point(study: LoopStudy, point: Point) -> "dict[str, pd.DataFrame]":
    from studies.kinds.loops_run import run

    return run(study, point)


def check(study: LoopStudy) -> None:
    """Data, model, batches, losses on the targets, and every optimizer of the grid made once: what is wrong is an error now,
    not after an hour."""
    import torch

    from studies.data.datasets import load
    from studies.data.subsets import check_data
    from studies.experiments.training import named_loss
    from studies.kinds.loops_run import optimizer_of

    check_data(study)
    seen = set()
    for point in study.points():
        at = study.at(point)
        check_batch(at.batch, point.n)
        settings = str([(name, value) for name, value in point.values if name not in ("n", "width", "seed")])
        if settings not in seen:
            seen.add(settings)
            targets = torch.tensor(load(at.data).targets, dtype=getattr(torch, at.dtype))
            named_loss(at.loss).encoded(targets, targets.shape[1], name=f"targets of data.name = {at.data.name}")
            optimizer_of(at, point.mass)


def check_batch(batch: int, n: int) -> None:
    if batch > n:
        raise ValueError(f"batch = {batch} is more than the n = {n} samples there are; write batch=0 for all of them")


def work(study: LoopStudy, point: Point) -> int:
    """In hundredths of a small full-batch run; the enclosures grow with the cube of n."""
    return round(study.at(point).steps * (0.2 + 0.5 * (point.n / 22) ** 3 * study.enclosures) / 2) + 1


def size(study: LoopStudy, point: Point) -> float:
    """Bytes of a few [np, np] matrices at a time: A_t and the factor of T5."""
    from studies.data.datasets import outputs_of

    return 48.0 * (point.n * outputs_of(study.at(point).data)) ** 2


def sections(frames):
    from studies.figures.grid import loop_sections

    return loop_sections(frames)


def finding(frames):
    from studies.findings.grid import loop_finding

    return loop_finding(frames)


def numbers(frames):
    from studies.findings.grid import loop_numbers

    return loop_numbers(frames)


PAIR = ("replaced", "replacement")
LOOPS = Kind(
    name="loops",
    what="twins under any optimizer, loss and batch size: divergence, path, enclosure, generalization gap",
    config=LoopStudy,
    tables={
        "summary": TableSpec(PAIR, ("measured_sup", "measured_l2")),
        "trajectories": TableSpec((*PAIR, "step")),
    },
    run_point=run_point,
    work=work,
    size=size,
    check=check,
    sections=sections,
    finding=finding,
    numbers=numbers,
)
