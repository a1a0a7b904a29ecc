"""Which rows of S a step trained on, read off the forward passes of the model whose output received a gradient."""

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, observing

Rows = Tensor | None  # indices into S; None: all of them, in order


class RowFinder:
    """Rows of x by their bytes. Equal rows have one index, the first: their outputs, and e, are equal too.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> finder = RowFinder(x)
    >>> finder.rows([x[[2, 0]]]), finder.rows([x]), finder.rows([x + 0.5])
    (tensor([2, 0]), None, 'not rows of x')
    """

    def __init__(self, x):
        self.size = len(as_inputs(x)[0])
        self._index: dict[bytes, int] = {}
        for i, key in enumerate(_keys(x)):
            self._index.setdefault(key, i)

    def rows(self, batches: list) -> "Rows | str":
        """The rows of several passes together; what is wrong, in words, where they are none."""
        if not batches:
            return "no forward pass of the model received a gradient"
        try:
            found = [self._index.get(key, -1) for x in batches for key in _keys(x)]
        except (
            ValueError,
            TypeError,
            IndexError,
            RuntimeError,
        ):  # inputs of another make: not for a recorder to refuse
            return "not rows of x"
        if not found:
            return "the model was called without positional inputs"
        if -1 in found:
            return "not rows of x"
        if len(found) == self.size and found == self._all():
            return None
        return torch.tensor(found)

    def _all(self) -> list[int]:
        return list(range(self.size)) if len(self._index) == self.size else [-1]


class RowWatch:
    """A forward hook that collects the inputs of training passes until :meth:`take`; :meth:`close` removes it."""

    def __init__(self, model: nn.Module):
        self._seen: list = []
        self._handle = model.register_forward_hook(self._passed)

    def _passed(self, module: nn.Module, args: tuple, out) -> None:
        tensor = _first_tensor(out)
        if observing() or tensor is None or not tensor.requires_grad:
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # a transform of the user's: p.grad gets nothing
            return
        seen, inputs = self._seen, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)

        def keep(gradient: Tensor) -> None:
            if not any(other is inputs for other in seen):
                seen.append(inputs)

        tensor.register_hook(keep)

    def take(self) -> list:
        """The inputs since the last call, in the order of their backward passes."""
        found = list(self._seen)
        self._seen.clear()
        return found

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()


def _first_tensor(out) -> Tensor | None:
    if isinstance(out, Tensor):
        return out
    if isinstance(out, dict):
        out = out.values()
    if isinstance(out, tuple | list) or hasattr(out, "__iter__"):
        return next((t for t in out if isinstance(t, Tensor) and t.requires_grad), None)
    return None


def _keys(x):
    """The bytes of every sample; any dtype."""
    tensors = [t.detach().cpu() for t in as_inputs(x) if isinstance(t, Tensor)]
    rows = [t.reshape(len(t), -1).contiguous().view(torch.uint8).numpy() for t in tensors]
    for parts in zip(*rows, strict=True):
        yield b"|".join(part.tobytes() for part in parts)
