"""K stacked networks in one step: pure functions of (parameters, state), by Woodbury or by any first-order rule.

The parameters of all networks are {name: [K, …]}, what a method remembers between steps is a :class:`StackedState`; buffers
and frozen parameters are the model's own, shared by all. Twins, seeds and restarts train so in one batch of operations, with
the numbers of K separate runs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, call_model, select_samples
from nt_kernel.capture.probe import split_state
from optim.stacks.first_order import Memory, Rule
from optim.stacks.stacked_woodbury import Loss, Stack, WoodburyStep


@dataclass(frozen=True)
class StackedState:
    """``step``: steps taken. ``memory``: {what: {parameter: [K, …]}}: "momentum", or "mean" and "square" of Adam."""

    step: int = 0
    memory: Memory = field(default_factory=dict)


def stacked_step(
    model: nn.Module,
    params: Stack,
    state: StackedState,
    x,
    targets: Tensor,
    loss: Loss,
    method: WoodburyStep | Rule,
    *,
    shared: bool = False,
    chunk: int | None = None,
) -> tuple[dict[str, Tensor], StackedState]:
    """One step of K networks on their own data; pure: new parameters and a new state, nothing written to.

    Parameters
    ----------
    model: the architecture, with its buffers and frozen parameters; its own parameter values are not used.
    params: {trainable parameter: [K, …]} (:func:`stack_parameters`); state: ``StackedState()`` before the first step.
    x, targets: [K, N, …], x a tensor or a tuple of them; with ``shared`` [N, …], the same for all.
    loss: h of one network, mapped over the stack by ``torch.func.vmap``; for Woodbury's usual scale a mean over samples.
    method: a :class:`WoodburyStep`, or a first-order rule (``gradient_descent``, ``adam``, your own).
    chunk: networks at a time. It bounds the memory; results differ by rounding, and by the tolerance of conjugate
        gradients where solver="auto" finds another solver cheaper for another number of networks.

    A parameter that the outputs do not depend on has gradient zero here, where torch has None: Woodbury leaves it alone, a
    rule decays it. Raises ValueError/TypeError for a stack, data or options that do not fit, ``StepTooLargeError`` for a
    step that one of the networks does not bear, ``NumericalError``.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> params, state = {"weight": torch.tensor([[[0.0]], [[1.0]]])}, StackedState()
    >>> x, targets = torch.full((1, 1), 2.0), torch.full((1, 1), 2.0)  # y = 2w: the second network is done
    >>> half_square = lambda y, a: 0.5 * (y - a).square().sum(1).mean()
    >>> method = WoodburyStep(lr=1.0)
    >>> params, state = stacked_step(model, params, state, x, targets, half_square, method, shared=True)
    >>> params["weight"].flatten().tolist(), state.step  # 2·2/(1 + 2²)
    ([0.800000..., 1.0], 1)
    """
    params, x, targets, K = _stack(model, params, x, targets, shared)
    if not isinstance(method, WoodburyStep) and not callable(method):
        raise TypeError(
            f"method must be a WoodburyStep or a rule (optim.stacks.first_order), got {type(method).__name__}"
        )
    for what, held in state.memory.items():
        if any(len(t) != K for t in held.values()):  # one network's memory would be broadcast over the others
            raise ValueError(f"state is not that of this stack of K = {K}: its {what!r} holds {_shapes(held)}")
    advance = method.advance if isinstance(method, WoodburyStep) else _by_rule(method, state.step)
    after: dict[str, Tensor] = {}
    remembered: dict[str, dict[str, Tensor]] = {}

    def take(runs: slice) -> None:  # a function, so that nothing of one chunk is held while the next one is computed
        memory = {what: {name: t[runs] for name, t in held.items()} for what, held in state.memory.items()}
        own = {name: p[runs] for name, p in params.items()}
        moved, memory = advance(model, own, memory, select_samples(x, runs), targets[runs], loss)
        _keep(after, moved, runs, K)
        for what, held in memory.items():
            _keep(remembered.setdefault(what, {}), held, runs, K)

    for runs in _chunks(K, chunk):
        take(runs)
    return after, StackedState(state.step + 1, remembered)


def stacked_gradients(
    model: nn.Module, params: Stack, x, targets: Tensor, loss: Loss, *, shared: bool = False, chunk: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(∇h by parameter name [K, …], h [K]) of K networks, by ``vmap(grad)``; arguments as of :func:`stacked_step`.

    >>> params = stack_parameters(nn.Linear(1, 1, bias=False), 2)
    >>> params = {name: torch.zeros_like(p) for name, p in params.items()}  # y = 0
    >>> x, targets = torch.ones(2, 1, 1), torch.tensor([[[1.0]], [[3.0]]])
    >>> loss = lambda y, a: 0.5 * (y - a).square().sum(1).mean()
    >>> gradients, h = stacked_gradients(nn.Linear(1, 1, bias=False), params, x, targets, loss)
    >>> gradients["weight"].flatten().tolist(), h.tolist()
    ([-1.0, -3.0], [0.5, 4.5])
    """
    params, x, targets, K = _stack(model, params, x, targets, shared)
    _chunks(K, chunk)
    return _gradients(model, params, x, targets, loss, chunk)


