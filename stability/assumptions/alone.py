"""The run on S by itself: twice, to see whether the bits are the same; and against the continuous flow."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import run_model
from nt_kernel.capture.probe import split_state
from nt_kernel.metric.model_metric import ModelMetric
from optim.flow import metric_flow
from stability.assumptions.optimizer import Steps
from stability.assumptions.verdict import Assumption
from stability.assumptions.verdicts import verdict_on

FLOWS = ("halving", "ode")
PASSES = 4  # a rare noise may spare two passes


@dataclass(frozen=True)
class Alone:
    """Outputs of the run on S, [T + 1, n, p], and where it ended."""

    outputs: Tensor
    end: dict[str, Tensor]


def run_alone(model: nn.Module, x: Tensor, targets: Tensor, steps: Steps, lr: float, count: int) -> Alone:
    """``count`` steps θ ← θ − lr·G⁻¹∇h of squared loss; nothing of the model is changed.

    Raises NumericalError where an inner system fails.
    """
    params, fixed = split_state(model)
    params = {name: p.detach().clone() for name, p in params.items()}
    outputs = []
    for t in range(count + 1):
        y = run_model(model, {**params, **fixed}, x).detach()
        outputs.append(y.reshape(targets.shape))
        if t < count:
            metric = ModelMetric(model, x, params=params, solver="cholesky", **steps.metric)
            direction = metric.direction((metric.outputs - targets.double()) / len(x))
            params = {name: torch.add(p, direction[name].to(p), alpha=-lr) for name, p in params.items()}
    return Alone(torch.stack(outputs), params)


def determinism(model: nn.Module, x: Tensor) -> Assumption:
    """Forward and backward pass give the same bits every time: dropout, noise and hidden state are found here."""
    seen, (parameters, fixed) = [], split_state(model)
    fixed = {name: b.clone() for name, b in fixed.items()}  # a forward may write to them
    parameters = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        for _ in range(PASSES):
            y = run_model(model, {**parameters, **fixed}, x)
            gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()), allow_unused=True)
            seen.append((y.detach(), gradients))
    outputs = torch.stack([y for y, _ in seen])
    gap = (outputs - outputs[0]).abs().amax((0, 2))  # [N]
    if gap.max() > 0:
        reason = "forward passes differ: noise or hidden state in the forward (dropout in train mode?)"
        return verdict_on("determinism", gap.max().item(), 0.0, "violated", reason, step=0, sample=int(gap.argmax()))
    for name, *gradients in zip(parameters, *(g for _, g in seen), strict=True):
        gap = 0.0 if gradients[0] is None else max((g - gradients[0]).abs().max().item() for g in gradients)
        if gap > 0:
            reason = "backward passes differ: set torch.use_deterministic_algorithms(True) to find the operation"
            layer = name.rpartition(".")[0] or "."
            return verdict_on("determinism", gap, 0.0, "violated", reason, step=0, layer=layer)
    reason = f"forward and backward pass, {PASSES} times, bit for bit"
    return verdict_on("determinism", 0.0, 0.0, "holds", reason, step=0)


def same_bits(first: Alone, second: Alone) -> Assumption:
    """The same run twice: outputs at every step and the parameters at the end, bit for bit."""
    gap = (first.outputs - second.outputs).abs().flatten(2).amax(-1)  # [T + 1, n]
    if bool((gap > 0).any()):
        step = int((gap > 0).any(1).nonzero()[0])
        reason = "the same run came out differently the second time"
        where = {"step": step, "sample": int(gap[step].argmax())}
        return verdict_on("determinism", gap.max().item(), 0.0, "violated", reason, **where)
    steps = len(first.outputs) - 1
    return verdict_on("determinism", 0.0, 0.0, "holds", f"{steps} steps run twice, bit for bit the same")


def followed(
    model: nn.Module, x: Tensor, targets: Tensor, steps: Steps, lr: float, run: Alone, limit: float, how: str
) -> Assumption:
    """The run stays near the flow θ̇ = −G⁻¹∇h, relative to how far the outputs move.

    ``how``: "ode", the flow integrated to 1e-9 (float64); "halving", twice the distance to the run of half the step.
    **Derived**: Euler's error at a fixed time is C·lr + O(lr²), so y_lr − y_{lr/2} = C·lr/2 + O(lr²), half of it.
    """
    count = len(run.outputs) - 1
    if how == "ode":
        times = [lr * t for t in range(count + 1)]
        half_squares = lambda y: 0.5 * (y.reshape(targets.shape) - targets).square().sum(-1)  # noqa: E731
        flow = metric_flow(model, None, x, half_squares, times, solver="cholesky", **steps.metric)
        fixed = split_state(model)[1]
        there = torch.stack([run_model(model, {**p, **fixed}, x).detach().reshape(targets.shape) for p in flow.path])
        error = run.outputs - there
    else:
        there = run_alone(model, x, targets, steps, lr / 2, 2 * count).outputs[::2]
        error = 2 * (run.outputs - there)
    errors = error.flatten(2).norm(dim=-1)  # [T + 1, n]
    moved = (there - there[0]).flatten(1).norm(dim=-1).max().item()
    step = int(errors.norm(dim=-1).argmax())
    value = errors[step].norm().item() / moved if moved > 0 else 0.0
    place = {"step": step, "sample": int(errors[step].argmax())}
    what = "the ODE, integrated to 1e-9" if how == "ode" else "twice the distance to the run of half the step"
    if not math.isfinite(value):
        return verdict_on("gradient_flow", value, limit, "undecided", f"{what} is not finite", **place)
    verdict = "holds" if value <= limit else "violated"
    return verdict_on("gradient_flow", value, limit, verdict, what, **place)
