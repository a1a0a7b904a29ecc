"""The inner problem of one outer step, min_θ E(u(θ)) + ‖u(θ) − u^k‖²/(2τ), and the loop that stops at inexactness δ."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Protocol

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import batch_size, flatten_outputs
from nt_kernel.capture.probe import in_training
from optim.movements.energy import Energy
from optim.movements.space import Curvature, inner_product, norm


@dataclass
class InnerProblem:
    """min F(u(θ)), F(u) = E(u) + ‖u − ``centre``‖²/(2τ), over the trainable parameters of ``model``; u [N, C] in float64.

    ``evaluations`` counts forward passes, ``gradients`` backward or Jacobian passes.
    """

    model: nn.Module
    x: object
    energy: Energy
    tau: float
    centre: Tensor
    output: Callable | None = None
    evaluations: int = 0
    gradients: int = 0
    reason: str = ""  # why the solver stopped by itself
    params: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def outputs(self) -> Tensor:
        """u(θ), followed by autograd where gradients are on."""
        self.evaluations += 1
        return network_outputs(self.model, self.x, self.output)

    def objective(self, u: Tensor) -> Tensor:
        """F(u)."""
        gap = u - self.centre
        return self.energy.value(u) + inner_product(gap, gap) / (2 * self.tau)

    def slope(self, u: Tensor) -> Tensor:
        """ρ = ∇F(u) = ∇E(u) + (u − u^k)/τ."""
        return self.energy.gradient(u) + (u - self.centre) / self.tau

    def curvature(self, u: Tensor) -> Curvature:
        """B = ∇²E(u) + 1/τ."""
        return self.energy.curvature(u).shifted(1 / self.tau)


def network_outputs(model: nn.Module, x, output: Callable | None = None) -> Tensor:
    """u(θ) [N, C] in float64."""
    y = model(*x) if isinstance(x, tuple) else model(x)
    return flatten_outputs(y if output is None else output(y), batch_size(x)).double()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What a run may change: the trainable parameters and the buffers, the tensors themselves, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())


def refuse_training_layers(model: nn.Module) -> None:
    """Raise ValueError for dropout and BatchNorm in training mode."""
    for name, module in model.named_modules():
        if why := in_training(module):
            what = "draws random masks" if why == "random" else "makes samples interact and moves its statistics"
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) {what} in training mode, so the outputs are no function of the "
                "parameters; call model.eval() first"
            )


def refuse_random(first: Tensor, second: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where two passes at the same θ differ by more than rounding in the model's ``dtype``."""
    gap = norm(first - second).item()
    if not gap <= torch.finfo(dtype).eps ** 0.5 * (1 + norm(first).item()):
        raise ValueError(
            f"two passes of the model at the same parameters and inputs differ by {gap:.3g}: its outputs are no function of "
            "the parameters (a random forward, or one that remembers); call model.eval() first"
        )


class Session(Protocol):
    """A solver at work on one model: what it keeps between outer steps is its own."""

    def iterate(self, problem: InnerProblem) -> Iterator[Tensor]:
        """Move the model's parameters, one inner iteration for each u(θ) that is yielded; end where it gets no further."""


@dataclass(frozen=True)
class Inner:
    """How an inner solve went: the outputs it left the model at (the best it met), their distance δ to the proximal point."""

    outputs: Tensor
    delta: float
    reached: bool
    reason: str
    iterations: int
    evaluations: int
    gradients: int
    seconds: float


def solve_inner(
    problem: InnerProblem,
    session: Session,
    target: Tensor,
    delta: float,
    *,
    most: int,
    seconds: float = inf,
    clock: Callable[[], float],
) -> Inner:
    """Iterate until ‖u − ``target``‖ ≤ ``delta``, ``most`` iterations or ``seconds`` of the solver; the best θ stays.

    The time is the solver's own: distances and copies of the best iterate are not in it.
    """
    best_u = problem.centre
    best = norm(best_u - target).item()
    kept = {n: t.detach().clone() for n, t in state_of(problem.model).items()}
    iterations, spent, at_best = 0, 0.0, True
    iterator = session.iterate(problem)
    reason = "" if best <= delta else f"{most} inner iterations were not enough"
    while best > delta and iterations < most:
        if spent >= seconds:
            reason = f"{seconds:g} s were not enough"
            break
        start = clock()
        u = next(iterator, None)
        spent += clock() - start
        if u is None:
            reason = problem.reason or "the solver stopped by itself"
            break
        iterations += 1
        distance = norm(u - target).item()
        if not isfinite(distance):
            reason = "the outputs are not finite: the solver diverged"
            at_best = False
            break
        at_best = distance < best
        if at_best:
            best, best_u = distance, u
            if best > delta:
                copy_into(kept, state_of(problem.model))
        if best <= delta:
            reason = ""
    iterator.close()
    if not at_best:
        copy_into(state_of(problem.model), kept)
    counts = problem.evaluations, problem.gradients
    return Inner(best_u.detach(), best, best <= delta, reason, iterations, *counts, spent)


@torch.no_grad()
def copy_into(where: dict[str, Tensor], what: dict[str, Tensor]) -> None:
    """Write the values of ``what`` into the tensors of ``where``."""
    for name, value in where.items():
        value.copy_(what[name])
