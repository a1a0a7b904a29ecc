"""What steps a run is made of, from a description or from the optimizer itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn  # noqa: F401 (the example uses it)

from nt_kernel.errors import unknown_name
from nt_kernel.mass import Mass
from nt_kernel.metric.output_metric import OutputMetric
from optim.woodbury import Woodbury


@dataclass(frozen=True)
class Steps:
    """θ ← θ − lr·G⁻¹∇h with this metric; scale "none" is gradient descent."""

    lr: float | str = "auto"
    mass: Mass = 1.0
    output_metric: "str | OutputMetric | Callable" = "identity"
    scale: str = "mean"
    blocks: str = "layer"

    @property
    def metric(self) -> dict:
        """The options of the metric alone."""
        return {name: value for name, value in self.__dict__.items() if name != "lr"}

    def described(self) -> dict[str, object]:
        """As plain values, for reports."""
        return {n: v if isinstance(v, int | float | str) else _in_words(v) for n, v in self.__dict__.items()}


def steps_of(optimizer) -> Steps:
    """The steps of None (Woodbury, lr "auto"), a mapping of Woodbury's options, a ``Woodbury`` or a ``torch.optim.SGD``.

    Full-batch steps without momentum or weight decay, one rate and one metric: those are the steps of which theorem 3
    speaks. Raises ValueError for anything beyond them and for unknown options, TypeError for another optimizer.

    >>> steps_of({"lr": 0.1, "scale": "none"}).scale, steps_of(None).lr
    ('none', 'auto')
    >>> steps_of(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)) == Steps(lr=0.1, scale="none")
    True
    """
    if optimizer is None:
        return Steps()
    if isinstance(optimizer, Steps):
        return optimizer
    if isinstance(optimizer, Mapping):
        for name in optimizer:
            if name not in Steps.__dataclass_fields__:
                raise ValueError(unknown_name("option of the optimizer", name, Steps.__dataclass_fields__))
        return Steps(**optimizer)
    if isinstance(optimizer, Woodbury):
        return _of_woodbury(optimizer)
    if type(optimizer) is torch.optim.SGD:
        group = _only_group(optimizer)
        if group.get("maximize"):
            raise ValueError("SGD with maximize=True climbs; the theorem speaks of descent")
        return Steps(lr=float(group["lr"]), scale="none")
    raise TypeError(
        "optimizer must be a dict such as {'lr': 0.1, 'mass': 1.0}, a Woodbury or a torch.optim.SGD; "
        f"got {type(optimizer).__name__}, whose steps are not those of a metric known beforehand"
    )


def _of_woodbury(optimizer: Woodbury) -> Steps:
    group = _only_group(optimizer)
    if optimizer.damping != 1.0:
        raise ValueError(f"damping multiplies the mass: write it into mass; got damping = {optimizer.damping!r}")
    return Steps(float(group["lr"]), optimizer.mass, optimizer.output_metric, optimizer.scale, optimizer.blocks)


def _only_group(optimizer: torch.optim.Optimizer) -> Mapping:
    if len(optimizer.param_groups) > 1:
        raise ValueError(f"one rate for all layers was expected, got {len(optimizer.param_groups)} parameter groups")
    (group,) = optimizer.param_groups
    for name in ("momentum", "weight_decay"):
        if group.get(name):
            raise ValueError(
                f"theorem 3 speaks of gradient flow, and {name} = {group[name]!r} is another dynamics; check with "
                f"{name}=0 (for momentum see stability.momentum_metric)"
            )
    return group


def _in_words(value) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_in_words(v)}" for name, v in value.items()) + "}"
    if isinstance(value, int | float | str):
        return f"{value}"
    return getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__
