"""Ordinary differential equations as Riemannian modules: z(0) and θ in, the states at given times out."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from optim.riemannian.manifold import Manifold
from optim.riemannian.riemannian_module import RiemannianModule

VectorField = Callable[[float, Tensor, Mapping[str, Tensor]], Tensor]  # (t, z [N, …], θ) → ż [N, …]


def rk4(
    field: VectorField, z: Tensor, parameters: Mapping[str, Tensor], times: Sequence[float], max_step: float
) -> Tensor:
    """States [N, T, …] at times[1:] of ż = field(t, z, θ) from z [N, …] at times[0], by the classical Runge–Kutta method.

    Every interval is cut into ⌈(t_{k+1} − t_k)/max_step⌉ equal steps; the error is O(max_step⁴). Differentiable in z and θ,
    exactly so as a function of the steps (no adjoint equation).

    >>> z = rk4(lambda t, z, p: -z, torch.ones(1, 1, dtype=torch.float64), {}, [0.0, 1.0], max_step=0.1)
    >>> abs(z.item() - math.exp(-1)) < 1e-6
    True
    """
    states = []
    for start, end in pairwise(times):
        count = max(1, math.ceil((end - start) / max_step - 1e-9))
        h = (end - start) / count
        for k in range(count):
            t = start + k * h
            k1 = field(t, z, parameters)
            k2 = field(t + h / 2, z + h / 2 * k1, parameters)
            k3 = field(t + h / 2, z + h / 2 * k2, parameters)
            k4 = field(t + h, z + h * k3, parameters)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(z)
    return torch.stack(states, 1)


def ode_module(
    field: VectorField,
    state: Manifold,
    parameters: Mapping[str, Manifold],
    times: Sequence[float],
    *,
    max_step: float,
    outputs: Manifold | None = None,
    name: str = "",
) -> RiemannianModule:
    """The flow of ż = field(t, z, θ), seen at times[1:], as a module: z(times[0]) [N, *state] ↦ [N, T, *state].

    Parameters
    ----------
    field: (t, z [N, *state.shape], {name: point}) → ż; one row per sample, which do not interact.
    times: ascending, the first is where z starts. max_step: of :func:`rk4`.
    outputs: manifold of [T, *state.shape] (default: no metric stated).

    Raises ValueError for times that do not ascend or a step that is not positive.

    >>> grow = ode_module(
    ...     lambda t, z, p: p["rate"] * z, Manifold((1,)), {"rate": Manifold((), 1.0)}, [0.0, 0.5, 1.0], max_step=0.05
    ... )
    >>> z, rate = torch.ones(1, 1, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    >>> grow(z, {"rate": rate}).flatten().exp()[-1]  # exp(e)
    tensor(15.1542, dtype=torch.float64)
    """
    times = [float(t) for t in times]
    if len(times) < 2 or not all(a < b for a, b in pairwise(times)) or math.isinf(times[-1]):
        raise ValueError(f"times must be at least two and ascend, got {times}")
    if not 0 < max_step < math.inf:
        raise ValueError(f"max_step must be positive and finite, got {max_step!r}")
    seen = Manifold((len(times) - 1, *state.shape)) if outputs is None else outputs

    def flow(z: Tensor, point: Mapping[str, Tensor]) -> Tensor:
        return rk4(field, z, point, times, max_step)

    return RiemannianModule(Manifold(state.shape, chart=state.chart), parameters, seen, flow, name)
