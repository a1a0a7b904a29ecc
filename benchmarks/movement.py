"""One inner iteration of a minimizing movement by Gauss–Newton against one step of Woodbury, forward and backward included.

Both form the same Gram matrices; Woodbury solves one system per layer, Gauss–Newton one for all. The iteration's move Δ must
solve (w JᵀBJ + εD)Δ = −w Jᵀρ, checked in float64 by torch.func products.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cpu_time import OnCpu
from benchmarks.step import TOLERANCE, first_step_error, training_step
from benchmarks.timing import Contender, Entry, Settings, compare, table
from benchmarks.workloads import WORKLOADS
from optim import GaussNewton, LevenbergMarquardt, SquaredEnergy, Woodbury
from optim.movements.inner import InnerProblem, network_outputs

BASE = "Woodbury"
TITLE = "Inner iteration of a minimizing movement"
ABOUT = (
    "One Gauss–Newton iteration of E = ½‖u − a‖², τ = 1 (Jacobian pass, joint system, move, forward pass) against one step of "
    "Woodbury (zero_grad, forward, backward, step) at batch size B. ε = 0.5 makes the systems of both about equally hard, "
    "I + (b/ε)K/N with b/ε = 4 against I + K/N; ε = 10⁻³ is where Levenberg–Marquardt starts: its first iteration, from the "
    "same parameters each time; each move that it tries is a solve of its own and a forward pass. CPU seconds. "
    "`error`: ‖(w JᵀBJ + εD)Δ + w Jᵀρ‖/‖w Jᵀρ‖ (of Levenberg–Marquardt at the ε it starts from, though it moves by a larger "
    "one where trials are refused), for Woodbury ‖G s − ∇h‖/‖∇h‖, in float64."
)
RATIO = "× Woodbury"
CASES = [("W1", 32, "float32"), ("W1", 128, "float32"), ("W1", 32, "float64"), ("W2", 32, "float32")]
QUICK = [("W1", 8, "float32")]
DAMPINGS = {"Gauss–Newton, ε = 0.5": 0.5, "Gauss–Newton, ε = 1e-3": 1e-3}
TRUST = "Levenberg–Marquardt"
# ε is this small beside w JᵀBJ: a float32 solve leaves as much more of ε's share behind.
ROOM = {0.5: 1.0, 1e-3: 30.0}


def problem(model: nn.Module, x: Tensor, targets: Tensor) -> InnerProblem:
    """The inner problem at the model as it is, seen from a proximal centre a little away (so that ρ has both terms)."""
    with torch.no_grad():
        u = network_outputs(model, x)
    return InnerProblem(model, x, SquaredEnergy(targets), 1.0, u + 0.1)


def move_error(model: nn.Module, x: Tensor, targets: Tensor, epsilon: float, solver: GaussNewton) -> float:
    """The relative residual of the normal equations at ε of the first move of ``solver``, in float64."""
    moved = deepcopy(model)
    next(solver.session(moved).iterate(problem(moved, x, targets)))
    exact = deepcopy(model).double()
    params = {n: p.detach() for n, p in exact.named_parameters()}
    after = dict(moved.named_parameters())
    move = {n: after[n].detach().double() - dict(model.named_parameters())[n].detach().double() for n in params}
    one = problem(model, x, targets)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(exact, values, (x.double(),))

    u, pushed = torch.func.jvp(outputs, (params,), (move,))
    pull = torch.func.vjp(outputs, params)[1]
    (curved,), (pulled,) = pull(2 * pushed / len(x)), pull(one.slope(u) / len(x))  # B = 1 + 1/τ
    gap = sum((curved[n] + epsilon * move[n] + pulled[n]).square().sum() for n in params)
    return (gap / sum(g.square().sum() for g in pulled.values())).sqrt().item()


def contenders(workload: str, batch: int, dtype: str, device: str) -> dict[str, Contender]:
    """Every rule on its own copy of the network."""
    model = WORKLOADS[workload].model(dtype, device)
    x, targets = WORKLOADS[workload].batch(batch, dtype, device)
    own = deepcopy(model)
    optimizer = Woodbury(own, lr=0.1)
    found = {
        BASE: Contender(
            OnCpu(lambda: training_step(own, optimizer, x, targets)), first_step_error(BASE, model, x, targets)
        )
    }
    for name, epsilon in DAMPINGS.items():
        session = deepcopy(model)
        # A hundredth of each step: the networks stay comparable over all the iterations that are timed.
        iterations = GaussNewton(damping=epsilon, lr=0.01).session(session).iterate(problem(session, x, targets))
        error = move_error(model, x, targets, epsilon, GaussNewton(damping=epsilon)) / ROOM[epsilon]
        found[name] = Contender(OnCpu(lambda iterations=iterations: next(iterations)), error)
    trust = LevenbergMarquardt(start=1e-3)
    error = move_error(model, x, targets, trust.start, GaussNewton(damping=trust)) / ROOM[trust.start]
    iteration = first_trust_region_iteration(model, x, targets, trust)
    found[f"{TRUST}, moves tried: {iteration()}"] = Contender(OnCpu(iteration), error)
    return found


def first_trust_region_iteration(model: nn.Module, x: Tensor, targets: Tensor, trust: LevenbergMarquardt):
    """A function that makes it, from the same parameters each time, and gives the number of moves that were tried."""
    moved = deepcopy(model)
    start, one = [p.detach().clone() for p in model.parameters()], problem(moved, x, targets)

    def iteration() -> int:
        with torch.no_grad():
            torch._foreach_copy_(list(moved.parameters()), start)
        before = one.evaluations
        next(GaussNewton(damping=trust).session(moved).iterate(one))
        return one.evaluations - before

    return iteration


def report(settings: Settings, cases: Sequence[tuple[str, int, str]], stem: Path) -> Iterator[str]:
    """The body of the page after each case."""
    rows: list[Entry] = []
    for workload, batch, dtype in cases:
        found = contenders(workload, batch, dtype, settings.device)
        rows += compare(f"{workload}, B = {batch}, {dtype}", found, BASE, TOLERANCE[dtype], settings)
        yield table(rows, RATIO)
