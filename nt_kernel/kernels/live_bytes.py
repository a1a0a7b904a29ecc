"""How many bytes of tensors a computation holds at once, counted while it runs: on real tensors or, for free, on meta ones."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What these allocate inside themselves no mode can see. Convolutions unfold or reorder what they read and write; matrix
# products copy what has no unit stride.
_CONVOLUTIONS = {aten.convolution, aten.convolution_backward, aten._convolution}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is on: ``live`` bytes now, ``peak`` at most.

    What was there before does not count, nor do views. Inside ``torch.func`` transforms the tensors seen are those that are
    stored. The scratch space of convolutions and strided matrix products enters the peak as an estimate: the size of what
    they read and write.

    >>> with LiveBytes() as seen:
    ...     kept = torch.zeros(1000, dtype=torch.float64) + 1
    >>> seen.peak, seen.live
    (16000, 8000)
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, object] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in before:
            self._meet(t, made=False)
        out = func(*args, **kwargs)
        after = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for t in after:
            self._meet(t, made=True)
        self.peak = max(self.peak, self.live + _scratch(func, before, after))
        return out

    def _meet(self, t: Tensor, made: bool) -> None:
        if t.layout != torch.strided:  # sparse tensors have no storage of their own
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0

        def gone() -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.finalize(storage, gone)
        self.live += size


def _scratch(func, before: list[Tensor], after: list[Tensor]) -> int:
    packet = getattr(func, "overloadpacket", func)
    if packet in _CONVOLUTIONS:
        return sum(t.numel() * t.element_size() for t in (*before, *after))
    if packet in _PRODUCTS:
        return sum(t.numel() * t.element_size() for t in before if t.dim() > 1 and 1 not in t.stride()[-2:])
    return 0
