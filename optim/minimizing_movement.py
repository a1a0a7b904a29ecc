"""Neural gradient flows by minimizing movements (Yang, Zheng & Wang, arXiv 2605.27779): proximal steps over network functions.

Outer step: u^{k+1} ≈ argmin_u E(u) + ‖u − u^k‖²/(2τ), u the network's outputs on the sample points, E convex. Inner solver:
Gauss–Newton or any first-order optimizer over the parameters, until the outputs are within δ of the exact proximal point. The
inequalities that follow are in :mod:`optim.movements.tracking`; every one is a column of the result.
"""

import math
import time
from collections.abc import Callable
from numbers import Real

import torch
from torch import nn

from nt_kernel.capture.observe import batch_size
from nt_kernel.capture.probe import refuse_parameters
from optim.movements.convexity import check_curvature, check_energy
from optim.movements.energy import ConvexEnergy, Energy
from optim.movements.first_order import FirstOrder
from optim.movements.gauss_newton import GaussNewton
from optim.movements.inner import (
    Inner,
    InnerProblem,
    copy_into,
    network_outputs,
    refuse_random,
    refuse_training_layers,
    solve_inner,
    state_of,
)
from optim.movements.proximal import certificate, minimum, proximal_point
from optim.movements.result import MovementRun
from optim.movements.tracking import Trajectory


def minimizing_movements(
    model: nn.Module,
    x,
    energy: Energy,
    *,
    tau: float,
    steps: int,
    delta: float,
    solver: GaussNewton | FirstOrder | None = None,
    inner_steps: int = 100,
    inner_seconds: float = math.inf,
    output: Callable | None = None,
    keep_parameters: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> MovementRun:
    """``steps`` outer steps of size ``tau`` from the network as it is; ``model`` is moved, as by an optimizer.

    Parameters
    ----------
    model, x, output: as for :func:`nt_kernel.layer_factors`; the samples do not interact (Gauss–Newton needs it).
    energy: :class:`~optim.movements.energy.SquaredEnergy`, :func:`~optim.movements.energy.dirichlet_energy`,
        :class:`~optim.movements.energy.QuadraticEnergy`, or :class:`~optim.movements.energy.ConvexEnergy` of a callable.
    tau: τ > 0, in units of the inner product (1/N)Σ: an exact step contracts by q = 1/(1 + τλ).
    delta: each step ends within ``delta`` of the exact proximal point, ‖u^{k+1} − P(u^k)‖ ≤ δ, or after ``inner_steps``
        iterations or ``inner_seconds`` of the solver by ``clock``; it then keeps the best iterate it met and says so
        (``run.reached``, ``run.reason``), and the next step goes on from there: the bounds hold with the δ_k that came out.
    solver: :class:`~optim.movements.gauss_newton.GaussNewton` (default) or :class:`~optim.movements.first_order.FirstOrder`.
    keep_parameters: keep θ^k of every step (:func:`optim.movements.degeneracy.local_nondegeneracy` wants them).

    Raises ValueError/TypeError for bad arguments, for an energy that is not finite, not as convex as it claims or below its
    own floor, here or at a later iterate, and for a model whose outputs are no function of its parameters (dropout or
    BatchNorm in training mode, a random forward); parameters and buffers are then as they were. NumericalError where a
    proximal point cannot be found; where it is only u* that Newton's method does not find, ``distance`` is nan.

    >>> from optim.movements.energy import SquaredEnergy
    >>> model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> _ = model.weight.data.fill_(1.0)
    >>> x = torch.ones(1, 1, dtype=torch.float64)
    >>> run = minimizing_movements(model, x, SquaredEnergy(torch.zeros(1, 1)), tau=1.0, steps=2, delta=1e-6)
    >>> run.reached, round(model.weight.item(), 5)  # halved twice
    (True, 0.25)
    >>> run.violated()
    []
    """
    solver = GaussNewton() if solver is None else solver
    _check(model, energy, solver, tau, steps, delta, inner_steps, inner_seconds)
    for name, value in (("clock", clock), *(() if output is None else (("output", output),))):
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")
    refuse_parameters(model)
    refuse_training_layers(model)
    session = solver.session(model)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: t.detach().clone() for n, t in state_of(model).items()}
    try:
        found = _Sequence(_start(model, x, energy, output), energy, tau)
        path = {n: [start[n]] for n in params}
        for _ in range(steps):
            problem = InnerProblem(model, x, energy, tau, found.outputs[-1], output)
            found.advance(lambda target, problem=problem: solve_inner(
                problem, session, target, delta, most=inner_steps, seconds=inner_seconds, clock=clock
            ))  # fmt: skip
            for n, p in params.items() if keep_parameters else ():
                path[n].append(p.detach().clone())
        kept = {n: torch.stack(values) for n, values in path.items()} if keep_parameters else None
        return found.result(delta, kept)
    except BaseException:
        copy_into(state_of(model), start)
        raise


