"""The trial moves of a trust region: try, compare with what was foretold, undo, try with more damping."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn

from optim.options.damping import LevenbergMarquardt, Trial, decrease_ratio


def trust_region(
    trust: LevenbergMarquardt,
    damping: float,
    growth: float,
    propose: Callable[[float, bool], tuple],
    evaluate: Callable[[Mapping[str, Tensor]], Tensor | float],
    loss: Tensor | float,
) -> tuple[object | None, float, float, tuple[Trial, ...]]:
    """(the move that was taken, or None; λ and ν for the next step; all trials).

    ``propose(λ, first)`` gives (move, new values by name, predicted decrease, added decrease); the last, by terms of the
    objective that ``loss`` does not hold, counts on both sides. ``evaluate(values)`` is the loss there.

    >>> trust = LevenbergMarquardt(start=1e-3)
    >>> h = lambda w: 0.5 * (w**2 - 2) ** 2  # g = 2w(w² − 2), C = 4w²
    >>> def propose(damping, first, w=0.1):
    ...     g, C = 2 * w * (w * w - 2), 4 * w * w
    ...     move = -g / (C + damping)
    ...     return w + move, {"w": w + move}, -g * move - C * move**2 / 2, 0.0
    >>> w, damping, growth, trials = trust_region(trust, 1e-3, 2.0, propose, lambda new: h(new["w"]), h(0.1))
    >>> [trial.taken for trial in trials], h(w) < h(0.1)
    ([False, False, False, False, True], True)
    """
    start, trials = _number(loss), []
    for k in range(trust.trials):
        move, values, predicted, added = propose(damping, k == 0)
        reached = evaluate(values)
        actual = start - _number(reached) + added
        rounding = 8 * _eps(reached) * max(abs(start), abs(_number(reached)))
        ratio = decrease_ratio(actual, predicted + added, rounding)
        trials.append(Trial(damping, predicted + added, actual, ratio, trust.accepts(ratio)))
        damping, growth = trust.adjusted(damping, growth, ratio)
        if trials[-1].taken:
            return move, damping, growth, tuple(trials)
    return None, damping, growth, tuple(trials)


@contextmanager
def parameters_at(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model at other values of some parameters, without gradients; afterwards everything is as before, bit for bit.

    Parameters, their gradients (the same tensors) and buffers are put back, also after an error.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> before = model.weight.detach().clone()
    >>> with parameters_at(model, {"weight": torch.full((1, 1), 7.0)}):
    ...     model(torch.ones(1, 1)).item()
    7.0
    >>> torch.equal(model.weight, before)
    True
    """
    params = dict(model.named_parameters())
    kept = {name: params[name].detach().clone() for name in values}
    gradients = {name: p.grad for name, p in params.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            for name, value in values.items():
                params[name].copy_(value)
        for p in params.values():
            p.grad = None
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                params[name].copy_(value)
            for buffer, value in buffers:
                buffer.copy_(value)
        for name, p in params.items():
            p.grad = gradients[name]


def _number(loss: Tensor | float) -> float:
    if not isinstance(loss, Tensor | Real):
        raise TypeError(f"a trust region's closure must return the loss, a number; it returned {loss!r}")
    return loss.item() if isinstance(loss, Tensor) else float(loss)


def _eps(loss: Tensor | float) -> float:
    return torch.finfo(loss.dtype).eps if isinstance(loss, Tensor) and loss.is_floating_point() else 2.0**-52
