"""The Woodbury step of K stacked networks: direction, step check, momentum and decay, pure."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from nt_kernel.capture.observe import call_model, select_samples
from nt_kernel.capture.probe import split_state
from nt_kernel.factors import stacked_layer_factors
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import (
    check_scale,
    check_solver,
    model_mass,
    resolve_blocks,
    solve_metric,
)
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from optim.stacks.first_order import Memory, move_all
from optim.steps.direction import step_systems, woodbury_direction
from optim.steps.step_check import checked_step
from optim.steps.step_limit import auto_lr, check_lr
from optim.steps.update import Update

Stack = Mapping[str, Tensor]  # {parameter: [K, …]}
Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs as the model gives them, targets) of one network → h


@dataclass(frozen=True, eq=False)
class WoodburyStep:
    """The step of :class:`optim.Woodbury` for stacks, each network with its own metric; its options mean the same there.

    ``check_step`` refuses a step that is too large for any one of them. Raises as the class does for bad hyperparameters.

    >>> from dataclasses import replace
    >>> method = WoodburyStep(lr=0.1, mass=0.01, momentum=0.9)
    >>> replace(method, lr=0.05).lr  # a schedule: another method for each step
    0.05
    """

    lr: float | str = 0.1
    _: KW_ONLY
    mass: Mass = 1.0
    output_metric: "str | OutputMetric | Callable" = "identity"
    scale: str = "mean"
    blocks: str = "layer"
    solver: str = "auto"
    check_step: bool = True
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: str = "decoupled"

    def __post_init__(self):
        check_lr(self.lr)
        check_scale(self.scale)
        check_solver(self.solver)
        resolve_blocks({}, self.blocks)
        resolve_output_metric(self.output_metric)
        self.update(1)

    def update(self, blocks: int) -> Update:
        """How a direction moves the parameters, lr="auto" resolved for this number of metric blocks."""
        lr = auto_lr(blocks, self.scale) if self.lr == "auto" else float(self.lr)
        return Update(lr, self.momentum, self.dampening, self.nesterov, self.weight_decay, self.decay)

    def advance(self, model, params: Stack, memory: Memory, x: tuple, targets: Tensor, loss: Loss):
        """(parameters, memory) after one step of the stack; arguments as of :func:`optim.stacks.stacked.stacked_step`."""
        y, factors = stacked_layer_factors(model, params, x)
        masses, metric = model_mass(factors, self.mass), resolve_output_metric(self.output_metric)
        blocks = resolve_blocks(factors, self.blocks)
        update = self.update(len(blocks))
        inners = step_systems(blocks, y, masses, self.scale, metric, self.solver)
        if self.check_step:
            checked_step(blocks, inners, y, self.scale, metric, dict.fromkeys(params, update), masses)
        direction = woodbury_direction(blocks, inners, _output_gradient(model, params, x, y, targets, loss), masses)
        if update.decay == "riemannian" and update.weight_decay:
            for name, factor in blocks.items():
                decay = {p: update.weight_decay * params[p] for p in factor.shapes}
                for p, extra in solve_metric(factor, inners[name], decay, masses).items():
                    direction[p] = direction[p] + extra
        unused = {p for f in factors.values() for p, kind in f.kinds.items() if kind == "unused"}
        moved, memory = move_all({n: p for n, p in params.items() if n not in unused}, direction, memory, update)
        return {n: moved[n] if n in moved else p.clone() for n, p in params.items()}, memory


def _output_gradient(model, params: Stack, x: tuple, y: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """∂h/∂y [K, N, C]. The loss sees outputs in the model's own shape: [N] against [N, 1] would broadcast in silence."""
    _, fixed = split_state(model)
    one = {name: p[0] for name, p in params.items()}
    shape = call_model(model, {**one, **fixed}, select_samples(select_samples(x, 0), slice(0, 1))).shape[1:]
    gradient = torch.func.grad(lambda y, a: loss(y.unflatten(-1, shape) if shape else y[..., 0], a))
    return torch.func.vmap(gradient)(y, targets)
