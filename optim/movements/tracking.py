r"""What inexact proximal steps are allowed to do: the inequalities of a minimizing movement, as columns. **Derived**.

u^{k+1} is an inexact P(u^k), P = P_τ the exact proximal map of a λ-convex E, δ_k = ‖u^{k+1} − P(u^k)‖; ū^{k+1} = P(ū^k) from
ū⁰ = u⁰; q = 1/(1 + τλ); u* the minimizer, E* the minimum. Then for every k

- tracking       ‖u^k − ū^k‖ ≤ ε_k, ε_0 = 0, ε_{k+1} = q ε_k + δ_k, which is Σ_j q^{k−1−j} δ_j;
- uniform        ε_k ≤ δ(1 − q^k)/(1 − q), δ = max δ_j (kδ where q = 1);
- distance       ‖u^k − u*‖ ≤ q^k‖u⁰ − u*‖ + ε_k, in the limit within the ball of radius δ/(1 − q) = δ(1 + τλ)/(τλ);
- exact path     Σ_{j<k}‖ū^{j+1} − ū^j‖ ≤ B₁ = √(2τk(E(u⁰) − E*)/(2 + τλ)) ≤ B₀/√2, B₀ = √(2τk(E(u⁰) − E*));
- path           Σ_{j<k}‖u^{j+1} − u^j‖ ≤ B₁ + Σ_{j<k}δ_j + Σ_{j<k}ε_j, and with B₀ in the place of B₁.

*Proofs.* P contracts by q: with p = P(u), p' = P(u'), u − u' = p − p' + τ(∇E(p) − ∇E(p')), and the inner product with p − p'
is at least (1 + τλ)‖p − p'‖². Tracking and distance are then :func:`~optim.steps.recursion.scalar_recursion` (P(u*) = u*).
Exact path: E(·) + ‖· − ū‖²/(2τ) is (λ + 1/τ)-convex with minimum at P(ū), so E(ū) ≥ E(P(ū)) + (1/τ + λ/2)‖P(ū) − ū‖²; sum, and
Cauchy & Schwarz. Path: ‖u^{k+1} − u^k‖ ≤ δ_k + ‖(P − I)(u^k)‖ and I − P is nonexpansive (P is firmly so), hence
‖(P − I)(u^k)‖ ≤ ‖(P − I)(ū^k)‖ + ε_k. ∎
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.movements.space import norm
from optim.steps.recursion import scalar_recursion


@dataclass(frozen=True)
class Trajectory:
    """K outer steps in function space: ``outputs`` u^k [K + 1, N, C], ``proximal`` P(u^k) [K, N, C], ``exact`` ū^k [K + 1,
    N, C]; ``drop`` = E(u⁰) − E* (or an upper bound of it); ``minimizer`` u* [N, C] or None; τ and λ."""

    outputs: Tensor
    proximal: Tensor
    exact: Tensor
    drop: float
    tau: float
    convexity: float
    minimizer: Tensor | None = None

    @property
    def rate(self) -> float:
        """q = 1/(1 + τλ)."""
        return 1 / (1 + self.tau * self.convexity)


def ball_radius(delta: float, tau: float, convexity: float) -> float:
    """δ(1 + τλ)/(τλ), ∞ for λ = 0: where an inexact sequence ends up around u*.

    >>> ball_radius(0.1, tau=1.0, convexity=1.0), ball_radius(0.1, tau=1.0, convexity=0.0)
    (0.2, inf)
    """
    return delta * (1 + tau * convexity) / (tau * convexity) if convexity else math.inf


def tracking_columns(run: Trajectory) -> dict[str, Tensor]:
    """Both sides of every inequality after each of the K steps, {name: [K]} in float64; see the module's list.

    delta; tracking ≤ tracking_bound ≤ uniform_bound; distance ≤ distance_bound (nan where u* is unknown), ball; move,
    exact_move; path ≤ path_bound ≤ path_bound_b0, exact_path ≤ budget ≤ budget_b0.

    >>> u = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64).reshape(3, 1, 1)  # E = ½u², τ = 1: P halves
    >>> exact = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64).reshape(3, 1, 1)
    >>> found = tracking_columns(Trajectory(u, u[:2] / 2, exact, 0.5, 1.0, 1.0, torch.zeros(1, 1)))
    >>> found["delta"], found["tracking"], found["tracking_bound"]
    (tensor([0.1000, 0.0000], dtype=torch.float64), tensor([0.1000, 0.0500], dtype=torch.float64),
     tensor([0.1000, 0.0500], dtype=torch.float64))
    """
    u, exact, q = run.outputs.double(), run.exact.double(), run.rate
    K = len(run.proximal)
    k = torch.arange(1, K + 1, dtype=torch.float64, device=u.device)
    delta = norm(u[1:] - run.proximal.double())
    errors = scalar_recursion(0.0, [q] * K, delta.cpu()).to(u.device)  # ε_0 … ε_K
    largest = delta.cummax(0).values
    move, exact_move = norm(u.diff(dim=0)), norm(exact.diff(dim=0))
    drop = max(run.drop, 0.0)
    b0 = (2 * run.tau * k * drop).sqrt()
    budget = b0 / math.sqrt(2 + run.tau * run.convexity)
    extra = delta.cumsum(0) + errors[:-1].cumsum(0)
    nothing = torch.full_like(delta, math.nan)
    columns = {
        "delta": delta,
        "tracking": norm(u[1:] - exact[1:]),
        "tracking_bound": errors[1:],
        "uniform_bound": largest * ((1 - q**k) / (1 - q) if q < 1 else k),
        "distance": nothing,
        "distance_bound": nothing,
        "ball": largest / (1 - q) if q < 1 else torch.full_like(delta, math.inf),
        "move": move,
        "exact_move": exact_move,
        "path": move.cumsum(0),
        "path_bound": budget + extra,
        "path_bound_b0": b0 + extra,
        "exact_path": exact_move.cumsum(0),
        "budget": budget,
        "budget_b0": b0,
    }
    if run.minimizer is not None:
        start = norm(u[0] - run.minimizer)
        columns["distance"] = norm(u[1:] - run.minimizer)
        columns["distance_bound"] = q**k * start + errors[1:]
    return columns
