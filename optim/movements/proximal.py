"""Exact proximal points P_τ(u) = argmin_v E(v) + ‖v − u‖²/(2τ), and how far any point is from one, without knowing it.

**Derived (certificate).** F(v) = E(v) + ‖v − u‖²/(2τ) is (λ + 1/τ)-convex, so ‖v − P_τ(u)‖ ≤ ‖∇F(v)‖/(λ + 1/τ).
*Proof:* (λ + 1/τ)‖v − P‖² ≤ ⟨∇F(v) − ∇F(P), v − P⟩ = ⟨∇F(v), v − P⟩ ≤ ‖∇F(v)‖‖v − P‖. ∎
"""

import math

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from optim.movements.energy import Energy
from optim.movements.space import inner_product, norm

# ‖v − P‖ ≤ EXACT·max(1, ‖v‖) is what "exact" means where there is no closed form.
EXACT = 1e-12
MOST_STEPS = 200


def certificate(energy: Energy, v: Tensor, centre: Tensor, tau: float) -> float:
    """‖∇F(v)‖/(λ + 1/τ), a bound on ‖v − P_τ(centre)‖.

    >>> from optim.movements.energy import SquaredEnergy
    >>> certificate(SquaredEnergy(torch.zeros(1, 1)), torch.ones(1, 1), torch.ones(1, 1), tau=1.0)  # the point is ½
    0.5
    """
    return norm(energy.gradient(v) + (v - centre) / tau).item() / (energy.convexity + 1 / tau)


def proximal_point(energy: Energy, centre: Tensor, tau: float) -> Tensor:
    """P_τ(centre): closed form where E has one, else by Newton's method with backtracking, certified to ``EXACT``.

    Raises NumericalError where Newton stops short of that (an E whose gradient is not smooth, or known to few digits),
    ValueError where it is E, or ∇E, that is not finite on the way.

    >>> from optim.movements.energy import ConvexEnergy
    >>> E = ConvexEnergy(lambda u: 0.5 * u.square().sum(1), convexity=1.0)
    >>> proximal_point(E, torch.tensor([[2.0]], dtype=torch.float64), tau=1.0)
    tensor([[1.]], dtype=torch.float64)
    """
    if hasattr(energy, "proximal"):
        return energy.proximal(centre, tau)
    return newton(energy, centre, tau)


def newton(energy: Energy, centre: Tensor, tau: float | None) -> Tensor:
    """argmin of E(v) + ‖v − centre‖²/(2τ), from ``centre`` on; ``tau=None``: of E itself, which needs λ > 0.

    A share t of the step s is taken where F falls (Armijo) or where ‖∇F(v + ts)‖ ≤ (1 − 10⁻⁴t)‖∇F(v)‖. The second is descent
    as well, of the certificate: ∇²F s = −∇F, so ‖∇F‖² falls along s at the rate 2‖∇F‖². It is needed where the fall of F is
    below the rounding of its terms, which may be far larger than F. From the first step that only it takes, it alone decides:
    F and ‖∇F‖ by turns could go in circles.
    """
    weight = 0.0 if tau is None else 1 / tau
    modulus = energy.convexity + weight
    what = f"the {'minimum' if tau is None else 'proximal point'} of {energy.name!r}"
    v = centre.clone()
    value, best = _objective(energy, v, centre, weight), float("inf")
    slope = _slope(energy, v, centre, weight)
    stalled, blocked, by_slope = 0, False, False
    for _ in range(MOST_STEPS):
        size = norm(slope).item()
        off = size / modulus
        if not math.isfinite(off):
            raise _no_number(energy, what)
        allowed = EXACT * max(1.0, norm(v).item())
        stalled = 0 if off < best / 2 else stalled + 1
        best = min(best, off)
        if off <= allowed or (stalled > 3 and off <= 100 * allowed):  # rounding of ∇E: no further
            return v
        step = -energy.curvature(v).shifted(weight).solve(slope)
        fall, t, blocked = inner_product(slope, step).item(), 1.0, False
        while t > 1e-12:
            at = v + t * step
            reached = _objective(energy, at, centre, weight)
            if not math.isfinite(reached):
                blocked, t = True, t / 2
                continue
            other = _slope(energy, at, centre, weight)
            falls = reached <= value + 1e-4 * t * fall + 8 * torch.finfo(v.dtype).eps * abs(value)
            if (falls and not by_slope) or norm(other).item() <= (1 - 1e-4 * t) * size:
                by_slope |= not falls
                v, value, slope = at, reached, other
                break
            t /= 2
        else:
            if off <= 100 * allowed:
                return v
            break
    if blocked:
        raise _no_number(energy, what)
    raise NumericalError(f"{what} is known to this distance only", where="Newton's method", value=best)


def minimum(energy: Energy, near: Tensor) -> tuple[Tensor, float] | None:
    """(u*, E*) where it is known: closed form, or by Newton for λ > 0; None for λ = 0 and where Newton gets to no point that
    is certified to ``EXACT`` (a λ far below the rounding of ∇E, a kink at u*)."""
    if getattr(energy, "minimizer", None) is not None:
        return energy.minimizer, float(energy.value(energy.minimizer))
    if not energy.convexity:
        return None
    try:
        u = newton(energy, near, None)
    except (NumericalError, ValueError):
        return None
    return u, float(energy.value(u))


def _no_number(energy: Energy, what: str) -> ValueError:
    return ValueError(f"energy {energy.name!r} or its gradient is not finite on the way to {what}")


def _slope(energy: Energy, v: Tensor, centre: Tensor, weight: float) -> Tensor:
    return energy.gradient(v) + weight * (v - centre)


def _objective(energy: Energy, v: Tensor, centre: Tensor, weight: float) -> float:
    gap = v - centre
    return float(energy.value(v) + weight / 2 * inner_product(gap, gap))
