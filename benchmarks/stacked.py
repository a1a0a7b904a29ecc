"""K twins in one stacked step, against a Python loop over K optimizers and against gradient descent mapped over the stack.

The twins start from one network; twin k has its own row k. The loop has K models, each with an optimizer of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.step import loss_of, training_step
from benchmarks.timing import Contender, Entry, Settings, compare, table
from benchmarks.workloads import WORKLOADS
from optim import Woodbury
from optim.stacks.first_order import Rule, gradient_descent
from optim.stacks.stacked import StackedState, stack_parameters, stacked_step
from optim.stacks.stacked_woodbury import WoodburyStep

BASE = "Woodbury, stacked"
TITLE = "Stacked twins"
ABOUT = (
    "One full step of K twins (forward, backward, step) on n samples each, squared loss. `error`: ‖s − s₆₄‖ / ‖s₆₄‖ of the "
    "first step s of all twins, s₆₄ that of K separate optimizers in float64. Gradient descent is `torch.optim.SGD` in the "
    "loop, `vmap(grad)` in the stack."
)
RATIO = "× Woodbury, stacked"
CASES = [("W1", 64, 1, "float32"), ("W1", 64, 4, "float32"), ("W1", 64, 16, "float32")]
QUICK = [("W1", 8, 2, "float32")]
# A float32 step is known to about eps·‖θ‖/‖s‖, and the solver's tolerance.
TOLERANCE = {"float32": 1e-2, "float64": 1e-8}
LR = {"Woodbury": 0.1, "gradient descent": 0.01}

Stack = dict[str, Tensor]  # {parameter: [K, …]}

LOOPED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Woodbury": lambda model: Woodbury(model, lr=LR["Woodbury"]),
    "gradient descent": lambda model: torch.optim.SGD(model.parameters(), lr=LR["gradient descent"]),
}
STACKED: dict[str, WoodburyStep | Rule] = {
    "Woodbury": WoodburyStep(LR["Woodbury"]),
    "gradient descent": gradient_descent(LR["gradient descent"]),
}


def twins(workload: str, n: int, K: int, dtype: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network at the start, inputs [K, n, d] and targets [K, n, C]; row k of twin k is its own."""
    if n < K:
        raise ValueError(f"{K} twins of {n} samples: each replaces a row of its own, so K must be at most n")
    x, targets = WORKLOADS[workload].batch(n + K, dtype, device)
    own = torch.arange(n, device=device).repeat(K, 1)
    own[range(K), range(K)] = torch.arange(n, n + K, device=device)
    return WORKLOADS[workload].model(dtype, device), x[own], targets[own]


class Stacked:
    """All twins in one step; a call takes the next one."""

    def __init__(self, name: str, model: nn.Module, x: Tensor, targets: Tensor):
        self.method, self.model, self.data = STACKED[name], model, (x, targets)
        self.params, self.state = stack_parameters(model, len(x)), StackedState()

    def __call__(self) -> None:
        self.params, self.state = stacked_step(self.model, self.params, self.state, *self.data, loss_of, self.method)

    def parameters(self) -> Stack:
        return self.params


class Looped:
    """The same by K models with K optimizers, one after the other."""

    def __init__(self, name: str, model: nn.Module, x: Tensor, targets: Tensor):
        self.models, self.data = [deepcopy(model) for _ in x], list(zip(x, targets, strict=True))
        self.optimizers = [LOOPED[name](own) for own in self.models]

    def __call__(self) -> None:
        for model, optimizer, (x, targets) in zip(self.models, self.optimizers, self.data, strict=True):
            training_step(model, optimizer, x, targets)

    def parameters(self) -> Stack:
        each = [dict(model.named_parameters()) for model in self.models]
        return {name: torch.stack([own[name].detach() for own in each]) for name in each[0]}


WAYS: Mapping[str, type] = {"stacked": Stacked, "loop": Looped}


def first_step(way: type, name: str, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """θ₁ − θ₀ of all twins as one vector in float64; ``model`` is left as it is."""
    run = way(name, deepcopy(model), x, targets)
    before = {key: p.detach().clone() for key, p in run.parameters().items()}
    run()
    return torch.cat([(p.double() - before[key].double()).flatten() for key, p in run.parameters().items()])


def contenders(workload: str, n: int, K: int, dtype: str, device: str) -> dict[str, Contender]:
    """Both optimizers both ways, with the error of their first step."""
    model, x, targets = twins(workload, n, K, dtype, device)
    exact = (deepcopy(model).double(), x.double(), targets.double())
    found = {}
    for name in STACKED:
        reference = first_step(Looped, name, *exact)
        for title, way in WAYS.items():
            error = (first_step(way, name, model, x, targets) - reference).norm() / reference.norm()
            found[f"{name}, {title}"] = Contender(way(name, deepcopy(model), x, targets), error.item())
    return found


def entries(settings: Settings, cases: Sequence[tuple[str, int, int, str]] = CASES) -> list[Entry]:
    """The rows of the table."""
    rows = []
    for workload, n, K, dtype in cases:
        found = contenders(workload, n, K, dtype, settings.device)
        rows += compare(f"{workload}, n = {n}, K = {K}, {dtype}", found, BASE, TOLERANCE[dtype], settings)
    return rows


def rates(rows: Sequence[Entry], K: int) -> str:
    """Twin-steps a second in one line, for a case of K twins.

    >>> rates([Entry("W1, n = 64, K = 4", "loop", median=0.5), Entry("W1, n = 64, K = 4", "gone")], 4)
    'W1, n = 64, K = 4: loop 8'
    """
    timed = [f"{row.name} {K / row.median:.3g}" for row in rows if row.median]
    return f"{rows[0].case}: {'; '.join(timed)}"


def report(settings: Settings, cases: Sequence[tuple[str, int, int, str]], stem: Path) -> Iterator[str]:
    """The body of the page after each case."""
    rows: list[Entry] = []
    lines: list[str] = []
    for case in cases:
        new = entries(settings, [case])
        rows, lines = rows + new, [*lines, f"- {rates(new, case[2])}"]
        yield table(rows, RATIO) + "\n\nTwin-steps a second:\n\n" + "\n".join(lines)
