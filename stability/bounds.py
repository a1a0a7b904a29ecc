"""The ladder T0 ≥ T1 ≥ T1c ≥ T2 ≥ T3 on the divergence of twins under gradient flow, and its floor.

All of them speak of the continuous flow with squared loss ℓ = ½‖y − a‖², on the outputs at the inputs of S, and assume
ξ > 0; none covers the drift of the kernel between the twins. Divergences and residuals are in units of the outputs.
"""

import math
from collections.abc import Mapping

from torch import Tensor


def theorem3_bound(kappa: float, L: float, xi: float, mu: float, n: int) -> float:
    """**T0**, theorem 3 of Pehle & Slotine (arXiv 2603.03610, eq. P14): sup_i |y_i − y'_i| ≤ 2κ²L/(ξμ√n).

    κ = sup ‖J_i‖₂, L = sup ‖∇_y ℓ‖₂, ξ = inf λ_min(H), μ the smallest mass; inf where ξ = 0.

    >>> theorem3_bound(kappa=2.0, L=1.0, xi=0.5, mu=1.0, n=4)
    8.0
    """
    return _over(2 * kappa**2 * L, xi * mu * math.sqrt(n))


def metric_bound(h: float, L: float, xi: float, n: int) -> float:
    """**T1** = 2hL/(ξ√n), h = sup_t max_i λ_max(R'_ii) over S ∪ S', R' = J'G'⁻¹J'ᵀ. **Derived**: h ≤ κ²/μ, so T1 ≤ T0."""
    return _over(2 * h * L, xi * math.sqrt(n))


def column_bound(column: float, L: float, xi: float) -> float:
    """**T1c** = 2L·col/ξ, col = sup_t max_{j ∈ {k, k'}} ‖(1/n)J'_S G'⁻¹J'_jᵀ‖₂. **Derived**: col ≤ h/√n, so T1c ≤ T1."""
    return _over(2 * L * column, xi)


def disturbance_bound(disturbance: float, xi: float) -> float:
    """**T2** = sup_t ‖d(t)‖/ξ with the measured disturbance d of eq. P8. **Derived**: ‖d‖ ≤ 2L·col, so T2 ≤ T1c."""
    return _over(disturbance, xi)


def vacuity_floor(L: float, n: int) -> float:
    """2L√n, below which T0 cannot fall. **Derived**: ξ ≤ λ_min(H) ≤ max_i ‖H_ii‖ ≤ κ²/(nμ) gives T0 ≥ 2L√n.

    It is the triangle inequality on the stacked residuals: ‖y − y'‖ ≤ ‖r‖ + ‖r'‖ ≤ 2L√n.
    """
    return 2 * L * math.sqrt(n)


def gronwall_step(E: Tensor, d: Tensor, xi: float, dt: float) -> Tensor:
    """One step of **T3**, sup_t ∫₀ᵗ exp(−∫_sᵗ ξ)‖d(s)‖ds: E⁺ = e^{−x}E + ((1 − e^{−x})/ξ)‖d‖, x = ξΔt.

    ξ and ‖d‖ are those of the left end point of the recorded grid. With ξ = 0 the second factor is Δt. As a convex
    combination of E and ‖d‖/ξ it keeps T3 ≤ T2.

    >>> import torch
    >>> gronwall_step(torch.tensor(1.0), torch.tensor(2.0), xi=0.0, dt=0.5)
    tensor(2.)
    """
    decay = math.exp(-xi * dt)
    gain = -math.expm1(-xi * dt) / xi if xi > 0 else dt
    return decay * E + gain * d


def bound_ladder(constants: Mapping[str, float], n: int, sigma: float = 1.0) -> dict[str, float]:
    """T0, T1, T1c, T2, the floor 2L√n and the trivial level 2L from the constants of one pair of runs.

    ``constants``: ``xi, kappa, L, mu, h, column, disturbance`` (``stability.constants``). T0 to T2 are inf where ξ = 0.
    ``sigma``: of the loss (σ/2)‖y − a‖², L the norm of its gradient; the rate is σξ, the floors are 2L√n/σ and 2L/σ.
    Raises ValueError for a missing, negative or NaN constant.

    >>> ladder = bound_ladder(dict(xi=0.1, kappa=2.0, L=1.0, mu=1.0, h=3.0, column=0.5, disturbance=0.2), n=9)
    >>> [round(ladder[name], 3) for name in ("T0", "T1", "T1c", "T2", "vacuity_floor")]
    [26.667, 20.0, 10.0, 2.0, 6.0]
    """
    for name in ("xi", "kappa", "L", "mu", "h", "column", "disturbance"):
        value = constants.get(name)
        if value is None or not value >= 0:
            raise ValueError(f"constant {name!r} must be a number >= 0, got {value!r}")
    xi, L = sigma * constants["xi"], constants["L"]
    return {
        "T0": theorem3_bound(constants["kappa"], L, xi, constants["mu"], n),
        "T1": metric_bound(constants["h"], L, xi, n),
        "T1c": column_bound(constants["column"], L, xi),
        "T2": disturbance_bound(constants["disturbance"], xi),
        "vacuity_floor": vacuity_floor(L / sigma, n),
        "trivial_sup": 2 * L / sigma,
    }


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf
