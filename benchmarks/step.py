"""One training step, forward and backward included: Woodbury against SGD and Adam of torch.

They are different algorithms, so agreement means that each does what it says: a first step s = (θ₀ − θ₁)/lr must solve
G s = ∇h, with G = I for SGD, diag(|∇h| + ε) for Adam, and per layer I + (1/B) JᵀJ for Woodbury, I + J̄ᵀJ̄ for its scale
"mean-jacobian".
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import Contender, Entry, Settings, compare, table
from benchmarks.workloads import WORKLOADS
from optim import Woodbury

BASE = "SGD"
TITLE = "Optimizer step"
ABOUT = (
    "One full step (zero_grad, forward, backward, step) at batch size B, squared loss. `error`: ‖G s − ∇h‖ / ‖∇h‖ of "
    "the first step s, checked in float64 by torch.func products; G = I, diag(|∇h| + ε), and per layer I + JᵀJ/B or I + J̄ᵀJ̄."
)
RATIO = "× SGD"
CASES = [("W1", 32, "float32"), ("W1", 128, "float32"), ("W2", 32, "float32"), ("W2", 128, "float32")]
QUICK = [("W1", 8, "float32"), ("W2", 4, "float32")]
# A float32 step is known to about eps·‖θ‖/‖θ₀ − θ₁‖, which G then magnifies.
TOLERANCE = {"float32": 1e-2, "float64": 1e-8}
ADAM_EPS = 1e-8
MEAN_JACOBIAN = "Woodbury, mean-jacobian"

# The most a step should cost in steps of SGD.
DEMANDED = {
    ("W1, B = 128, float32", "Woodbury"): 5.0,
    ("W2, B = 32, float32", "Woodbury"): 3.0,
    ("W2, B = 128, float32", "Woodbury"): 6.0,
    **{(f"{case}, float32", MEAN_JACOBIAN): 3.0 for case in ("W1, B = 32", "W1, B = 128", "W2, B = 32", "W2, B = 128")},
}

Vector = dict[str, Tensor]  # one tensor per parameter name

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, eps=ADAM_EPS),
    "Woodbury": lambda model: Woodbury(model, lr=0.1),
    MEAN_JACOBIAN: lambda model: Woodbury(model, lr=0.1, scale="mean-jacobian", check_step=False),
}


def loss_of(y: Tensor, targets: Tensor) -> Tensor:
    """h = (1/B) Σ ½‖y_i − t_i‖²."""
    return 0.5 * (y - targets).square().sum() / len(y)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model(x), targets).backward()
    optimizer.step()


def metric_product(name: str, model: nn.Module, x: Tensor, gradient: Vector, s: Vector) -> Vector:
    """G s at the parameters of ``model``, for the metric that the optimizer ``name`` stands for."""
    if name == "SGD":
        return s
    if name == "Adam":  # after one step its bias-corrected moments are ∇h and ∇h²
        return {key: s[key] * (gradient[key].abs() + ADAM_EPS) for key in s}
    params = {key: p.detach() for key, p in model.named_parameters()}
    product: Vector = {}
    for layer in {key.rpartition(".")[0]: None for key in params}:
        own = {key: p for key, p in params.items() if key.rpartition(".")[0] == layer}

        def outputs(values: Vector) -> Tensor:
            return torch.func.functional_call(model, {**params, **values}, (x,))

        _, pushed = torch.func.jvp(outputs, (own,), ({key: s[key] for key in own},))
        if name == MEAN_JACOBIAN:  # J̄ᵀJ̄ s = (1/B) Jᵀ E, E = the mean of J s at every sample
            pushed = pushed.mean(0).expand_as(pushed)
        (pulled,) = torch.func.vjp(outputs, own)[1](pushed)
        product.update({key: s[key] + pulled[key] / len(x) for key in own})
    return product


def first_step_error(name: str, model: nn.Module, x: Tensor, targets: Tensor) -> float:
    """‖G s − ∇h‖ / ‖∇h‖ of the step that the optimizer takes from ``model`` (which is left as it is)."""
    moved = deepcopy(model)
    optimizer = OPTIMIZERS[name](moved)
    training_step(moved, optimizer, x, targets)
    lr = optimizer.param_groups[0]["lr"]
    after = dict(moved.named_parameters())
    s = {key: (p.detach().double() - after[key].detach().double()) / lr for key, p in model.named_parameters()}

    exact = deepcopy(model).double()
    leaves = dict(exact.named_parameters())
    found = torch.autograd.grad(loss_of(exact(x.double()), targets.double()), list(leaves.values()))
    gradient = dict(zip(leaves, found, strict=True))
    product = metric_product(name, exact, x.double(), gradient, s)
    gap = sum((product[key] - g).square().sum() for key, g in gradient.items())
    return (gap / sum(g.square().sum() for g in gradient.values())).sqrt().item()


def contenders(workload: str, batch: int, dtype: str, device: str) -> dict[str, Contender]:
    """Every optimizer on its own copy of the network, with the error of its first step."""
    model = WORKLOADS[workload].model(dtype, device)
    x, targets = WORKLOADS[workload].batch(batch, dtype, device)

    def contender(name: str) -> Contender:
        own = deepcopy(model)
        optimizer = OPTIMIZERS[name](own)
        error = first_step_error(name, model, x, targets)
        return Contender(lambda: training_step(own, optimizer, x, targets), error)

    return {name: contender(name) for name in OPTIMIZERS}


def entries(settings: Settings, cases: Sequence[tuple[str, int, str]] = CASES) -> list[Entry]:
    """The rows of the table."""
    rows = []
    for workload, batch, dtype in cases:
        found = contenders(workload, batch, dtype, settings.device)
        rows += compare(f"{workload}, B = {batch}, {dtype}", found, BASE, TOLERANCE[dtype], settings)
    return rows


def verdicts(rows: Sequence[Entry]) -> str:
    """What was demanded beside what came out.

    >>> print(verdicts([Entry("W2, B = 32, float32", "Woodbury", 0, 0.1, (6.0, 5.9, 6.1))]))
    | case | | × SGD | demanded | |
    |---|---|--:|--:|---|
    | W2, B = 32, float32 | Woodbury | 6.00 | ≤ 3 | missed by 2.00× |
    """
    lines = ["| case | | × SGD | demanded | |", "|---|---|--:|--:|---|"]
    for row in rows:
        most = DEMANDED.get((row.case, row.name))
        if most is not None and row.ratio:
            verdict = "met" if row.ratio[0] <= most else f"missed by {row.ratio[0] / most:.2f}×"
            lines.append(f"| {row.case} | {row.name} | {row.ratio[0]:.2f} | ≤ {most:g} | {verdict} |")
    return "\n".join(lines)


def report(settings: Settings, cases: Sequence[tuple[str, int, str]], stem: Path) -> Iterator[str]:
    """The body of the page after each case."""
    rows: list[Entry] = []
    for case in cases:
        rows += entries(settings, [case])
        yield f"{verdicts(rows)}\n\n{table(rows, RATIO)}"
