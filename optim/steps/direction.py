"""The Woodbury direction G⁻¹∇h as pure functions, for one network or K stacked ones."""

from collections.abc import Callable, Collection, Mapping

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
    solve_metric,
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


def gradient_direction(
    blocks: Mapping[str, Factor],
    inners: Mapping[str, StepSystem],
    r: Tensor,
    gradient: Mapping[str, Tensor | None],
    mass: Masses,
    *,
    exact: Collection[str] = (),
) -> dict[str, Tensor]:
    """G⁻¹g by parameter name for any g: push-through form for its share s·Jᵀr, general form for the rest.

    ``gradient`` is g by full parameter name, None counts as 0. A rest that is rounding is left out, but not for the blocks
    ``exact``, where something small has been added on purpose (:func:`gradient_share`).

    >>> from nt_kernel import layer_factors
    >>> y, factors = layer_factors(nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))  # J = 2, G = 1 + 2²
    >>> identity, masses = resolve_output_metric("identity"), {"weight": 1.0}
    >>> systems = step_systems(factors, y, masses, "mean", identity)
    >>> gradient_direction(factors, systems, torch.tensor([[3.0]]), {"weight": torch.tensor([[10.0]])}, masses)
    {'weight': tensor([[2.]])}
    """
    direction: dict[str, Tensor] = {}
    for name, factor in blocks.items():
        share, rest = gradient_share(factor, r, gradient, exact=name in exact)
        v = inners[name].dual(r)
        direction.update(push_through(factor, v if share == 1 else share * v, mass))
        if rest is not None:
            for p, extra in solve_metric(factor, inners[name], rest, mass).items():
                direction[p] = direction[p] + extra
    return direction


def gradient_share(
    factor: Factor, r: Tensor, gradient: Mapping[str, Tensor | None], *, exact: bool = False
) -> tuple[float, dict[str, Tensor] | None]:
    """(s, g − s·Jᵀr) of one block, s = ⟨g, Jᵀr⟩/‖Jᵀr‖²: 1 after a plain backward, another number after clipping or unscaling.

    So the rest is orthogonal to Jᵀr, nothing large cancels in G⁻¹g = s·G⁻¹Jᵀr + G⁻¹rest, and there is none for a rescaled
    gradient. It is None where it is zero or (unless ``exact``) rounding, ‖g − s·Jᵀr‖ ≤ ε^¾·‖g‖; s within ε^¾ of 1 is 1.
    """
    pulled = factor.vjp(r)
    g = {n: torch.zeros_like(t) if gradient[n] is None else gradient[n].to(t.dtype) for n, t in pulled.items()}
    rounding = torch.finfo(r.dtype).eps ** 0.75
    if not exact and _equal(g, pulled, rounding):
        return 1.0, None
    s, gap, whole, rest = _split(g, pulled, rounding)
    if not 0 < whole < float("inf") or not gap < float("inf"):  # squares that leave the range of float32
        double = ({n: t.double() for n, t in own.items()} for own in (g, pulled))
        s, gap, whole, rest = _split(*double, rounding)
        rest = {n: t.to(r.dtype) for n, t in rest.items()}
    return s, None if gap <= (0.0 if exact else rounding**2 * whole) else rest


def _equal(g: Mapping[str, Tensor], pulled: Mapping[str, Tensor], rounding: float) -> bool:
    """True where g = Jᵀr up to rounding, as after a plain backward: at half the price of :func:`_split`."""
    gap = sum(_dot(rest, rest) for rest in (g[n] - t for n, t in pulled.items()))
    whole = sum(_dot(t, t) for t in g.values())
    gap, whole = torch.stack([gap, whole]).tolist()
    return 0 < whole < float("inf") and gap <= rounding**2 * whole


def _split(
    g: Mapping[str, Tensor], pulled: Mapping[str, Tensor], rounding: float
) -> tuple[float, float, float, dict[str, Tensor]]:
    """(s, ‖g − s·Jᵀr‖², ‖g‖², g − s·Jᵀr); one synchronisation with the device."""
    along, size = (sum(_dot(own[n], t) for n, t in pulled.items()) for own in (g, pulled))
    s = torch.where(size > 0, along / size, 1.0)
    s = torch.where((s - 1).abs() <= rounding, 1.0, s)
    rest = {n: torch.addcmul(g[n], t, s, value=-1) for n, t in pulled.items()}
    gap, whole = (sum(_dot(t, t) for t in own.values()) for own in (rest, g))
    return *torch.stack([s, gap, whole]).tolist(), rest


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


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
