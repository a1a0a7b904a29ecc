"""Damping: a factor that multiplies every mass, fixed, scheduled, or set by how well the quadratic model foretold the loss."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.factors import Factor

RULES = ("nielsen", "marquardt")


@dataclass(frozen=True)
class LevenbergMarquardt:
    """``damping=LevenbergMarquardt()``: a trust region, the damping λ of D_t = λ_t·D set by the ratio ρ of the decrease of h
    to the one foretold by the quadratic model, −gᵀΔ − ½ΔᵀCΔ (:func:`predicted_decrease`).

    A move with ρ > ``accept`` is taken, another is undone and tried again with more damping, ``trials`` moves a step at most
    (each one more call of the closure, which ``step`` needs; D is the same all along). Then

    - rule="nielsen": λ ← λ·max(1/3, 1 − (2ρ − 1)³) after a move that was taken, else λ ← ν·λ with ν = 2, 4, 8, … (Nielsen,
      *Damping parameter in Marquardt's method*, IMM-REP-1999-05);
    - rule="marquardt": λ ← λ·factor where ρ < 1/4, λ/factor where ρ > 3/4 (Marquardt 1963, with Fletcher's thresholds).

    Both keep λ between ``least`` and ``most``. Raises ValueError/TypeError for numbers out of range and unknown rules.

    >>> trust = LevenbergMarquardt(rule="marquardt")
    >>> trust.adjusted(1.0, 2.0, ratio=0.9), trust.adjusted(1.0, 2.0, ratio=0.5), trust.adjusted(1.0, 2.0, ratio=-3.0)
    ((0.1, 2.0), (1.0, 2.0), (10.0, 2.0))
    """

    start: float = 1.0
    rule: str = "nielsen"
    accept: float = 0.0
    factor: float = 10.0
    trials: int = 10
    least: float = 1e-12
    most: float = 1e12

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(unknown_name("rule of LevenbergMarquardt", self.rule, RULES))
        for name in ("start", "accept", "factor", "least", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} of LevenbergMarquardt must be a number, got {value!r}")
        if not 0 < self.least <= self.start <= self.most < float("inf"):
            raise ValueError(
                "LevenbergMarquardt needs 0 < least <= start <= most < ∞, "
                f"got least={self.least!r}, start={self.start!r}, most={self.most!r}"
            )
        if not 0 <= self.accept < 0.25:
            raise ValueError(f"accept of LevenbergMarquardt must be in [0, 1/4), got {self.accept!r}")
        if not 1 < self.factor < float("inf"):
            raise ValueError(f"factor of LevenbergMarquardt must be above 1 and finite, got {self.factor!r}")
        if isinstance(self.trials, bool) or not isinstance(self.trials, int) or self.trials < 1:
            raise ValueError(f"trials of LevenbergMarquardt must be an int of at least 1, got {self.trials!r}")

    def accepts(self, ratio: float) -> bool:
        """True for a move that is taken."""
        return ratio > self.accept

    def adjusted(self, damping: float, growth: float, ratio: float) -> tuple[float, float]:
        """(λ, ν) after a move of this ratio; ν is Nielsen's, 2 at first."""
        if self.rule == "marquardt":
            damping *= self.factor if not ratio >= 0.25 else 1 / self.factor if ratio > 0.75 else 1
        elif self.accepts(ratio):
            damping, growth = damping * max(1 / 3, 1 - (2 * min(ratio, 1.0) - 1) ** 3), 2.0
        else:
            damping, growth = damping * growth, min(2 * growth, self.most)
        return min(max(damping, self.least), self.most), growth


Damping = float | Callable[[int], float] | LevenbergMarquardt


@dataclass(frozen=True)
class Trial:
    """One move of a trust region: the damping it was made with, both decreases, their ratio, and whether it was taken."""

    damping: float
    predicted: float
    actual: float
    ratio: float
    taken: bool


def damping_at(damping: Damping, step: int) -> float:
    """The factor before any ratio is known: the number, the schedule's value at ``step``, or where a trust region starts.

    Raises TypeError or ValueError unless it is a positive, finite number.

    >>> damping_at(0.5, 3), damping_at(lambda step: 1 / (1 + step), 3)
    (0.5, 0.25)
    """
    if isinstance(damping, LevenbergMarquardt):
        return float(damping.start)
    scheduled = callable(damping)
    value = damping(step) if scheduled else damping
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        wanted = "a positive number, a function of the step or LevenbergMarquardt(…)"
        raise TypeError(
            f"damping must be {wanted}" + (f"; at step {step} it is {value!r}" if scheduled else f", got {value!r}")
        )
    if not 0 < value < float("inf"):
        raise ValueError(
            f"damping must be positive and finite, got {value!r}" + (f" at step {step}" if scheduled else "")
        )
    return float(value)


def predicted_decrease(
    factors: Iterable[Factor], L: Tensor | None, g: Mapping[str, Tensor], move: Mapping[str, Tensor], n: int
) -> float:
    """−gᵀΔ − ½ΔᵀCΔ with C = (1/n) Σ_i J_iᵀM_iJ_i of the whole network, the terms between layers included.

    ``factors`` of all layers on n samples; L [n, q, C] is the factor of M, None for I; g and Δ = ``move`` by full parameter
    name, a missing one does not move. ΔᵀCΔ = (1/n)‖L J Δ‖² takes one forward product per layer. With M = ∇²ℓ it is exact
    for a quadratic loss of a model linear in θ.

    >>> from nt_kernel import layer_factors
    >>> y, factors = layer_factors(torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))
    >>> g, move = {"weight": torch.tensor([[3.0]])}, {"weight": torch.tensor([[-0.5]])}
    >>> predicted_decrease(factors.values(), None, g, move, 1)  # 3·.5 − ½(2·.5)²
    1.0
    """
    pushed, slope = 0.0, 0.0
    for factor in factors:
        own = {name: move[name] for name in factor.shapes if name in move}
        if own:
            pushed = pushed + factor.jvp(own).double()
            slope += sum((g[name].double() * u.double()).sum() for name, u in own.items())
    if L is not None and isinstance(pushed, Tensor):
        pushed = (L.to(pushed) @ pushed[..., None])[..., 0]
    curvature = pushed.square().sum() / n if isinstance(pushed, Tensor) else 0.0
    return float(-slope - curvature / 2)


def penalty_increase(params: Mapping[str, Tensor], move: Mapping[str, Tensor], decays: Mapping[str, float]) -> float:
    """By how much Σ ½w‖θ‖² grows along Δ = ``move``, w from ``decays`` by name: Σ w(θᵀΔ + ½‖Δ‖²), without cancellation.

    >>> penalty_increase({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, {"w": 2.0})  # 4² − 3²
    7.0
    """
    total = 0.0
    for name, w in decays.items():
        u = move[name].double()
        total += w * (u * (params[name].double() + u / 2)).sum().item()
    return total


def decrease_ratio(actual: float, predicted: float, rounding: float) -> float:
    """ρ = actual/predicted; −∞ where no decrease was predicted or the new loss is not finite.

    Where the prediction is below the ``rounding`` of the loss there is nothing to compare: 1 unless the loss rose.

    >>> decrease_ratio(0.5, 1.0, 1e-16), decrease_ratio(0.0, 1e-18, 1e-16), decrease_ratio(float("nan"), 1.0, 1e-16)
    (0.5, 1.0, -inf)
    """
    if abs(predicted) <= rounding:
        return 1.0 if actual >= 0 else float("-inf")
    return actual / predicted if predicted > 0 and abs(actual) < float("inf") else float("-inf")
