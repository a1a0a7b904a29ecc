"""Metric factors and steps of a Riemannian module: G_α = D_α + c·𝒦_αᵀ𝒦_α per parameter manifold, by Woodbury's identity."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nt_kernel.capture.explicit import ExplicitPart
from nt_kernel.errors import NumericalError
from nt_kernel.factors import Factor
from nt_kernel.mass import ParameterMass
from nt_kernel.metric.inner import inner_system
from nt_kernel.metric.layer_metric import push_through, scale_factor, solve_metric
from nt_kernel.metric.output_factor import lift_by_pinv
from nt_kernel.metric.output_metric import resolve_output_metric
from optim.riemannian.manifold import output_metric
from optim.riemannian.metric_recursion import Rows
from optim.riemannian.riemannian_module import RiemannianModule


def metric_factors(
    module: RiemannianModule, x: Tensor, point: Mapping[str, Tensor], output_factor: Tensor | None = None
) -> dict[str, Tensor]:
    """𝒦_α = L_y J_α [N, q, m_α] of every metric block, by the recursion from the outputs backwards.

    Columns are the entries of the block's parameters (``module.blocks``), one after the other. ``output_factor``: L_y
    [N, q, dim N] (default: of the output manifold's metric). No Jacobian of the outputs is formed: the largest arrays are
    [N, q, m_α] and [N, q, dim z].

    Raises ValueError where there is neither an output metric nor L_y, or their shapes do not fit.

    >>> from optim.riemannian.manifold import Manifold
    >>> line, free = Manifold((1,)), Manifold((), 1.0)
    >>> scale = RiemannianModule(line, {"a": free}, line, lambda z, p: p["a"] * z, "up")
    >>> square = RiemannianModule(line, {"b": free}, Manifold((1,), 4.0), lambda z, p: p["b"] * z**2, "down")
    >>> point = {"up.a": torch.tensor(3.0), "down.b": torch.tensor(5.0)}  # y = b(az)², L_y = 2
    >>> metric_factors(scale.sequential(square), torch.tensor([[1.0]]), point)  # 2·2baz², 2·(az)²
    {'up': tensor([[[60.]]]), 'down': tensor([[[18.]]])}
    """
    y, pull_back = module.linearise(x, point)
    L = _output_factor(module, y.detach().reshape(len(y), -1), output_factor)[0]
    rows = pull_back(L)[0]
    return {block: torch.cat([rows[name] for name in names], -1) for block, names in module.blocks.items()}


def riemannian_direction(
    module: RiemannianModule,
    x: Tensor,
    point: Mapping[str, Tensor],
    r: Tensor,
    *,
    scale: str = "mean",
    output_factor: Tensor | None = None,
) -> dict[str, Tensor]:
    """G⁻¹∇h as a tangent vector of Θ, by parameter name, for r = ∂h/∂y [N, *outputs.shape] at θ = ``point``.

    G_α = D_α + c·𝒦_αᵀ𝒦_α with D_α the metric of the parameter manifold at θ and c = 1/N ("mean"), 1 ("sum"), 0 ("none").
    With r = L_yᵀρ + r⊥ the first part takes the push-through form D⁻¹𝒦ᵀS⁻¹ρ, S = I + c·𝒦D⁻¹𝒦ᵀ, the second, where there is
    one, the general Woodbury form. ∇h is the recursion's too: r⊥ rides along as one more row (backpropagation). A D_α that
    is a matrix is taken apart as RRᵀ: then 𝒦R⁻ᵀ has mass 1. The result does not depend on the coordinates in which the
    parameters are given.

    Raises what :func:`metric_factors` raises, and NumericalError where D_α is not positive definite or the outputs are not
    finite.
    """
    y, pull_back = module.linearise(x, point)
    y, r = y.detach().reshape(len(x), -1), r.detach().reshape(len(x), -1)
    if r.shape != y.shape:
        raise ValueError(f"r has {tuple(r.shape)} entries, the outputs {tuple(y.shape)}")
    c = scale_factor(scale, len(x))
    L, rho, rest = _output_factor(module, y, output_factor, r)
    q, more = L.shape[1], bool((rest != 0).any())
    rows = pull_back(torch.cat([L, rest[:, None]], 1) if more else L)[0]
    found: dict[str, Tensor] = {}
    for block, names in module.blocks.items():
        own, roots = _unit_mass(module, {name: rows[name] for name in names}, point)
        masses = {name: _diagonal(module, name, point) for name in names}
        shapes = {name: torch.Size(module.parameters[name].shape) for name in names}
        parts = tuple(ExplicitPart(own[name][:, :q], name, tuple(shapes[name])) for name in names)
        factor = Factor(block, parts, shapes)
        system, _ = inner_system(factor, len(x), masses, c, resolve_output_metric("identity"), rho)
        direction = push_through(factor, system.dual(rho), masses)
        if more:
            g = {name: own[name][:, q].sum(0).reshape(shapes[name]) for name in names}
            direction = {n: v + direction[n] for n, v in solve_metric(factor, system, g, masses).items()}
        for name, v in direction.items():
            if name in roots:
                v = torch.linalg.solve_triangular(roots[name].mT, v.reshape(-1, 1), upper=True).reshape(v.shape)
            found[name] = v
    return found


def riemannian_step(
    module: RiemannianModule, point: Mapping[str, Tensor], direction: Mapping[str, Tensor], lr: float
) -> dict[str, Tensor]:
    """θ moved by −lr·direction along each parameter manifold (``Manifold.retract``), by parameter name.

    >>> from optim.riemannian.manifold import Manifold, positive
    >>> decay = RiemannianModule(Manifold(()), {"k": positive(())}, Manifold(()), lambda t, p: torch.exp(-p["k"] * t))
    >>> riemannian_step(decay, {"k": torch.tensor(2.0)}, {"k": torch.tensor(40.0)}, lr=0.1)["k"] > 0  # 2·exp(−2)
    tensor(True)
    """
    return {name: m.retract(point[name], -lr * direction[name]) for name, m in module.parameters.items()}


def _output_factor(
    module: RiemannianModule, y: Tensor, given: Tensor | None, r: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """L_y [N, q, C], and (ρ, r⊥) of r = L_yᵀρ + r⊥."""
    r = torch.zeros_like(y) if r is None else r
    if given is None:
        metric = output_metric(module.outputs)
        L = metric.factor(y)
        rho, rest = metric.lift(y, L, r)
        if L is None:
            L = torch.eye(y.shape[1], dtype=y.dtype, device=y.device).expand(len(y), -1, -1)
        return L, rho, rest
    if given.dim() != 3 or given.shape[0] != len(y) or given.shape[2] != y.shape[1]:
        raise ValueError(f"L_y has shape {tuple(given.shape)}, expected [N, q, C] with N, C = {tuple(y.shape)}")
    return given, *lift_by_pinv(y, given, r)


def _diagonal(module: RiemannianModule, name: str, point: Mapping[str, Tensor]) -> ParameterMass:
    """The mass of a parameter whose metric is diagonal; 1 where it is a matrix (see :func:`_unit_mass`)."""
    mass = module.parameters[name].mass_at(point[name].detach())
    return 1.0 if _is_matrix(module, name, mass) else mass


def _unit_mass(module: RiemannianModule, rows: Rows, point: Mapping[str, Tensor]) -> tuple[Rows, dict[str, Tensor]]:
    """Rows times R⁻ᵀ and the roots R of D = RRᵀ, for the parameters whose metric is a matrix."""
    out, roots = dict(rows), {}
    for name, row in rows.items():
        D = module.parameters[name].mass_at(point[name].detach())
        if _is_matrix(module, name, D):
            R, info = torch.linalg.cholesky_ex(D)
            pivots = R.diagonal().square()
            if bool(info != 0) or not bool(pivots.min() > 16 * len(D) * torch.finfo(D.dtype).eps * pivots.max()):
                smallest = torch.linalg.eigvalsh(D)[0].item() if bool(D.isfinite().all()) else math.nan
                raise NumericalError(
                    "the metric of the parameter manifold is not positive definite: smallest eigenvalue",
                    where=f"parameter {name!r}",
                    value=smallest,
                )
            roots[name] = R
            out[name] = torch.linalg.solve_triangular(R, row.flatten(0, 1).mT, upper=False).mT.reshape(row.shape)
    return out, roots


def _is_matrix(module: RiemannianModule, name: str, mass) -> bool:
    return isinstance(mass, Tensor) and tuple(mass.shape) != module.parameters[name].shape
