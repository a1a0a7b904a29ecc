"""Assumptions of one's own beside those of theorem 3: in the catalogue they are measured, limited and reported alike."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stability.assumptions.catalogue import CATALOGUE, KEY_OF, SYSTEMS, Spec, check_limit
from stability.assumptions.verdict import Assumption

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stability.twins import TwinResult

PLACES = ("replaced", "layer", "sample", "step")
_MEASURES: dict[str, Callable] = {}


@dataclass(frozen=True)
class Seen:
    """What an assumption is measured on: copies of the model at θ₀ and of the data of S, the step and its metric.

    ``twins`` is the run of S and its twins (:class:`stability.TwinResult`); None where it stopped, or where the loss is not
    the squared one. ``metric``: mass, output_metric, scale, blocks.
    """

    model: "nn.Module"
    x: "Tensor"
    targets: "Tensor"
    lr: float
    metric: Mapping = field(default_factory=dict)
    twins: "TwinResult | None" = None


def add_assumption(spec: Spec) -> Callable[[Callable], Callable]:
    """Decorator: add an assumption to the catalogue, measured by the function below it.

    The function takes a :class:`Seen` and returns the value, or (value, place) with a place of replaced, layer, sample, step.
    The value is held against the limit: at most it where ``spec.below``, above it otherwise; NaN is *undecided*. From then on
    ``check_assumptions``, its ``limits`` and ``skip``, ``each_assumption`` and baselines know it, in this process: ``stability
    check`` in a shell does not. :func:`remove_assumption` takes it out again.

    Raises TypeError for anything but a :class:`Spec`, ValueError for a key or a name that is taken (by an assumption of NAIM
    or of movements too) and for a limit that is no finite number ≥ 0.

    >>> @add_assumption(Spec("light", "light weights", "max|θ|", "–", 1.0, True, "No weight is large at θ₀."))
    ... def light(seen):
    ...     return max(p.abs().max().item() for p in seen.model.parameters())
    >>> import stability, torch
    >>> model = torch.nn.Linear(2, 1).double()
    >>> _ = model.weight.data.fill_(3.0)
    >>> report = stability.check_assumptions(model, (torch.eye(2).double(), torch.ones(2, 1).double()), steps=2,
    ...     replacements=[stability.Replacement(0, torch.ones(2).double(), torch.zeros(1).double())])
    >>> report["light"].verdict, report["light"].value, report["light"].margin
    ('violated', 3.0, -2.0)
    >>> remove_assumption("light")
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"add_assumption takes a Spec, got {type(spec).__name__}")
    taken = (*CATALOGUE, *SYSTEMS, *KEY_OF)  # a key that is another's name would be found under either
    if spec.key in taken or spec.name in taken:
        raise ValueError(f"there is an assumption {spec.key!r} or {spec.name!r} already")
    check_limit(spec.key, spec.limit)

    def add(measure: Callable[[Seen], object]) -> Callable[[Seen], object]:
        CATALOGUE[spec.key], KEY_OF[spec.name], _MEASURES[spec.key] = spec, spec.key, measure
        return measure

    return add


def remove_assumption(key: str) -> None:
    """Take out an assumption that :func:`add_assumption` put in. Raises ValueError for any other."""
    if key not in _MEASURES:
        raise ValueError(
            f"{key!r} was not added by add_assumption" + (f"; added: {', '.join(_MEASURES)}" * bool(_MEASURES))
        )
    del _MEASURES[key], KEY_OF[CATALOGUE.pop(key).name]


def own_verdicts(seen: Seen, limits: Mapping[str, float], skip: frozenset[str]) -> list[Assumption]:
    """The verdicts of every assumption that was added. Raises TypeError where one returns no number, or no such place."""
    return [
        _verdict(CATALOGUE[key], measure(seen), limits[key]) for key, measure in _MEASURES.items() if key not in skip
    ]


def _verdict(spec: Spec, found, limit: float) -> Assumption:
    value, place = found if isinstance(found, tuple) else (found, {})
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"assumption {spec.key} must return a number, or (number, place); got {found!r}") from None
    if not isinstance(place, Mapping) or not set(place) <= set(PLACES):
        raise TypeError(f"the place of assumption {spec.key} has {', '.join(PLACES)}; got {place!r}")
    margin = limit - value if spec.below else value - limit
    if math.isnan(value):
        verdict, reason = "undecided", "it could not be measured here"
    elif value <= limit if spec.below else value > limit:
        verdict, reason = "holds", spec.meaning
    else:
        verdict, reason = "violated", f"not so: {spec.meaning}"
    return Assumption(spec.name, spec.quantity, value, limit, margin, verdict, reason, spec.equation, **place)
