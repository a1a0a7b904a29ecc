"""One step of an optimizer as a linear recursion with a memory of one step: what its closed loop A_t is made of.

    v⁺ = βv + γu,   θ⁺ = (1 − Ω)θ − ℓ(ηu + ζv⁺),   u = ±P(g + Wθ),

ℓ the learning rate, Ω decoupled and W coupled weight decay, P = G⁻¹ with G = D + c·JᵀMJ (c = 0: P = D⁻¹, a diagonal). The
readers (``torch_rules``, ``own_rules``) say what these are for an optimizer after its step. **Derived** in docs/recording.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

HEAVIEST = 1e30  # the mass of what does not move


@dataclass(frozen=True)
class Metric:
    """P = G⁻¹ but for the masses, which go with the snapshots: options of :func:`nt_kernel.generalized_ntk`."""

    output_metric: object = "identity"
    scale: str = "none"
    blocks: str = "layer"
    shares: Mapping[str, float] = field(default_factory=dict)  # lr of a layer over ℓ, where they differ


@dataclass(frozen=True)
class StepRule:
    """The coefficients of a step. ``known`` False: nothing is known of it, A_t = I; ``note`` says why.

    ``exact``: for a model linear in θ and a quadratic loss A_t leaves w_t = 0 between two runs on the same data.
    ``fresh``: the buffer v was empty before the step. ``still``: u has derivative zero (a sign): no force.
    """

    name: str
    lr: float = 0.0
    beta: float = 0.0
    gamma: float = 1.0
    eta: float = 0.0
    zeta: float = 1.0
    decay: Mapping[str, float] | float = 0.0  # Ω = lr·(decoupled weight decay), by parameter name where not uniform
    pull: Mapping[str, float] | float = 0.0  # W
    metric: Metric = Metric()
    sign: float = 1.0
    fresh: bool = True
    still: bool = False
    known: bool = True
    exact: bool = False
    note: str = ""

    @property
    def force_rate(self) -> float:
        """ℓ(η + ζγ), by which −B_t enters e_{t+1}."""
        return self.lr * (self.eta + self.zeta * self.gamma)

    def carried(self, before: "StepRule | None") -> float:
        """κ_t = ℓ_tζ_tβ_t/(ℓ_{t−1}ζ_{t−1}), the share of the last move that is made again; 0 where v was empty."""
        if self.beta == 0 or self.fresh or before is None or not before.known or before.lr * before.zeta == 0:
            return 0.0
        return self.lr * self.zeta * self.beta / (before.lr * before.zeta)


@dataclass(frozen=True)
class Held:
    """A parameter in an optimizer: its name, itself, its group and its state after the step, the numbers in it before."""

    name: str
    p: Tensor
    group: dict
    state: Mapping
    before: Mapping[str, float | None]

    @property
    def was_fresh(self) -> bool:
        """True where no step has left anything before this one."""
        return not self.before


def unknown(name: str, why: str) -> tuple[StepRule, dict]:
    """A_t = I."""
    return StepRule(name, known=False, note=f"A_t = I (path length): {why}"), {}


def same(held: Sequence[Held], key, what: str):
    """The value of ``key(h)`` that all parameters share; raises LookupError naming ``what`` where they do not."""
    first, *rest = (key(h) for h in held)
    if any(other != first for other in rest):
        raise LookupError(f"its parameter groups differ in {what}")
    return first


def agree(held: Sequence[Held], *keys: str) -> dict:
    """The group of the first parameter; raises LookupError, naming it, for a key in which the others differ."""
    for key in keys:
        same(held, partial(_entry, key), key)
    return held[0].group


def _entry(key: str, h: Held):
    return h.group.get(key)


def uniform(values: Mapping[str, float]) -> Mapping[str, float] | float:
    """One number where all are equal.

    >>> uniform({"a": 0.5, "b": 0.5}), uniform({"a": 0.5, "b": 0.0})
    (0.5, {'a': 0.5, 'b': 0.0})
    """
    found = set(values.values())
    return found.pop() if len(found) == 1 else dict(values)


def number(value) -> float:
    """A hyperparameter that may be a tensor, as a float."""
    return value.item() if isinstance(value, Tensor) else float(value)


def rates(held: Sequence[Held]) -> tuple[float, dict[str, float]]:
    """ℓ, the lr of the first group, and lr/ℓ of every parameter (all 0 where ℓ is)."""
    lr = number(held[0].group["lr"])
    return lr, {h.name: number(h.group["lr"]) / lr if lr else 0.0 for h in held}


def inverse_mass(P: Tensor | float) -> Tensor | float:
    """D = P⁻¹ for the diagonal P ≥ 0 of a step; what P does not move is very heavy.

    >>> inverse_mass(torch.tensor([2.0, 0.0]))
    tensor([5.0000e-01, 1.0000e+30], dtype=torch.float64)
    """
    if isinstance(P, Tensor):
        return torch.where(P > 1 / HEAVIEST, 1 / P.double().clamp_min(1 / HEAVIEST), HEAVIEST)
    return 1 / P if P > 1 / HEAVIEST else HEAVIEST
