"""Is the energy what it is said to be? Finite, differentiable, λ-convex: probed at the points that a run goes through."""

import torch
from torch import Tensor

from optim.movements.energy import ConvexEnergy, Energy
from optim.movements.space import inner_product, norm

# λ_min(∇²E) may be below λ by this share of ‖∇²E‖: rounding, not concavity.
SLACK = 1e-9
VALUE_SLACK = 1e-8


def check_energy(energy: Energy, u: Tensor, probes: int = 8, seed: int = 0) -> None:
    """Raise ValueError unless E and ∇E are finite at u and E is λ-convex as far as the probes see; nothing for quadratics.

    The probes: λ_min(∇²E(u)) ≥ λ, exactly at this point, and ⟨∇E(u) − ∇E(v), u − v⟩ ≥ λ‖u − v‖² for v = u + random
    directions of lengths from 10⁻² to 10² times the size of u, and there, on both sides of u, E(v) ≥ E(u) + ⟨∇E(u), v − u⟩ +
    (λ/2)‖v − u‖², which fails where autograd does not see all of E. They find a concave direction at u for certain and one
    elsewhere by chance: convexity itself cannot be certified by points.

    >>> check_energy(ConvexEnergy(lambda u: -u.square().sum()), torch.ones(2, 1, dtype=torch.float64))
    Traceback (most recent call last):
    ...
    ValueError: the energy 'callable' is not convex: λ_min(∇²E) = -4 at these outputs, expected at least 0
    """
    value, gradient = energy.value(u), energy.gradient(u)
    if not bool(value.isfinite() & gradient.isfinite().all()):
        raise ValueError(
            f"the energy {energy.name!r} is not finite at the network's outputs: E = {value.item():.3g}, "
            f"{int((~gradient.isfinite()).sum())} entries of its gradient are not finite"
        )
    if not isinstance(energy, ConvexEnergy):
        return
    check_curvature(energy, u)
    draw = torch.Generator().manual_seed(seed)
    size = max(1.0, norm(u).item())
    for length in torch.logspace(-2, 2, probes).tolist():
        step = torch.randn(u.shape, generator=draw, dtype=u.dtype).to(u.device)
        step = step * (length * size / norm(step))
        other = energy.gradient(u + step)
        if not bool(other.isfinite().all()):  # outside the domain of E: nothing is said there
            continue
        rise, square = inner_product(other - gradient, step).item(), inner_product(step, step).item()
        rounding = SLACK * (norm(other) + norm(gradient)).item() * norm(step).item()
        if rise < energy.convexity * square - rounding:
            raise ValueError(
                f"the energy {energy.name!r} is not {_said(energy)}: ⟨∇E(v) − ∇E(u), v − u⟩ = {rise / square:.3g}·‖v − u‖² at "
                f"‖v − u‖ = {norm(step).item():.3g}, expected at least {energy.convexity:g}·‖v − u‖²"
            )
        for side in (step, -step):
            _check_tangent(energy, u, value, gradient, side)


def _check_tangent(energy: Energy, u: Tensor, value: Tensor, gradient: Tensor, step: Tensor) -> None:
    other = energy.value(u + step)
    linear = inner_product(gradient, step).item()
    least = value.item() + linear + energy.convexity / 2 * inner_product(step, step).item()
    # Differences of E, whose terms may be larger than E is: more room than for gradients.
    terms = abs(value.item()) + abs(other.item()) + (norm(gradient) * (norm(u) + norm(step))).item()
    room = max(VALUE_SLACK, 100 * torch.finfo(other.dtype).eps) * terms
    if bool(other.isfinite()) and other.item() < least - room:
        raise ValueError(
            f"the energy {energy.name!r} is not what its gradient says, or not {_said(energy)}: E(v) = {other.item():.6g} at "
            f"‖v − u‖ = {norm(step).item():.3g}, expected at least E(u) + ⟨∇E(u), v − u⟩ + (λ/2)‖v − u‖² = {least:.6g}; every "
            "part of E has to be an operation of torch on u that autograd follows (no detach(), item() or numpy)"
        )


def check_curvature(energy: Energy, u: Tensor) -> None:
    """Raise ValueError unless λ_min(∇²E(u)) ≥ λ, up to rounding."""
    curvature = energy.curvature(u)
    if not bool(curvature.hessian.isfinite().all()):
        raise ValueError(f"the Hessian of the energy {energy.name!r} is not finite at these outputs")
    smallest = curvature.smallest()
    if smallest < energy.convexity - SLACK * max(1.0, curvature.hessian.abs().max().item()):
        raise ValueError(
            f"the energy {energy.name!r} is not {_said(energy)}: λ_min(∇²E) = {smallest:.3g} at these outputs, expected at "
            f"least {energy.convexity:g}"
        )


def _said(energy: Energy) -> str:
    return f"{energy.convexity:g}-convex" if energy.convexity else "convex"
