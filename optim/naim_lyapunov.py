r"""The Lyapunov function of the pair (θ, z), its descent, and theorem 3.1 of arXiv 2601.22284 with fitted constants.

V = h(θ) − h_* + c‖z‖², h before the move and z = v − d after the lift, c = lr/η. The paper's c is not public; ours makes lr
the coefficient of −‖z‖² as it is of −‖∇h‖², and the cross term ⟨∇h, z⟩ ≤ ½(‖∇h‖² + ‖z‖²) takes half of both.

**Derived (strict descent).** For d = −∇h, ∇h L-Lipschitz, a = lr·L and q = (1 − η)/η,

    V⁺ − V ≤ −lr·(½ − a − 2a²q²)·(‖∇h‖² + ‖z‖²).

*Proof:* h⁺ ≤ h + lr⟨∇h, z − ∇h⟩ + ½lr²L‖v‖²; ‖z⁺‖² ≤ (1 − η)‖z‖² + ((1 − η)²/η)‖Δd‖² by Young's inequality on
(1 − η)²‖z − Δd‖², and ‖Δd‖ ≤ L·lr·‖v‖. With c = lr/η the terms without ‖v‖² are −lr(‖∇h‖² − ⟨∇h, z⟩ + ‖z‖²), at most
−½lr(‖∇h‖² + ‖z‖²), those with it are lr(½a + a²q²)‖v‖², and ‖v‖² ≤ 2(‖∇h‖² + ‖z‖²). ∎
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.lyapunov.rlo_options import check_number
from optim.naim import NaimRecord


def descent_margin(lr: float, eta: float, smoothness: float) -> float:
    """½ − a − 2a²q², a = lr·L, q = (1 − η)/η: V descends strictly where it is positive (sufficient, not necessary).

    Raises TypeError for what is no number, ValueError for lr ≤ 0, η outside (0, 1], L < 0, or one that is not finite.

    >>> descent_margin(0.25, 1.0, 1.0), descent_margin(0.25, 0.5, 1.0)
    (0.25, 0.125)
    """
    check_number("lr", lr, open_below=True)
    check_number("eta", eta, 1, open_below=True, closed_above=True)
    check_number("smoothness", smoothness)
    a, q = lr * smoothness, (1 - eta) / eta
    return 0.5 - a - 2 * (a * q) ** 2


def lyapunov(record: NaimRecord, floor: float = 0.0, c: float | None = None) -> Tensor:
    """V_t = h(θ_t) − ``floor`` + c‖z_t‖², [T]; c = lr/η unless given. ``floor`` is a lower bound of h, h_*.

    Raises ValueError where a loss is missing or below the floor, where η or lr vary and no c is given, for a floor that is
    not finite and c outside [0, ∞), TypeError where they are no numbers.
    """
    check_number("floor", floor, least=-math.inf)
    if c is not None:
        check_number("c", c)
    if not bool(record.loss.isfinite().all()):
        raise ValueError("V needs h at every step: call note_loss(h) of the monitor before each optimizer step")
    if bool((record.loss < floor).any()):
        raise ValueError(
            f"floor must be a lower bound of h, got {floor!r} above a loss of {float(record.loss.min()):.6g}"
        )
    if c is None:
        c = record.constant("lr") / record.constant("eta")
    return record.loss - floor + c * record.residual.square()


@dataclass(frozen=True)
class SteadyState:
    """V_{t+1} ≤ (1 − ρηlr)V_t + c₃‖δ_{t+1}‖² at every step of the fit; hence limsup V ≤ ``value`` = (c₃/(ρηlr))·sup‖δ‖²."""

    rho: float
    c3: float
    rate: float  # ρ·η·lr, in (0, 1]
    forcing: float  # sup‖δ‖²
    value: float
    applicable: bool
    reason: str = ""

    def bound(self, start: float, steps: int) -> Tensor:
        """(1 − rate)ᵗ·start + (1 − (1 − rate)ᵗ)·value, t = 0 … steps: what the fitted inequality says of V_t, [steps + 1]."""
        if not self.applicable:
            raise ValueError(f"theorem 3.1 does not apply to this run: {self.reason}")
        left = (1 - self.rate) ** torch.arange(steps + 1, dtype=torch.float64)
        return left * start + (1 - left) * self.value


def steady_state(V: Tensor, forcing: Tensor, *, eta: float, lr: float) -> SteadyState:
    """Theorem 3.1 with the constants ρ and c₃ that make its bound least on this run; V and ``forcing`` = ‖Δd‖ are [T].

    The assumption is the dissipation inequality V_{t+1} ≤ (1 − r)V_t + c₃‖δ_{t+1}‖². For each r = ρηlr the least c₃ is a
    maximum over steps, c₃/r = max_t (a_t/r + b_t)₊, a = (V⁺ − V)/‖δ‖², b = V/‖δ‖²: convex and piecewise linear in 1/r,
    minimised by bisection; of equally small bounds the one with the largest r. Not applicable where V rises, or stays above
    0, at a step without forcing.

    The constants are fitted: the bound holds on the steps of the fit by construction and is no forecast. Hold it against other
    steps. A run that only descends supports c₃ = 0, "V → 0": fit on runs that have settled.

    Raises ValueError for η outside (0, 1], lr outside (0, ∞), a negative V, fewer than two steps, TypeError for what is no
    number or no tensor.

    >>> V, square = torch.tensor([6.0, 5.0, 6.5]), torch.tensor([0.0, 1.0, 2.0])  # V⁺ = ½V + 2‖δ‖²
    >>> found = steady_state(V, square.sqrt(), eta=0.5, lr=0.1)
    >>> round(found.rate, 6), round(found.c3, 6), round(found.value, 6)
    (0.5, 2.0, 8.0)
    """
    check_number("eta", eta, 1, open_below=True, closed_above=True)
    check_number("lr", lr, open_below=True)
    for name, column in (("V", V), ("forcing", forcing)):
        if not isinstance(column, Tensor):
            raise TypeError(f"{name} must be a tensor [T], got {type(column).__name__}")
    if V.shape != forcing.shape or V.dim() != 1 or len(V) < 2:
        raise ValueError(f"V and forcing must be [T], T ≥ 2, got {tuple(V.shape)} and {tuple(forcing.shape)}")
    if not bool((V >= 0).all() & V.isfinite().all() & forcing[1:].isfinite().all()):
        raise ValueError("V must be nonnegative and, like the forcing after the first step, finite")
    V, step = V.to(torch.float64), forcing[1:].to(torch.float64).square()
    before, change = V[:-1], V[1:] - V[:-1]
    sup = float(step.max())

    free = step == 0  # there r·V ≤ V − V⁺ is asked of r itself
    if bool((free & ((change > 0) | ((change == 0) & (before > 0)))).any()):
        reason = "V does not descend at a step without forcing"
        return SteadyState(math.nan, math.inf, math.nan, sup, math.inf, False, reason)
    held = free & (before > 0)
    least = max(1.0, float((before[held] / -change[held]).max()) if bool(held.any()) else 1.0)
    a, b = change[~free] / step[~free], before[~free] / step[~free]

    def at(s: float) -> tuple[float, float]:
        """(max(f, 0), its slope) at s = 1/r."""
        if not len(a):
            return 0.0, 0.0
        value, where = (a * s + b).max(0)
        return (float(value), float(a[where])) if value > 0 else (0.0, 0.0)

    low = high = least
    while at(high)[1] < 0 and high < 1e15:
        low, high = high, 2 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if at(low)[1] >= 0 or not low < middle < high:
            break
        low, high = (middle, high) if at(middle)[1] < 0 else (low, middle)
    s = low if at(low)[1] >= 0 else high
    f = at(s)[0]
    return SteadyState(1 / (s * eta * lr), f / s, 1 / s, sup, f * sup, True)
