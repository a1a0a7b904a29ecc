"""The metric G of a whole model at one point θ: its products, its norms and its inverse, block by block, in float64."""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor, layer_factors
from nt_kernel.mass import Mass, ParameterMass, RowColumnMass
from nt_kernel.metric.layer_metric import (
    StepSystem,
    check_scale,
    check_solver,
    model_mass,
    push_through,
    resolve_blocks,
    scale_factor,
    solve_metric,
    step_system,
)
from nt_kernel.metric.mean_jacobian import mean_factor
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric


class ModelMetric:
    """G = block diagonal of the G_α = D_α + c·J_αᵀM J_α of a model on the points x, never as a matrix.

    Parameters
    ----------
    model, x, output: as for :func:`nt_kernel.layer_factors`; params: where, {name: tensor} (default: the model's own).
    mass, output_metric, scale, blocks, solver: as for :class:`optim.Woodbury` ("mean-jacobian" included).

    The model runs in its own dtype, everything after it in float64. ``outputs`` [N, C], ``blocks`` {name: factor},
    ``masses``; vectors are dicts by parameter name. One pass of the model with one backward pass per output; the
    inner systems (``systems``) are made when a solve first asks for them, Cholesky of [NC, NC] per block or conjugate
    gradients; a product with G is one J and one Jᵀ, a norm one J.

    Raises ValueError/TypeError for bad arguments, NumericalError when an inner system fails.

    >>> metric = ModelMetric(nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]), mass=1.0)  # G = 1 + 2²
    >>> u = {"weight": torch.tensor([[3.0]], dtype=torch.float64)}
    >>> metric.apply(u)["weight"].item(), metric.squared_norm(u).item(), metric.solve(metric.apply(u))["weight"].item()
    (15.0, 45.0, 3.0)
    """

    def __init__(
        self,
        model: nn.Module,
        x,
        *,
        params: Mapping[str, Tensor] | None = None,
        mass: Mass = 1.0,
        output_metric: "str | OutputMetric | Callable" = "identity",
        scale: str = "mean",
        blocks: str = "layer",
        solver: str = "auto",
        output: Callable | None = None,
    ):
        check_scale(scale)
        check_solver(solver)
        self._metric, self._scale, self._solver = resolve_output_metric(output_metric), scale, solver
        y, factors = layer_factors(model, x, params=params, output=output)
        self.outputs = y.double()
        factors = {name: factor.to(torch.float64) for name, factor in factors.items()}
        self.masses = model_mass(factors, mass)
        self.blocks = resolve_blocks(factors, blocks)

    @cached_property
    def systems(self) -> dict[str, StepSystem]:
        """The inner system of every block (:func:`nt_kernel.metric.layer_metric.step_system`)."""
        y = self.outputs
        return {
            name: step_system(f, len(y), self.masses, self._scale, self._metric, y, solver=self._solver)
            for name, f in self.blocks.items()
        }

    def gradient(self, r: Tensor) -> dict[str, Tensor]:
        """Jᵀr, the gradient of h for r = ∂h/∂y [N, C]."""
        return self._by_name(factor.vjp(r) for factor in self.blocks.values())

    def direction(self, r: Tensor) -> dict[str, Tensor]:
        """G⁻¹Jᵀr, r [N, C], in push-through form: what a step of :class:`optim.Woodbury` goes along."""
        return self._by_name(push_through(f, self.systems[b].dual(r), self.masses) for b, f in self.blocks.items())

    def solve(self, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G⁻¹g for any g by name (general Woodbury form)."""
        return self._by_name(solve_metric(f, self.systems[b], g, self.masses) for b, f in self.blocks.items())

    def apply(self, u: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G u = D u + c·JᵀM J u, the momentum of the velocity u."""
        return self._by_name(self._apply_block(factor, u) for factor in self.blocks.values())

    def root(self, u: Mapping[str, Tensor]) -> Tensor:
        """R u with RᵀR = G as one vector, (√D u, √c·L_yJ u) of every block: norms and angles of G without cancellation.

        It is linear in u, [m + (number of blocks)·N·q].
        """
        pieces = []
        for factor in self.blocks.values():
            own = {name: u[name] for name in factor.shapes}
            pieces += [(v * self._entries(name, v).sqrt()).flatten() for name, v in own.items()]
            if self._scale != "none":
                pieces.append(self._weigh(factor.jvp(own)).flatten())
        return torch.cat(pieces)

    def squared_norm(self, u: Mapping[str, Tensor]) -> Tensor:
        """uᵀG u = uᵀD u + c·‖L_yJ u‖², a sum of squares."""
        return self.root(u).square().sum()

    @cached_property
    def _factor(self) -> Tensor | None:
        """√c·L_y [N, q, C], L̄ [q, C] of "mean-jacobian"; None for the identity."""
        return mean_factor(self._metric, self.outputs) if self._mean else self._metric.factor(self.outputs)

    @property
    def _mean(self) -> bool:
        return self._scale == "mean-jacobian"

    @property
    def _root_c(self) -> float:
        return scale_factor(self._scale, len(self.outputs)) ** 0.5

    def _weigh(self, z: Tensor) -> Tensor:
        """√c·L_y z [N, q] for z = J u [N, C]; L̄ of the mean over the samples, [q], for "mean-jacobian"."""
        if self._mean:
            return self._factor @ z.mean(0)
        z = self._root_c * z
        return z if self._factor is None else (self._factor @ z[..., None])[..., 0]

    def _unweigh(self, w: Tensor) -> Tensor:
        """The transpose of :meth:`_weigh`, [N, C]."""
        if self._mean:
            return (self._factor.mT @ w / len(self.outputs)).expand_as(self.outputs)
        w = self._root_c * w
        return w if self._factor is None else (self._factor.mT @ w[..., None])[..., 0]

    def _apply_block(self, factor: Factor, u: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: u[name] for name in factor.shapes}
        light = {name: v * self._entries(name, v) for name, v in own.items()}
        if self._scale == "none":
            return light
        pulled = factor.vjp(self._unweigh(self._weigh(factor.jvp(own))))
        return {name: light[name] + pulled[name] for name in light}

    def _entries(self, name: str, like: Tensor) -> Tensor:
        return mass_entries(self.masses[name], like)

    def _by_name(self, parts) -> dict[str, Tensor]:
        return {name: value for part in parts for name, value in part.items()}


def mass_entries(mass: ParameterMass, like: Tensor) -> Tensor:
    """The entries of D for one parameter, broadcastable to it, in the dtype and on the device of ``like``.

    >>> mass_entries(2.0, torch.zeros(3)).item()
    2.0
    """
    if isinstance(mass, RowColumnMass):
        mass = mass.full(like.shape)
    return torch.as_tensor(mass, dtype=like.dtype, device=like.device)
