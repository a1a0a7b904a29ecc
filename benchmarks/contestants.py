"""The optimizers of the training benchmark: each with one number to tune, its learning rate, and seven values of it.

Everything else is as its authors or torch have it: momentum .9 for SGD, AdamW's betas and weight decay 1e-2, Muon for matrices
(torch's, weight decay 0) with AdamW at a tenth of its rate for the rest, damping 1e-3 for K-FAC, mass .1 for Woodbury.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.tasks import Task
from optim import Woodbury

Step = Callable[[Tensor, Tensor], None]  # one step on the mini-batch (x, targets)


@dataclass(frozen=True)
class Contestant:
    """``build(model, task, lr)`` gives its step; ``rates`` are tried in tuning, as many for every contestant."""

    build: Callable[[nn.Module, Task, float], Step]
    rates: Sequence[float]


def powers(first: float) -> tuple[float, ...]:
    """Seven rates, half a decade apart.

    >>> powers(0.001)
    (0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0)
    """
    return tuple(float(f"{first * 10 ** (k / 2):.3g}") for k in range(7))


def usual(*optimizers_of: Callable) -> Callable[[nn.Module, Task, float], Step]:
    """zero_grad, forward, backward, step, for optimizers made by ``(model, task, lr)``."""

    def build(model: nn.Module, task: Task, lr: float) -> Step:
        optimizers = [make(model, task, lr) for make in optimizers_of]

        def step(x: Tensor, targets: Tensor) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            task.loss_of(model(x), targets).backward()
            for optimizer in optimizers:
                optimizer.step()

        return step

    return build


def woodbury(output_metric: str = "", **options) -> Callable[[nn.Module, Task, float], Step]:
    """Woodbury, by default with the loss's own Gauss-Newton matrix as output metric. Any rate is allowed, as for the
    others (no step check)."""

    def make(model: nn.Module, task: Task, lr: float) -> Woodbury:
        return Woodbury(model, lr, mass=0.1, output_metric=output_metric or task.loss, check_step=False, **options)

    return usual(make)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def others(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() != 2]


def kfac(model: nn.Module, task: Task, lr: float) -> Step:
    """Natural gradient with the Kronecker-factored Fisher matrix of each mini-batch (curvlinops, one Monte-Carlo sample).

    Raises ImportError where curvlinops is not installed.
    """
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    loss = nn.CrossEntropyLoss() if task.loss == "cross_entropy" else nn.MSELoss()
    params = list(model.parameters())

    def step(x: Tensor, targets: Tensor) -> None:
        gradients = torch.autograd.grad(loss(model(x), targets), params)
        curvature = KFACLinearOperator(model, loss, params, [(x, targets)], check_deterministic=False)
        moved = KFACInverseLinearOperator(curvature, damping=1e-3) @ list(gradients)
        with torch.no_grad():
            for p, d in zip(params, moved, strict=True):
                p.sub_(d, alpha=lr)

    return step


CONTESTANTS: dict[str, Contestant] = {
    "SGD, momentum .9": Contestant(
        usual(lambda m, _, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9)), powers(1e-3)
    ),
    "AdamW": Contestant(usual(lambda m, _, lr: torch.optim.AdamW(m.parameters(), lr)), powers(1e-4)),
    "Muon": Contestant(
        usual(
            lambda m, _, lr: torch.optim.Muon(matrices(m), lr, weight_decay=0.0),
            lambda m, _, lr: torch.optim.AdamW(others(m), lr / 10),
        ),
        powers(1e-3),
    ),
    "K-FAC": Contestant(kfac, powers(1e-4)),
    "Woodbury": Contestant(woodbury(), powers(1e-2)),
    "Woodbury, M = I": Contestant(woodbury("identity"), powers(1e-2)),
    "Woodbury, momentum .9": Contestant(woodbury(momentum=0.9), powers(1e-3)),
}
