"""The Woodbury direction G⁻¹∇h as pure functions, for one network or K stacked ones."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor, stacked_layer_factors
from nt_kernel.mass import Mass, Masses
from nt_kernel.metric.inner import InnerSystem, inner_system
from nt_kernel.metric.layer_metric import (
    StepSystem,
    check_scale,
    check_solver,
    model_mass,
    push_through,
    resolve_blocks,
    step_system,
)
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric


def inner_systems(
    blocks: Mapping[str, Factor], y: Tensor, mass: Masses, c: float, metric: OutputMetric
) -> dict[str, InnerSystem]:
    """The inner system of every metric block by Cholesky, y [..., N, C]: for kernels, and steps alike."""
    return {name: inner_system(f, y.shape[-2], mass, c, metric, y)[0] for name, f in blocks.items()}


def step_systems(
    blocks: Mapping[str, Factor], y: Tensor, mass: Masses, scale: str, metric: OutputMetric, solver: str = "auto"
) -> dict[str, StepSystem]:
    """What solves the step of every metric block (:func:`nt_kernel.metric.layer_metric.step_system`), y [..., N, C]."""
    return {name: step_system(f, y.shape[-2], mass, scale, metric, y, solver=solver) for name, f in blocks.items()}


def woodbury_direction(
    blocks: Mapping[str, Factor], inners: Mapping[str, StepSystem], r: Tensor, mass: Masses
) -> dict[str, Tensor]:
    """G⁻¹Jᵀr = D⁻¹Jᵀ[r − c·L_yᵀS⁻¹L_y K r] by parameter name, r = ∂h/∂y [..., N, C] (push-through form).

    Leading dimensions are stacked networks. Pehle & Slotine, arXiv 2603.03610, algorithm 1.
    """
    out: dict[str, Tensor] = {}
    for name, factor in blocks.items():
        out.update(push_through(factor, inners[name].dual(r), mass))
    return out


def woodbury_step(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,
    output_gradient: Callable[[Tensor], Tensor],
    *,
    lr: float,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    solver: str = "auto",
) -> dict[str, Tensor]:
    """θ − lr·G⁻¹∇h for K stacked networks, each with its own metric; pure.

    Parameters
    ----------
    model: the architecture; params: {name: [K, …]}; x: [K, N, …], each network's own inputs.
    output_gradient: y [K, N, C] → ∂h/∂y [K, N, C]; for h = (1/N)Σ ½‖y_i − a_i‖² it is (y − a)/N.
    mass, output_metric, scale, blocks, solver: as for :class:`optim.Woodbury`.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> params = {"weight": torch.tensor([[[0.0]], [[1.0]]])}  # two networks, y = w·a at a = 2, target 2
    >>> x = torch.full((2, 1, 1), 2.0)
    >>> woodbury_step(model, params, x, lambda y: y - 2, lr=1.0)["weight"].flatten().tolist()  # w + 2·2/(1 + 4), fixed point
    [0.800000..., 1.0]
    """
    check_scale(scale)
    check_solver(solver)
    metric = resolve_output_metric(output_metric)
    y, factors = stacked_layer_factors(model, params, x)
    masses = model_mass(factors, mass)
    grouped = resolve_blocks(factors, blocks)
    inners = step_systems(grouped, y, masses, scale, metric, solver)
    direction = woodbury_direction(grouped, inners, output_gradient(y), masses)
    return {name: torch.sub(p, direction[name], alpha=lr) for name, p in params.items()}
