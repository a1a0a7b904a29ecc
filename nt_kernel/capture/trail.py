"""Which module is to blame: the modules a forward pass went through, what came in and what went out."""

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Trail(AbstractContextManager):
    """Records every module call of a model while it is open.

    ``finished`` lists (module name, input tensors, output tensors), inner modules before those that hold them;
    ``active`` the modules entered and not left, which after an exception are those it came through.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: list[str] = []
        self.finished: list[tuple[str, list[Tensor], list[Tensor]]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> "Trail":
        for name, module in self.model.named_modules():
            name = name or "."
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            enter = module.register_forward_pre_hook(lambda m, a, n=name: self.active.append(n))
            leave = module.register_forward_hook(
                lambda m, a, k, out, n=name: self._leave(n, (a, k), out), with_kwargs=True
            )
            self._hooks.callback(enter.remove)
            self._hooks.callback(leave.remove)
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.close()

    def _leave(self, name: str, inputs, out) -> None:
        self.active.pop()
        self.finished.append((name, _tensors(inputs), _tensors(out)))

    @property
    def culprit(self) -> str:
        """The innermost module that was entered and not left."""
        return self.active[-1] if self.active else "."


def first_difference(whole: Trail, alone: Trail, sample: int = 0) -> str:
    """The first module whose inputs for a sample agree between a batch and that sample alone, and whose outputs do not.

    ``whole`` and ``alone`` are trails of the same model on a batch and on its sample number ``sample``.
    """
    for (name, ins, outs), (other, ins_alone, outs_alone) in zip(whole.finished, alone.finished, strict=False):
        if name != other:
            return name
        if _agree(ins, ins_alone, sample) and not _agree(outs, outs_alone, sample):
            return name
    return "."


def _tensors(tree) -> list[Tensor]:
    return [t.detach().clone() for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _agree(batch: list[Tensor], alone: list[Tensor], sample: int) -> bool:
    return len(batch) == len(alone) and all(_same_sample(a, b, sample) for a, b in zip(batch, alone, strict=True))


def _same_sample(batch: Tensor, alone: Tensor, sample: int) -> bool:
    if batch.dim() != alone.dim():
        return False
    for axis, (n, one) in enumerate(zip(batch.shape, alone.shape, strict=True)):
        if n != one:
            if n % one:
                return False
            batch = batch.narrow(axis, sample * one, one)  # folded with positions: sample by sample
            break
    if batch.shape != alone.shape:
        return False
    if not batch.is_floating_point():
        return bool((batch == alone).all())
    gap = (batch - alone).norm().item()
    return gap <= torch.finfo(batch.dtype).eps ** 0.5 * (1 + alone.norm().item())
