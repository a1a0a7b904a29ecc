"""Any optimizer on one data set with its twins: where the loss settles, how thick the residual is, how far twins diverge."""

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from studies.definition.fields import Count, Positive, Table
from studies.definition.kinds import Kind, Section, TableSpec
from studies.definition.points import Point
from studies.definition.training import TrainingStudy
from studies.experiments.optimizers import check_name

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

Nonnegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Rule(Table):
    """``name``: rlo, rlo-lambda (η = 1), rlo-lifted, lion, woodbury, momentum, torch.optim's, or package.module:Class; for the
    RLO family η, Ψ (``memory``), Φ (``direction``), the scale of tanh, global normalisation."""

    name: str = "rlo"
    eta: Annotated[float, Field(gt=0, le=1)] = 0.1
    memory: Literal["gradient", "ema", "lion", "adam"] = "ema"
    direction: Literal["identity", "tanh", "sign", "normalized"] = "tanh"
    scale: Positive = 0.01
    normalize: bool = False
    weight_decay: Nonnegative | None = None  # not given: the class's own (AdamW 0.01)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        check_name(name, {})
        return name


class RloStudy(TrainingStudy):
    """The keys of ``kind = "rlo"``; any of them may be an axis, "rule.eta" = [0.1, 1.0]."""

    kind: str = "rlo"
    rule: Rule = Rule()
    lr: Positive = 0.01
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    batch: Count = 32
    steps: Count = 300
    every: Count = 10
    level: Positive = 0.1
    judge: Literal["loss_tail", "loss_final"] = "loss_tail"


def optimizer_of(study: RloStudy, mass: float, model: "nn.Module") -> "torch.optim.Optimizer":
    """The study's optimizer; Woodbury takes the Gauss–Newton matrix of the loss, its steps unchecked (mini-batches)."""
    from studies.experiments.optimizers import make_optimizer

    rule = study.rule
    options = rule.model_dump(include={"memory", "direction", "scale", "normalize"})
    metric = "cross_entropy" if study.loss == "cross_entropy" else "identity"
    lifted = options | {"eta": rule.eta}
    return make_optimizer(
        rule.name,
        model,
        lr=study.lr,
        shared={} if rule.weight_decay is None else {"weight_decay": rule.weight_decay},
        ours={
            "RLO": lifted,
            "RLOLifted": lifted,
            "RLOLambda": options,
            "Woodbury": {"mass": mass, "output_metric": metric, "check_step": False},
        },
    )


def run_point(study: RloStudy, point: Point) -> dict[str, "pd.DataFrame"]:
    from studies.data.subsets import draw
    from studies.experiments.steady_state import twin_tables

    at = study.at(point)
    tables = twin_tables(
        draw(at, point),
        lambda model: optimizer_of(at, point.mass, model),
        loss=at.loss,
        batch=at.batch,
        steps=at.steps,
        every=at.every,
        seed=point.seed,
        level=at.level,
    )
    return study.keyed(point, tables)


def work(study: RloStudy, point: Point) -> float:
    """Steps of all runs; a Woodbury step costs ten others, a convolution three."""
    at = study.at(point)
    each = (10 if at.rule.name == "woodbury" else 1) * (1 if at.model.architecture == "mlp" else 3)
    return at.steps * (1 + study.grid.replacements) * each


def check(study: RloStudy) -> None:
    """Data with classes, model, every optimizer of the grid made once: what cannot be is an error now, not after an hour."""
    import torch
    from torch import nn

    from studies.data.datasets import load
    from studies.data.subsets import check_data

    check_data(study)
    seen = set()
    for point in study.points():
        at = study.at(point)
        settings = str([(name, value) for name, value in point.values if name not in ("n", "width", "seed")])
        if settings in seen:
            continue
        seen.add(settings)
        if not load(at.data).classes:
            raise ValueError(
                f"data.name = {at.data.name} has numbers as targets; kind = rlo needs classes (whole numbers or words, one a "
                "row), of which it counts those that are right; for regression write kind = loops"
            )
        eta = dict(point.values).get("rule.eta", 1)
        if at.rule.name == "rlo-lambda" and eta != 1:
            raise ValueError(
                f"rule.eta = {eta} is an axis, but rlo-lambda is η = 1 whatever it says; write rule.name = rlo or rlo-lifted"
            )
        optimizer = optimizer_of(at, point.mass, nn.Linear(2, 2, dtype=getattr(torch, at.dtype)))
        if hasattr(optimizer, "close"):
            optimizer.close()


def sections(frames) -> list[Section]:
    from studies.figures.rlo import QUANTITIES, shown, sweep_figure, varying

    names = ", ".join(varying(frames))
    seeds = frames.summary["seed"].nunique()
    quantities, tuned_away = shown(frames)
    bars = "bars 95 % intervals (t distribution)" if seeds > 1 else "no intervals"
    best = "Every setting is shown at its best learning rate, that of the least steady-state loss. "
    return [
        Section(
            "sweep",
            "What the study varies",
            f"Against {names or 'nothing'}: {'; '.join(QUANTITIES[name][0] for name in quantities)}. Means over {seeds} "
            f"{'seeds' if seeds > 1 else 'seed'}, {bars}. {best * tuned_away}"
            "Look for the setting that is low in loss and in divergence at once, and whether the bars are apart. A run that "
            "diverged counts with chance accuracy; it and its twins are left out of losses and divergences.",
            lambda: sweep_figure(frames),
        )
    ]


def finding(frames) -> list[str]:
    """What came out: the setting with the least steady-state loss, the one with the least divergence, and how sure that is."""
    from studies.findings.rlo import at_the_edge, axes_of, means, tuned
    from studies.findings.written import number, setting

    several_rates = "lr" in axes_of(frames)
    table = means(tuned(frames) if several_rates else frames)
    axes = [name for name in axes_of(frames) if name in table and name != "lr"]

    def label(row) -> str:
        return ", ".join(setting(name, row[name]) for name in axes)

    edge = at_the_edge(frames) if several_rates else table.iloc[:0]
    rates = "; ".join(
        f"{label(row)} ({number(row['lr'])})" if axes else number(row["lr"]) for _, row in edge.iterrows()
    )
    warned = [f"At the edge of the learning rates tried: {rates}."] if rates else []
    if not axes or len(table) < 2:
        return [
            f"{len(frames.summary)} twin pairs; steady-state loss {number(table['loss_tail'].iloc[0])}.",
            *warned,
        ]

    said = []
    for name, what, least in (
        ("loss_tail", "Least steady-state loss", True),
        ("held_out", "Best held-out accuracy", False),
        ("held_out_sup", "Most stable on held-out points (least largest twin divergence)", True),
        ("sup_at_level", "Most stable at equal training loss", True),
    ):
        # a mean over the seeds that came through alone would favour the setting of which only the luckiest did
        counted, why = table[name].notna() & (table["diverged"] == 0), "with runs that diverged"
        if name == "held_out":
            counted = table[name].notna()
        elif name == "sup_at_level":
            counted, why = table["reached"] == table["seeds"], "not all of whose seeds reached it"
        elif name == "held_out_sup":
            counted &= table["twin_diverged"] == 0
        rows = table[counted].sort_values(name, ascending=least)
        left_out = "" if counted.all() else f"{(~counted).sum()} of {len(table)} settings left out, {why}"
        if len(rows) < 2:
            said += [f"{what}: no ranking; {left_out}."] if left_out else []
            continue
        first, second = rows.iloc[0], rows.iloc[1]
        said.append(
            f"{what}: {label(first)}, {_with_interval(first, name)}; next {label(second)}, {_with_interval(second, name)} "
            f"({_apart(first, second, name)})" + (f"; {left_out}." if left_out else ".")
        )
    said += warned
    for name, who in (("diverged", "Runs"), ("twin_diverged", "Twins")):
        lost = table[table[name] > 0]
        if len(lost):
            said.append(
                f"{who} that diverged: "
                + "; ".join(f"{label(row)} ({row[name]:.0%})" for _, row in lost.iterrows())
                + "."
            )
    return said


def _with_interval(row, name: str) -> str:
    from studies.findings.written import number

    half = row[f"{name} ±"]
    return number(row[name]) + (f" ± {number(half)}" if np.isfinite(half) else "")


def _apart(first, second, name: str) -> str:
    halves = np.array([row[f"{name} ±"] for row in (first, second)])
    if not np.isfinite(halves).all():
        return "no interval from one seed"
    return "intervals apart" if abs(first[name] - second[name]) > halves.sum() else "intervals overlap"


def numbers(frames) -> "list[tuple[str, pd.DataFrame]]":
    from studies.findings.rlo import means, tuned

    found = [("Mean and half width of the 95 % interval over seeds", means(frames))]
    if "lr" in frames.summary.columns and frames.summary["lr"].nunique() > 1:
        found.insert(0, ("At the learning rate with the least steady-state loss", means(tuned(frames))))
    return found


RLO = Kind(
    name="rlo",
    what="optimizers of the RLO family and others: steady state, velocity residual, divergence of twins",
    config=RloStudy,
    tables={
        "summary": TableSpec(("replaced", "replacement"), ("loss_tail", "held_out", "sup")),
        "trajectories": TableSpec(("replaced", "replacement", "step"), ("loss", "sup")),
    },
    run_point=run_point,
    work=work,
    check=check,
    sections=sections,
    finding=finding,
    numbers=numbers,
)
