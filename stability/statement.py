"""``statements``: of which kind a result is, what it assumes, whether that holds, and what it costs, for every result here.

A *statement of the paper* and a *bound under assumptions* are worth what their assumptions are; an *a-posteriori enclosure*
always holds and needs the trained twin; an *estimate* is as good as it was measured to be; a *guarantee* holds for the draw it
names; a *certificate* was checked apart from whatever proposed it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stability.recording.rung import (
    ALWAYS,
    APPLIES,
    BOUND,
    ENCLOSURE,
    ESTIMATE,
    FLOW,
    NOT_APPLICABLE,
    STATEMENT,
    THEORY_FREE,
    UNDECIDED,
    worst,
)

GUARANTEE = "guarantee for one draw"
CERTIFICATE = "certificate"
MEASUREMENT = "measurement"
METHODS = {
    "kernel-path": ("Jacobians are those of the S run: first order", "an (np)³ a step and block, O((np)²p) a twin"),
    "parameter-path": ("the twin's inner inverse is the rebuilt one of the S run", "an (np)³ a step and block, a pass a twin"),
    "cg": ("none: the trained twin, to rounding", "one (np)³ a step and block, as many passes a twin as CG takes"),
}  # fmt: skip


@dataclass(frozen=True)
class Statement:
    """What one number of a result is worth: ``status`` "applies", "undecided" or "not applicable", with the ``reason``."""

    name: str
    kind: str
    assumptions: tuple[str, ...]
    cost: str
    status: str = APPLIES
    reason: str = ""


def statements(result) -> tuple[Statement, ...]:
    """The statements that a result of this package makes, one for each of its numbers that is not the same as another.

    Takes a Certificate, TwinResult, Prediction, UniformEstimate, ConformalFactor, Effects (influence, TracIn), OnAverage,
    ContractionMetric, Route or ActionRecord. Raises TypeError for anything else.

    >>> from stability import conformal_factor
    >>> (found,) = statements(conformal_factor([1.0] * 19, [1.0] * 19))
    >>> found.kind, found.status
    ('guarantee for one draw', 'applies')
    """
    name = next(
        (c.__name__ for c in type(result).__mro__ if c.__module__.startswith("stability.") and c.__name__ in TABLE),
        None,
    )
    if name is None:
        raise TypeError(f"statements takes a result of {', '.join(TABLE)}; got {type(result).__name__}")
    return tuple(TABLE[name](result))


def _certificate(result) -> list[Statement]:
    return [
        Statement(
            r.name, r.kind, r.assumptions, f"{r.cost.seconds:.3g} s, {r.cost.nbytes} bytes", r.status, r.reason
        )
        for r in result.rungs.values()
    ]  # fmt: skip


def _twins(result) -> list[Statement]:
    status, reason = worst(result.assumptions)
    cost = "the trained twins: one stacked run, per step a kernel of S and of each twin, (np)³ a block"
    bounds = [
        Statement(name, STATEMENT if name == "T0" else BOUND, FLOW, cost, status, reason)
        for name in ("T0", "T1", "T1c", "T2", "T3")
    ]
    enclosures = [Statement(name, ENCLOSURE, ALWAYS, cost) for name in ("T4", "T5", "T5_l2", "T5_others")]
    paths = [Statement(name, THEORY_FREE, ALWAYS, cost) for name in ("path_l2", "path_sup")]
    return [
        *bounds,
        *enclosures,
        *paths,
        Statement("measured", MEASUREMENT, ("float64 resolves it (null twin)",), cost),
    ]


def _prediction(result) -> list[Statement]:
    assumed, cost = METHODS.get(
        result.method, (f"those of method {result.method!r}", "one run on S and its share of each twin")
    )
    run = "full-batch descent θ ← θ − lr·G⁻¹∇h; its error is measured on trained twins (conformal_factor)"
    return [Statement("predicted", ESTIMATE, (run, assumed), f"one run on S, no twin: {cost}")]


def _uniform(result) -> list[Statement]:
    assumed = ("first order in 1/n along the predicted e", "coverage is that measured on trained twins")
    return [Statement("radii", ESTIMATE, assumed, "one run on S and the predictions of all candidates")]


def _conformal(result) -> list[Statement]:
    enough = result.factor < float("inf")
    assumed = (
        "the further twin is drawn as the calibration twins were (exchangeable)",
        "on average over their draw (marginal)",
    )
    return [
        Statement(
            "factor", GUARANTEE, assumed, f"{result.m} trained calibration twins", APPLIES if enough else NOT_APPLICABLE,
            "" if enough else result.guarantee,
        )
    ]  # fmt: skip


def _effects(result) -> list[Statement]:
    assumed = (
        "first order in the weight 1/n of a sample",
        "damped Gauss–Newton or gradient steps stand for the training",
    )
    return [
        Statement("per_sample", ESTIMATE, assumed, "one run on S (or its end), one kernel solve or a product per step")
    ]


def _on_average(result) -> list[Statement]:
    assumed = ("samples drawn independently from one distribution", "intervals: normal approximation over draws of S")
    return [Statement("gap", ESTIMATE, assumed, f"{result.draws} draws of S, {result.twins} twins each")]


def _metric(result) -> list[Statement]:
    status, reason = (APPLIES, "") if result.feasible else (NOT_APPLICABLE, result.reason)
    cost = f"{result.solves} semidefinite programs" if result.solves else "an eigenvalue check, no semidefinite program"
    return [Statement("rate", CERTIFICATE, (result.assumptions,), cost, status, reason)]


def _route(result) -> list[Statement]:
    status = NOT_APPLICABLE if not result.applicable else UNDECIDED if result.conditional else APPLIES
    named = tuple(a.assumption for a in result.assumptions)
    return [
        Statement(result.route, result.kind, named, result.cost, status, result.reason if status != APPLIES else "")
    ]


def _action(result) -> list[Statement]:
    assumed = ("the velocity of a step is Δθ/lr", "sums over recorded steps stand for the integral")
    return [
        Statement(
            "action", MEASUREMENT, assumed, "per recorded step one metric on x, two products with J and two with Jᵀ"
        )
    ]


TABLE: dict[str, Callable] = {
    "Certificate": _certificate,
    "TwinResult": _twins,
    "Prediction": _prediction,
    "UniformEstimate": _uniform,
    "ConformalFactor": _conformal,
    "Effects": _effects,
    "OnAverage": _on_average,
    "ContractionMetric": _metric,
    "Route": _route,
    "ActionRecord": _action,
}