def _gradients(model, params: Stack, x: tuple, targets: Tensor, loss: Loss, chunk: int | None = None):
    _, fixed = split_state(model)

    def h(values: Stack, points: tuple, a: Tensor) -> Tensor:
        return loss(call_model(model, {**values, **fixed}, points), a)

    return torch.func.vmap(torch.func.grad_and_value(h), chunk_size=chunk)(params, x, targets)


def stack_parameters(model: nn.Module, K: int) -> dict[str, Tensor]:
    """The trainable parameters of ``model``, K times, {name: [K, …]}: K networks at one start.

    >>> {name: tuple(p.shape) for name, p in stack_parameters(nn.Linear(2, 3), 4).items()}
    {'weight': (4, 3, 2), 'bias': (4, 3)}
    """
    if isinstance(K, bool) or not isinstance(K, int) or K < 1:
        raise ValueError(f"K must be an int of at least 1, got {K!r}")
    params, _ = split_state(model)
    return {name: p.expand(K, *p.shape).clone() for name, p in params.items()}


def _by_rule(rule: Rule, step: int):
    def advance(model, params: Stack, memory: Memory, x: tuple, targets: Tensor, loss: Loss):
        gradients, _ = _gradients(model, params, x, targets, loss)
        moved, memory = torch.func.vmap(lambda p, g, m: rule(p, g, m, step))(params, gradients, memory)
        if set(moved) != set(params):
            raise ValueError(f"the rule returned the parameters {', '.join(moved)}; expected {', '.join(params)}")
        return moved, memory

    return advance


def _stack(model, params: Stack, x, targets: Tensor, shared: bool) -> tuple[dict[str, Tensor], tuple, Tensor, int]:
    """Everything with its leading K, detached, x as a tuple; raises for what does not fit together."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    if not shapes:
        raise ValueError("the model has no trainable parameters (all have requires_grad=False)")
    if params.keys() != shapes.keys():
        wrong = sorted(params.keys() ^ shapes.keys())
        raise ValueError(
            f"params must hold the model's trainable parameters, stacked; {', '.join(map(repr, wrong))} "
            f"{'is' if len(wrong) == 1 else 'are'} in one of them only"
        )
    heights = {len(p) if p.dim() == len(shapes[name]) + 1 else None for name, p in params.items()}
    (K,) = heights if len(heights) == 1 else (None,)
    if not K or any(p.shape[1:] != shapes[name] for name, p in params.items()):
        raise ValueError("params must be [K, *shape of the parameter] with one K >= 1; got " + _shapes(params))
    x = as_inputs(x)
    if shared:
        x, targets = tuple(t.expand(K, *t.shape) for t in x), targets.expand(K, *targets.shape)
    data = {**{f"x[{i}]" if len(x) > 1 else "x": t for i, t in enumerate(x)}, "targets": targets}
    if any(t.dim() < 2 or len(t) != K for t in data.values()):
        raise ValueError(
            f"x and targets must be [K, N, …] with K = {K}; got {_shapes(data)}; for [N, …] write shared=True"
        )
    return {name: p.detach() for name, p in params.items()}, x, targets, K


def _shapes(tensors: Stack) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


def _chunks(K: int, chunk: int | None) -> list[slice]:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an int of at least 1, or None for all networks at once; got {chunk!r}")
    return [slice(start, min(start + (chunk or K), K)) for start in range(0, K, chunk or K)]


def _keep(whole: dict[str, Tensor], piece: Stack, runs: slice, K: int) -> None:
    """Write the networks ``runs`` into the whole stack, made on first use: concatenation would hold everything twice."""
    for name, t in piece.items():
        if len(t) == K:
            whole[name] = t
            continue
        if name not in whole:
            whole[name] = t.new_empty(K, *t.shape[1:])
        whole[name][runs] = t
