"""A running mass: D_t = scale·(√v̂_t + ε), v̂ the bias-corrected moving mean of the squared gradient, as Adam's."""

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class SecondMomentMass:
    """``mass=SecondMomentMass()``: one entry of D per parameter entry, D_t = scale·(√v̂_t + ε) with

        v_t = β₂ v_{t−1} + (1 − β₂) g_t²,   v̂_t = v_t/(1 − β₂ᵗ),

    g the ``p.grad`` of the step. At scale="none" without momentum the step is Adam's with β₁ = 0 (Kingma & Ba, arXiv
    1412.6980); with the pulled-back term G = D_t + c·JᵀMJ. ``exp_avg_sq`` and ``step`` are kept in the optimizer's state.

    Raises TypeError for what is no number, ValueError for beta2 outside [0, 1), eps or scale not positive and finite.

    >>> mass = SecondMomentMass(beta2=0.9, eps=1e-3, scale=2.0)
    >>> v, t = mass.advance(None, 0, torch.tensor([3.0]))
    >>> mass.diagonal(v, t)  # the first v̂ is g²
    tensor([6.0020])
    """

    beta2: float = 0.999
    eps: float = 1e-8
    scale: float = 1.0

    def __post_init__(self):
        for name, value in (("beta2", self.beta2), ("eps", self.eps), ("scale", self.scale)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} of a SecondMomentMass must be a number, got {value!r}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 of a SecondMomentMass must be in [0, 1), got {self.beta2!r}")
        for name, value in (("eps", self.eps), ("scale", self.scale)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} of a SecondMomentMass must be positive and finite, got {value!r}")

    def advance(self, v: Tensor | None, step: int, g: Tensor) -> tuple[Tensor, int]:
        """(v_t, t) after the gradient g; v is None before the first."""
        new = (1 - self.beta2) * g.square()
        return (new if v is None else new.add(v.to(g), alpha=self.beta2)), step + 1

    def diagonal(self, v: Tensor, step: int) -> Tensor:
        """D after ``step`` ≥ 1 gradients, of the shape of v."""
        corrected = v / (1 - self.beta2**step)
        return self.scale * (corrected.sqrt() + self.eps)

    def unseen(self, like: Tensor) -> Tensor:
        """D of a parameter that has had no gradient yet, v̂ = 0."""
        return torch.full_like(like, self.scale * self.eps)
