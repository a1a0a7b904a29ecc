"""What a forward pass does with the parameters: the calls that are known, and the uses that are not.

A parameter that enters anything but a known call is *hidden*: its Jacobian is formed explicitly, whatever the numbers of the
moment say. The order of the known calls is the pass's *path*, by which a plan is recognised as out of date.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nt_kernel.capture.structures import structure_of
from nt_kernel.capture.transparent import composition_of, run_batchable
from nt_kernel.products.dense import linear

# What these return does not depend on the values in their argument, to first order.
_FREE = {
    Tensor.detach,
    torch.detach,
    Tensor.data.__get__,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
    Tensor.new_tensor,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
}
# After these the data decide which sample stands where.
_SELECTS = {
    torch.nonzero,
    Tensor.nonzero,
    torch.masked_select,
    Tensor.masked_select,
    torch.sort,
    Tensor.sort,
    torch.argsort,
    Tensor.argsort,
    torch.unique,
    torch.repeat_interleave,
    Tensor.repeat_interleave,
}


class Watch(TorchFunctionMode):
    """Sees the registered calls on the named parameters in their order, and hands each result to ``see``.

    ``see(index, structure, call, weight, bias, out)`` returns what the model goes on with. Without ``see`` the mode only
    makes fused functions transparent. With ``cut``, autograd does not follow from a linear layer's result to its input.
    """

    def __init__(self, names: dict[int, str] | None = None, see: Callable | None = None, cut: bool = False):
        super().__init__()
        self.cut = cut
        self.names, self.see = names or {}, see
        self.path: list[tuple] = []  # (structure, weight, bias, options) of every call seen
        self.outs: list[tuple[Tensor, int | None]] = []
        self.hidden: set[str] = set()  # names that something else than a seen call used
        self.volatile = False
        self.level = transform_level()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        composed = composition_of(func)
        if composed is not None:
            with self:
                out = composed(*args, **kwargs)
            if out is not NotImplemented:
                return out
        used = self._used(args, kwargs) if self.see else ()
        if self.cut and used and func is F.linear and args:
            out = linear(args[0].detach(), *args[1:], **kwargs)
        else:
            out = run_batchable(func, args, kwargs)
        self.volatile |= func in _SELECTS or (func is Tensor.__getitem__ and _by_mask(args[1]))
        if not used:
            return out
        call, structure = None, structure_of(func)
        if structure and isinstance(out, Tensor) and transform_level() == self.level:
            if structure.commutes and args and id(args[0]) in self.names:
                args = (*args[1:2], args[0], *args[2:])
            try:
                call = structure.bind(*args, **kwargs)
            except TypeError:  # names of arguments that the structure does not know
                call = None
        weight, bias = (self.names.get(id(t)) for t in (call.weight, call.bias)) if call else (None, None)
        self.hidden |= used - {weight, bias} if _depends(func, args, out) else set()
        if weight is None and bias is None:
            return out
        out = self.see(len(self.path), structure, call, weight, bias, out)
        self.path.append((structure, weight, bias, call.options))
        self.outs.append((out, write_count(out)))
        return out

    def _used(self, args: tuple, kwargs: dict) -> set[str]:
        flat = [*args, *kwargs.values()]
        flat += [t for several in flat if isinstance(several, tuple | list) for t in several]
        return {self.names[id(t)] for t in flat if id(t) in self.names}

    def final(self, result) -> int | None:
        """The call whose result, not written to since, is ``result``."""
        for index, (out, count) in enumerate(self.outs):
            if out is result and count is not None and count == write_count(out):
                return index
        return None


def _depends(func, args, out) -> bool:
    """True where a tensor came out that may depend on a parameter that went in."""
    if func in _FREE or out is NotImplemented:
        return False
    leaves = out if isinstance(out, tuple | list) else (out,)
    return any(
        isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) and all(t is not a for a in args)
        for t in leaves
    )


def _by_mask(index) -> bool:
    parts = index if isinstance(index, tuple | list) else (index,)
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in parts)


def transform_level():
    """How many torch.func transforms are being run."""
    return torch._C._functorch.maybe_current_level()


def write_count(out: Tensor) -> int | None:
    """How often ``out`` was written to in place; None where torch does not count (inference mode)."""
    return None if out.is_inference() else out._version
