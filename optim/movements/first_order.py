"""Baselines: any torch optimizer as the inner solver, on the gradient of the proximal objective."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.movements.inner import InnerProblem


@dataclass(frozen=True)
class FirstOrder:
    """``factory``: parameters → optimizer, ``lambda params: torch.optim.Adam(params, lr=1e-3)``; an iteration is one step.

    ``keep``: one optimizer, with its moments, for all outer steps; otherwise a new one for each. ``closure``: for those that
    ask for one (LBFGS). Raises TypeError unless ``factory`` is callable, and when it does not make a torch optimizer;
    ValueError for an optimizer that moves parameters of another model, or asks for a closure where ``closure`` is False.

    >>> FirstOrder(lambda params: torch.optim.SGD(params, lr=0.1)).keep
    False
    """

    factory: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    keep: bool = False
    closure: bool = False

    def __post_init__(self):
        if not callable(self.factory):
            raise TypeError(
                f"FirstOrder takes a function from parameters to an optimizer, lambda p: Adam(p); got {self.factory!r}"
            )

    def session(self, model: nn.Module) -> "FirstOrderSession":
        """The solver at work on ``model``; one optimizer is made, so that a bad one is refused at once."""
        return FirstOrderSession(self, model)


class FirstOrderSession:
    """The optimizer between outer steps."""

    def __init__(self, settings: FirstOrder, model: nn.Module):
        self.settings, self.model = settings, model
        self.optimizer: torch.optim.Optimizer | None = self._make()

    def _make(self) -> torch.optim.Optimizer:
        made = self.settings.factory([p for p in self.model.parameters() if p.requires_grad])
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"factory must return a torch optimizer, got {type(made).__name__}")
        own = {id(p) for p in self.model.parameters()}
        moved = [p for group in made.param_groups for p in group["params"]]
        strange = sum(id(p) not in own for p in moved)
        if strange:
            raise ValueError(
                f"{strange} of the {len(moved)} parameters of the {type(made).__name__} that factory returned are not the "
                "model's; write FirstOrder(lambda params: Adam(params, lr=…)) with the parameters it is given"
            )
        asked = inspect.signature(made.step).parameters.get("closure")
        if asked is not None and asked.default is inspect.Parameter.empty and not self.settings.closure:
            raise ValueError(f"{type(made).__name__}.step asks for a closure; write FirstOrder(…, closure=True)")
        return made

    def iterate(self, problem: InnerProblem) -> Iterator[Tensor]:
        optimizer = self.optimizer or self._make()
        self.optimizer = optimizer if self.settings.keep else None
        gradients = {p: p.grad for p in problem.params.values()}
        try:
            if self.settings.closure:
                yield from self._by_closure(optimizer, problem)
            else:
                yield from self._steps(optimizer, problem)
        finally:
            for p, g in gradients.items():
                p.grad = g

    def _steps(self, optimizer: torch.optim.Optimizer, problem: InnerProblem) -> Iterator[Tensor]:
        with torch.enable_grad():
            u = problem.outputs()
        while True:
            optimizer.zero_grad()
            with torch.enable_grad():
                problem.objective(u).backward()
                problem.gradients += 1
                optimizer.step()
                u = problem.outputs()  # of this iteration, and what the next one differentiates
            yield u.detach()

    def _by_closure(self, optimizer: torch.optim.Optimizer, problem: InnerProblem) -> Iterator[Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = problem.objective(problem.outputs())
            loss.backward()
            problem.gradients += 1
            return loss

        while True:
            with torch.enable_grad():
                optimizer.step(evaluate)
            with torch.no_grad():
                u = problem.outputs()
            yield u
