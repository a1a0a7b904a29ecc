"""Continuous time: θ̇ = −G⁻¹∇h with tolerance-controlled steps, so that flow bounds meet the flow they speak of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor, nn

from nt_kernel.capture.probe import split_state
from nt_kernel.errors import NumericalError, unknown_name
from nt_kernel.factors import named_like
from nt_kernel.mass import Mass
from nt_kernel.metric.model_metric import ModelMetric
from nt_kernel.metric.output_metric import OutputMetric
from optim.steps.direction import woodbury_direction
from optim.steps.risk import risk_at

METHODS = ("DOP853", "RK45", "RK23", "LSODA", "Radau", "BDF")
# The action of a flow rides along as one more variable, under the one name that no parameter can have.
ACTION = ""


@dataclass(frozen=True)
class Solution:
    """A solution of an ODE at the times asked for, and what it took."""

    path: list[dict[str, Tensor]]
    steps: int  # accepted
    evaluations: int  # of the velocity, those for finite differences included
    jacobians: int  # of the velocity, by finite differences (implicit methods)


def gradient_flow(
    velocity: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    params: dict[str, Tensor],
    times: Sequence[float],
    *,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    method: str = "DOP853",
) -> list[dict[str, Tensor]]:
    """Solutions of θ̇ = velocity(θ) from ``params`` at ``times`` (ascending; times[0] is the start).

    The path of :func:`solve_flow`, with its arguments and errors.

    >>> path = gradient_flow(lambda p: {"w": -p["w"]}, {"w": torch.ones(1, dtype=torch.float64)}, [0.0, 1.0])
    >>> round(path[-1]["w"].item(), 6)  # exp(−1)
    0.367879
    """
    return solve_flow(velocity, params, times, rtol=rtol, atol=atol, method=method).path


def solve_flow(
    velocity: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    params: dict[str, Tensor],
    times: Sequence[float],
    *,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    method: str = "DOP853",
) -> Solution:
    """θ̇ = velocity(θ) from ``params`` at ``times`` (ascending; times[0] is the start), by scipy's solvers.

    Parameters are dicts of tensors (stacked networks included); the ODE runs on them as one float64 vector on the CPU, the
    velocity in their own dtype on their device. ``method``: explicit "DOP853", "RK45", "RK23"; "LSODA", which turns
    to an implicit one where the flow is stiff; implicit "Radau", "BDF". The implicit ones difference the velocity in every
    parameter: m + 1 evaluations and m × m numbers for a Jacobian, for small networks only. The local error of a step
    is held to atol + rtol·|θ| (Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations* I, II).

    Raises ValueError for unknown methods, times that do not ascend or tolerances that are not positive, NumericalError
    when the solver gives up (a solution that escapes, or a flow too stiff for the method: write method="LSODA").

    >>> decay = lambda p: {"w": -p["w"]}
    >>> found = solve_flow(decay, {"w": torch.ones(1, dtype=torch.float64)}, [0.0, 1.0], method="RK45", rtol=1e-3, atol=1e-6)
    >>> found.steps, found.evaluations, found.jacobians
    (2, 14, 0)
    """
    times = checked_times(times)
    if method not in METHODS:
        raise ValueError(unknown_name("method", method, METHODS))
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    import numpy
    import scipy.integrate

    names = list(params)
    sizes = [params[n].numel() for n in names]

    def unflatten(vector) -> dict[str, Tensor]:
        pieces = torch.as_tensor(vector, dtype=torch.float64).split(sizes)
        return {n: piece.reshape(params[n].shape).to(params[n]) for n, piece in zip(names, pieces, strict=True)}

    def flatten(values: dict[str, Tensor]):
        return torch.cat([values[n].detach().reshape(-1).double().cpu() for n in names]).numpy()

    evaluations, finite = 0, True

    def derivative(_, vector):
        nonlocal evaluations, finite  # scipy leaves those of its finite differences out of its count
        evaluations += 1
        found = flatten(velocity(unflatten(vector)))
        finite = bool(numpy.isfinite(found).all())
        if evaluations == 1 and not finite:  # with no first step size the solvers never end
            raise NumericalError("the velocity is not finite at the start", where="gradient flow")
        return found

    start = flatten(params)
    solver = getattr(scipy.integrate, method)(derivative, times[0], start, times[-1], rtol=rtol, atol=atol)
    path, steps = [unflatten(start.copy())], 0
    while len(path) < len(times):
        try:
            message = solver.step()
        except ValueError as error:  # the implicit methods' own linear algebra, on a Jacobian of NaN
            if finite:
                raise
            raise NumericalError(f"the velocity is not finite past t = {solver.t:g}", where="gradient flow") from error
        if solver.status == "failed" or not numpy.isfinite(solver.y).all():
            raise NumericalError(
                f"the flow could not be integrated past t = {solver.t:g} ({message or 'it is not finite there'}); where it is "
                'stiff rather than escaping, write method="LSODA"',
                where="gradient flow",
            )
        steps += 1
        between = solver.dense_output()
        while len(path) < len(times) and times[len(path)] <= solver.t:
            path.append(unflatten(between(times[len(path)])))
    return Solution(path, steps, evaluations, solver.njev)


def checked_times(times: Sequence[float]) -> list[float]:
    """The times as floats; ValueError unless there are two or more, finite and ascending.

    >>> checked_times([0, 1])
    [0.0, 1.0]
    """
    found = [float(t) for t in times]
    if len(found) < 2 or not all(map(isfinite, found)) or any(b <= a for a, b in pairwise(found)):
        raise ValueError(f"times must be two or more finite numbers in ascending order, the start first; got {found}")
    return found


@dataclass(frozen=True)
class MetricFlow:
    """θ̇ = −G⁻¹∇h at ``times``: the path, and along it h, its rate of fall and the action; what it took to find it."""

    times: list[float]
    path: list[dict[str, Tensor]]
    h: Tensor  # [T]
    dissipation: Tensor  # ∇hᵀG⁻¹∇h = −dh/dt, [T]
    action: Tensor  # ∫½(θ̇ᵀGθ̇ + ∇hᵀG⁻¹∇h)ds from the start on, integrated along with θ; it is h(start) − h, [T]
    method: str
    steps: int
    evaluations: int
    jacobians: int


def metric_flow(
    model: nn.Module,
    params: Mapping[str, Tensor] | None,
    x,
    loss: Callable[[Tensor], Tensor],
    times: Sequence[float],
    *,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    solver: str = "cholesky",
    output: Callable | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    method: str = "DOP853",
) -> MetricFlow:
    """The flow θ̇ = −G⁻¹∇h that the steps of :class:`optim.Woodbury` follow as lr → 0; nothing of the model is changed.

    Euler's method of step lr is θ ← θ − lr·G⁻¹∇h, first order: it is O(lr) away at every fixed time. Theorem 3 and the
    bounds T0–T3 are about this flow.

    Parameters
    ----------
    model: the architecture; params: where to start, {name: tensor}, or None for the model's own values.
    x, loss: the data, and the model's outputs → the losses of the samples [N] or their mean.
    mass, output_metric, scale, blocks, solver, output: as for :class:`optim.Woodbury`.
    times, rtol, atol, method: as for :func:`solve_flow`. A model in float32 has velocities rounded at 1e-7: no solver
        can hold 1e-9 with them, so rtol below 1e-5 is refused there.

    Every evaluation costs what a step of Woodbury costs, and two products with J.

    >>> model = nn.Linear(1, 1, bias=False, dtype=torch.float64)  # h = ½(2w)², G = 1 + 4: ẇ = −(4/5)w
    >>> start, x = {"weight": torch.ones(1, 1, dtype=torch.float64)}, torch.full((1, 1), 2.0, dtype=torch.float64)
    >>> flow = metric_flow(model, start, x, lambda y: 0.5 * y.square().sum(1), [0.0, 1.0])
    >>> flow.path[-1]["weight"].item()  # exp(−0.8)
    0.449328964...
    >>> flow.action[-1].item(), (flow.h[0] - flow.h[-1]).item()  # 2 − 2·exp(−1.6)
    (1.596206964..., 1.596206964...)
    """
    start = split_state(model)[0] if params is None else named_like(split_state(model)[0], params)
    coarse = [n for n, p in start.items() if p.dtype != torch.float64]
    if coarse and rtol < 1e-5:
        raise ValueError(
            f"parameter {coarse[0]!r} is {str(start[coarse[0]].dtype).removeprefix('torch.')}: its velocity is too coarse for "
            f"rtol = {rtol:g}; write model.double(), or rtol=1e-5, atol=1e-7"
        )
    options = {"mass": mass, "output_metric": output_metric, "scale": scale, "blocks": blocks, "solver": solver}

    def look(at: Mapping[str, Tensor]):
        """h, G⁻¹∇h, and ½θ̇ᵀGθ̇ and ½∇hᵀG⁻¹∇h there."""
        h, r = risk_at(model, at, x, loss, output=output)
        metric = ModelMetric(model, x, params=at, output=output, **options)
        natural = woodbury_direction(metric.blocks, metric.systems, r, metric.masses)
        pairing = sum((g * natural[n]).sum() for n, g in metric.gradient(r).items())
        return h, natural, metric.squared_norm(natural) / 2, pairing / 2

    def velocity(state: dict[str, Tensor]) -> dict[str, Tensor]:
        _, natural, kinetic, potential = look({n: state[n] for n in start})
        return {**{n: -d for n, d in natural.items()}, ACTION: kinetic + potential}

    clock = torch.zeros((), dtype=torch.float64, device=next(iter(start.values())).device)
    found = solve_flow(velocity, {**start, ACTION: clock}, times, rtol=rtol, atol=atol, method=method)
    action = torch.stack([state.pop(ACTION) for state in found.path])
    seen = [look(state) for state in found.path]
    return MetricFlow(
        checked_times(times),
        found.path,
        torch.stack([h for h, *_ in seen]),
        torch.stack([2 * potential for *_, potential in seen]),
        action,
        method,
        found.steps,
        found.evaluations,
        found.jacobians,
    )