def _start(model: nn.Module, x, energy: Energy, output: Callable | None) -> torch.Tensor:
    """u⁰; ValueError where it is not finite or not repeated by a second pass, and where E does not take it."""
    N = batch_size(x)
    with torch.no_grad():
        u, again = network_outputs(model, x, output), network_outputs(model, x, output)
    if not bool(u.isfinite().all()):
        raise ValueError(f"the network's outputs on the {N} samples are not finite before the first step")
    refuse_random(u, again, next(p.dtype for p in model.parameters() if p.requires_grad))
    energy.check(u)
    check_energy(energy, u)
    return u


class _Sequence:
    """The computed sequence u^k and, beside it, the exact one ū^k."""

    def __init__(self, u, energy: Energy, tau: float):
        self.energy, self.tau = energy, tau
        self.outputs, self.exact, self.proximal, self.inner, self.certificates = [u], [u], [], [], []

    def advance(self, solve: Callable[..., Inner]) -> None:
        target = proximal_point(self.energy, self.outputs[-1], self.tau)
        same = self.exact[-1] is self.outputs[-1]
        exact = target if same else proximal_point(self.energy, self.exact[-1], self.tau)
        if isinstance(self.energy, ConvexEnergy):
            check_curvature(self.energy, target)
        inner = solve(target)
        self.certificates.append(certificate(self.energy, inner.outputs, self.outputs[-1], self.tau))
        self.proximal.append(target)
        self.exact.append(exact)
        self.outputs.append(inner.outputs)
        self.inner.append(inner)

    def result(self, delta: float, parameters) -> MovementRun:
        energies = torch.stack([self.energy.value(u) for u in self.outputs])
        exact = torch.stack([self.energy.value(u) for u in self.exact])
        least = minimum(self.energy, self.exact[-1])
        met = min(*energies.tolist(), *exact.tolist())
        if self.energy.floor > met + 1e-9 * max(1.0, abs(met)):
            raise ValueError(
                f"floor = {self.energy.floor:.6g} of energy {self.energy.name!r} is above E = {met:.6g} that was met"
            )
        floor = self.energy.floor if least is None else least[1]
        # Without a lower bound of E: its value at the end of the exact sequence, for which the sum telescopes as well.
        drop = energies[0] - (exact[-1] if floor == -math.inf else floor)
        trajectory = Trajectory(
            torch.stack(self.outputs),
            torch.stack(self.proximal),
            torch.stack(self.exact),
            float(drop),
            self.tau,
            self.energy.convexity,
            None if least is None else least[0],
        )
        return MovementRun(
            trajectory,
            tuple(self.inner),
            energies,
            exact,
            torch.tensor(self.certificates, dtype=torch.float64),
            delta,
            parameters,
        )


def _check(model, energy, solver, tau, steps, delta, inner_steps, inner_seconds) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters (all have requires_grad=False)")
    if not isinstance(energy, Energy):
        raise TypeError(
            f"energy must be one of optim's energies, got {energy!r}; write ConvexEnergy(function, convexity=λ) for a "
            "callable, SquaredEnergy(targets) for targets"
        )
    if not isinstance(solver, GaussNewton | FirstOrder):
        raise TypeError(
            f"solver must be GaussNewton(…) or FirstOrder(lambda params: Adam(params)), got {type(solver).__name__}"
        )
    for name, value, most in (("tau", tau, "∞"), ("delta", delta, "∞"), ("inner_seconds", inner_seconds, None)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not value > 0 or (most and value == math.inf):
            raise ValueError(f"{name} must be positive{' and finite' if most else ''}, got {value!r}")
    for name, value in (("steps", steps), ("inner_steps", inner_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
