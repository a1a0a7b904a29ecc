"""The check of a step: lr against λ_max of its kernels, block by block and for every kind of update."""

from collections.abc import Mapping

from torch import Tensor

from nt_kernel.factors import Factor
from nt_kernel.mass import Masses, smallest_mass
from nt_kernel.metric.inner import apply_blocks
from nt_kernel.metric.layer_metric import StepSystem, scale_factor
from nt_kernel.metric.output_metric import OutputMetric
from optim.steps.step_limit import checked_rate, joint_rates, lr_limit
from optim.steps.update import Update


def checked_step(
    blocks: Mapping[str, Factor],
    systems: Mapping[str, StepSystem],
    y: Tensor,
    scale: str,
    metric: OutputMetric,
    updates: Mapping[str, Update],
    mass: Masses,
) -> tuple[float, float] | None:
    """(bound on λ_max, the lr it allows) of a step that contracts; None where nothing moves (lr = 0).

    ``updates`` by parameter name, y [..., N, C] (leading dimensions are stacked networks, the worst counts), the rest as
    for :func:`~optim.steps.direction.step_systems`. λ_max is that of Σ weight_α·L_y H_α L_yᵀ, the weights 1 for blocks
    that move as fast as the fastest (:func:`~optim.steps.step_limit.joint_rates`), plus what Riemannian decay adds; lr that
    of the fastest. At scale "mean" λ_max ≤ Σ weight_α ≤ N costs nothing; kernels are formed only where that does not allow
    the step.

    Raises StepTooLargeError, NumericalError for kernels that are not finite.

    >>> import torch
    >>> from nt_kernel import layer_factors
    >>> from nt_kernel.metric.output_metric import resolve_output_metric
    >>> from optim.steps.direction import step_systems
    >>> y, factors = layer_factors(torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))
    >>> identity, mass = resolve_output_metric("identity"), {"weight": 1.0}
    >>> systems = step_systems(factors, y, mass, "none", identity)  # H = 2²
    >>> checked_step(factors, systems, y, "none", identity, {"weight": Update(0.1, momentum=0.5)}, mass)  # lr < 3/4
    (4.0, 0.75)
    """
    n, names = y.shape[-2], {block: list(factor.shapes) for block, factor in blocks.items()}
    # With S = I + c·L K Lᵀ every block L R Lᵀ = (I − S⁻¹)/c ≺ I/c, singular M included; not so for "mean-jacobian".
    c = 0.0 if scale == "mean-jacobian" else scale_factor(scale, n)
    smallest = None
    if any(u.decay == "riemannian" and u.weight_decay for u in updates.values()):
        smallest = {
            block: min(
                (smallest_mass({p: mass[p]}) for p, shape in factor.shapes.items() if shape.numel()),
                default=float("inf"),
            )
            for block, factor in blocks.items()
        }
    rates = joint_rates({block: [updates[p] for p in own] for block, own in names.items()}, smallest)
    if rates is None:
        return None
    weights, options = rates

    def weighed() -> Tensor:
        H = sum(weights[name] * system.expand(system.self_kernel()) for name, system in systems.items()) / n
        L = metric.factor(y)  # at c = 0 the inner systems do without it
        return H if L is None else apply_blocks(L, apply_blocks(L, H).mT)

    largest = checked_rate(bound=sum(weights.values()) / (c * n) if c else float("inf"), matrix=weighed, **options)
    return largest, lr_limit(largest, options["limit"], options["decay"])
