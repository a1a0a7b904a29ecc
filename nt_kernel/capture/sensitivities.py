"""The sensitivities of all outputs: one batched pass, one pass for each output, or none where a chain rule gives them.

A pass is a :class:`PullBack`: ∂⟨v, y⟩/∂z of every captured call for a v [N, C]; one v serves all samples, because samples do
not interact. There are two of them. Under ``torch.func`` transforms (stacked twins) it is ``torch.func.vjp``; else autograd's
own engine, at less cost a call and without the record of the backward pass that ``torch.func`` keeps.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nt_kernel.capture.contraction import Contraction
from nt_kernel.capture.site import Site

# From this many entries of all δ of one output on, a pass for each output is faster than one batched pass for all: what it
# works on stays in the cache, and no derivative is expanded by its batching rule.
ONE_BY_ONE = 2**18

Deltas = dict[int, Tensor]  # by call
Sums = dict[int, dict[str, Tensor]]  # Jacobians of "weight" and "bias" by call


class PullBack(Protocol):
    """A backward pass over what was captured."""

    def one(self, v: Tensor) -> Deltas:
        """∂⟨v, y⟩/∂z of every call, as called, for v [N, C]."""

    def several(self, v: Tensor) -> Deltas | None:
        """The same for v [R, N, C], [R, …] each; None where that cannot be batched."""

    def one_by_one(self, unit: Tensor, contraction: Contraction) -> tuple[Deltas, Sums]:
        """The same as ``several``, an output at a time; and the Jacobians of the contracted calls instead of their δ."""


def sensitivities(pull_back: PullBack, y: Tensor, contraction: Contraction, size: int) -> tuple[Deltas, Sums]:
    """∂y_{ic}/∂z of every call for every output, [C, …], and what the contraction makes of the others.

    ``size`` is the number of entries of all δ of one output.
    """
    N, C = y.shape
    if C == 1:
        deltas = {i: delta[None] for i, delta in pull_back.one(torch.ones_like(y)).items()}
        return deltas, contraction(deltas)
    unit = torch.eye(C, dtype=y.dtype, device=y.device)[:, None, :].expand(-1, N, -1)  # [C, N, C]
    if size < ONE_BY_ONE:
        deltas = pull_back.several(unit)
        if deltas is not None:
            return deltas, contraction(deltas)
    return pull_back.one_by_one(unit, contraction)


class Functional:
    """The pull-back of ``torch.func.vjp`` with respect to zeros added to the calls' results."""

    def __init__(self, pull_back: Callable[[Tensor], tuple[Deltas]]):
        self._pull_back = pull_back

    def one(self, v: Tensor) -> Deltas:
        return self._pull_back(v)[0]

    def several(self, v: Tensor) -> Deltas:
        return torch.func.vmap(self._pull_back)(v)[0]

    def one_by_one(self, unit: Tensor, contraction: Contraction) -> tuple[Deltas, Sums]:
        kept: dict[int, list[Tensor]] = {}
        sums: list[Sums] = []
        for v in unit:
            found = self.one(v)
            sums.append(contraction({i: found.pop(i)[None] for i in contraction.sites}))
            for i, delta in found.items():
                kept.setdefault(i, []).append(delta)
        joined = {
            i: {side: torch.cat([each[i].pop(side) for each in sums], 1) for side in sides}
            for i, sides in contraction.wanted.items()
        }
        return {i: torch.stack(deltas) for i, deltas in kept.items()}, joined


class Tape:
    """The pull-back of autograd's own graph. A zero is added to a call's result only where it has no place there.

    The place is noted at the moment of the call, so that a later in-place function on the result does no harm.
    """

    def __init__(self, sites: Sequence[Site], like: Tensor):
        self.shapes = {site.index: site.shape for site in sites if not site.is_output}
        self.like = like
        self.edges: dict[int, GradientEdge] = {}
        self.y: Tensor | None = None

    def through(self, index: int, out: Tensor) -> Tensor:
        """What the model goes on with after a call."""
        if index not in self.shapes:
            return out
        at = out
        # Nothing differentiable yet; complex numbers; a view, whose place in the graph an in-place function takes away.
        if not out.requires_grad or out.dtype != self.like.dtype or out._is_view():
            at = self.like.new_zeros(()).expand(out.shape).requires_grad_()
            out = out + at.to(out.dtype)
            at = out if out.requires_grad and out.dtype == self.like.dtype else at
        with torch.enable_grad():  # the model may have it off
            self.edges[index] = get_gradient_edge(at)
        return out

    def one(self, v: Tensor) -> Deltas:
        return self._gradients(v)

    def several(self, v: Tensor) -> Deltas | None:
        try:
            return self._gradients(v, is_grads_batched=True)
        except RuntimeError:  # not every derivative of torch can be batched (group_norm's of channels-last input)
            return None

    def _gradients(self, v: Tensor, **options) -> Deltas:
        found = [None] * len(self.edges)
        if self.y.requires_grad and self.edges:
            at = list(self.edges.values())
            found = torch.autograd.grad(self.y, at, v, retain_graph=True, allow_unused=True, **options)
        return {
            i: self.like.new_zeros(*v.shape[:-2], *self.shapes[i]) if delta is None else delta.detach()
            for i, delta in zip(self.edges, found, strict=True)
        }

    def one_by_one(self, unit: Tensor, contraction: Contraction) -> tuple[Deltas, Sums]:
        C, buffers, sums = len(unit), {}, {i: {} for i in contraction.sites}
        for c, v in enumerate(unit):
            found = self.one(v)
            for i in list(found):
                delta = found.pop(i)
                width = min(contraction.together(i), C) if i in sums else C
                gathered = delta[None]
                if width > 1:
                    if c == 0:
                        buffers[i] = _buffer(delta, width)
                    buffers[i][c % width].copy_(delta)
                    gathered = buffers[i][: c % width + 1]
                if i in sums and (len(gathered) == width or c + 1 == C):
                    for side, J in contraction.of(i, gathered).items():
                        if side not in sums[i]:
                            sums[i][side] = J.new_empty(J.shape[0], C, *J.shape[2:])
                        sums[i][side][:, c + 1 - len(gathered) : c + 1] = J
        return {i: buffer for i, buffer in buffers.items() if i not in sums}, sums


def _buffer(delta: Tensor, outputs: int) -> Tensor:
    """An empty [outputs, …] whose memory keeps the order of δ's entries, outputs just outside the innermost dimension.

    That is [N, positions, C, features] for a convolution in channels-last format: what its products want to read.
    """
    spread = all(delta.stride())  # a repeated dimension has no place in memory
    order = sorted(range(delta.dim()), key=delta.stride, reverse=True) if spread else [*range(delta.dim())]
    sizes = [delta.shape[k] for k in order]
    buffer = delta.new_empty(*sizes[:-1], outputs, sizes[-1])
    back = [order.index(k) for k in range(len(order))]
    last = len(order) - 1
    return buffer.permute(last, *(k + (k == last) for k in back))
