"""Which samples a step is about: the forward passes of a model whose output received a gradient, and that gradient."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, flatten_outputs, observing


@dataclass
class _Pass:
    """One forward pass: its inputs, ∂h/∂y as received by its output since the last step, and whether p.grad got its share."""

    inputs: tuple
    gradient: Tensor | None = None
    landed: bool = False


class _Hook:
    """The model's forward hook. It does not keep its recorder alive, and it does nothing in a copy of the model."""

    def __init__(self, passes: "Passes | None" = None):
        self._passes = (lambda: None) if passes is None else weakref.ref(passes)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        passes = self._passes()
        if passes is not None:
            passes._record(module, args, kwargs, out)

    def __reduce__(self):
        return _Hook, ()


class Passes:
    """The record of a model's training passes since the last ``clear``, kept by one forward hook.

    Passes without gradients (``no_grad``), inside ``torch.func`` transforms, on other parameters than ``parameters()``, or
    whose output never receives a gradient leave nothing. ``close`` removes the hook; so does the record's end.

    >>> model = nn.Linear(2, 1)
    >>> passes = Passes(model, model.parameters)
    >>> model(torch.ones(3, 2)).sum().backward()
    >>> x, r = passes.samples()
    >>> x[0].shape, r.flatten().tolist()
    (torch.Size([3, 2]), [1.0, 1.0, 1.0])
    """

    def __init__(self, model: nn.Module, parameters: Callable[[], Iterable[Tensor]]):
        self.seen: list[_Pass] = []
        self._parameters = parameters
        self._handle = model.register_forward_hook(_Hook(self), with_kwargs=True)
        weakref.finalize(self, self._handle.remove).atexit = False

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        if observing() or not torch.is_grad_enabled() or self._is_functional(module, out):
            return
        if kwargs:
            raise TypeError(f"Woodbury records positional inputs only; the model was called with {', '.join(kwargs)}=…")
        if not isinstance(out, Tensor):
            raise TypeError(
                f"Woodbury needs a model that returns one tensor, its outputs; it returned {type(out).__name__}"
            )
        if not out.requires_grad:
            return
        if any(before.landed for before in self.seen) and self._without_gradients():
            self.seen[:] = [
                before for before in self.seen if not before.landed
            ]  # model.zero_grad() took their gradients
        done, seen = _Pass(tuple(a.detach() if isinstance(a, Tensor) else a for a in args)), self.seen

        def land() -> None:
            done.landed = not self._without_gradients()  # torch.autograd.grad leaves p.grad to its caller

        def keep(gradient: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(land)  # at the end of this backward
            if any(other is done for other in seen):  # a second backward through the same pass: no new samples
                done.gradient = done.gradient + gradient.detach()
            else:
                done.gradient = gradient.detach()
                seen.append(done)

        out.register_hook(keep)

    def _is_functional(self, module: nn.Module, out) -> bool:
        """True for a pass of which p.grad gets nothing: inside a torch.func transform, or on other parameters."""
        # torch has no public name for "wrapped by a transform".
        if isinstance(out, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(out):
            return True
        own = {id(p) for p in self._parameters()}
        return not any(id(p) in own for p in module.parameters())

    def _without_gradients(self) -> bool:
        return all(p.grad is None for p in self._parameters())

    def samples(self) -> tuple[tuple, Tensor]:
        """(inputs, r = ∂h/∂y [B, C]) of all recorded passes together. Raises ValueError where there are none."""
        if not self.seen:
            raise ValueError(
                "step() found gradients but no forward pass of the model that received one since the last step or "
                "zero_grad; the metric needs its samples: run model(x), loss.backward(), step() in this order"
            )
        inputs = [as_inputs(seen.inputs) for seen in self.seen]
        x = tuple(torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*inputs, strict=True))
        return x, torch.cat([flatten_outputs(seen.gradient, len(seen.gradient)) for seen in self.seen])

    def clear(self) -> None:
        """Forget the passes."""
        self.seen.clear()

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()
