"""What a first look at a model finds: its calls in order, where the samples are in them, and what refuses it.

A model has layer factors when every sample has a Jacobian of its own: its forward must not be random, and a sample must give
the same output alone as in its batch. The refusals name the layer at fault (``nt_kernel.capture.trail``).
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedParameter

from nt_kernel.capture.observe import as_inputs, batch_size, call_model, flatten_outputs
from nt_kernel.capture.site import Layout
from nt_kernel.capture.trail import Trail, first_difference
from nt_kernel.capture.watch import Watch


def refuse_parameters(model: nn.Module) -> None:
    """Raise ValueError for a parameter that is not initialised or not real."""
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised (a lazy layer): run the model on its inputs once")
        if p.requires_grad and not p.is_floating_point():
            raise ValueError(f"parameter {name!r} is {p.dtype}; layer factors are real: freeze it or make it real")


def in_training(module: nn.Module) -> str:
    """What a layer does to its samples now: "random" or "mixing" in training mode, "" for any other."""
    if not module.training:
        return ""
    if isinstance(module, _DropoutNd) and module.p > 0:
        return "random"
    return "mixing" if isinstance(module, _BatchNorm) else ""


def refuse_modules(model: nn.Module) -> None:
    """Raise ValueError for a module that is known to be random, to mix samples or to hide from torch.func."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not module.training and module.running_mean is None:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) keeps no running statistics, so it makes samples interact "
                "in evaluation mode too and per-sample Jacobians do not exist; write track_running_stats=True"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(
                f"layer {name or '.'!r} has full backward hooks, which torch.func cannot follow; remove them first"
            )
        if why := in_training(module):
            what = "draws random masks" if why == "random" else "makes samples interact"
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) {what} in training mode, so per-sample Jacobians do not "
                "exist; call model.eval() first"
            )


def split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trainable parameters, everything else the forward reads), both detached and by name.

    Raises ValueError for parameters that are not initialised or not real.
    """
    refuse_parameters(model)
    params, fixed = {}, {name: b.detach().clone() for name, b in model.named_buffers()}  # some forwards count in them
    for name, p in model.named_parameters():
        (params if p.requires_grad else fixed)[name] = p.detach()
    return params, fixed


class Record:
    """The registered calls of one forward pass, in order."""

    def __init__(self, model: nn.Module, x, output):
        params, fixed = split_state(model)
        self.calls: list[tuple] = []
        calls = self.calls  # not self: a cycle would keep all tensors until the garbage collector comes

        def see(index, structure, call, weight, bias, out: Tensor) -> Tensor:
            calls.append((structure, call, weight, bias, out))
            return out

        with Trail(model) as self.trail:
            self.watch = watch = Watch({id(p): n for n, p in params.items()}, see)
            try:
                self.out = call_model(model, {**params, **fixed}, x, watch)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in as_inputs(x) if isinstance(t, Tensor))
                raise ValueError(
                    f"the model cannot run on x of shape {shapes} (in layer {self.trail.culprit!r}): "
                    f"{str(error).splitlines()[0]}"
                ) from error
        self.y = flatten_outputs(self.out, batch_size(x), output)


def layout_of(out: Tensor, other: Tensor, N: int) -> Layout | None:
    """Where the samples are in a call's output, from the same call on another number of samples; None if unclear."""
    if out.dim() != other.dim():
        return None
    n = 1 if N > 1 else 2
    moved = [k for k in range(out.dim()) if out.shape[k] != other.shape[k]]
    if len(moved) != 1:
        return None
    (k,) = moved
    if (out.shape[k], other.shape[k]) == (N, n):
        return Layout(k)
    if out.shape[k] % N or out.shape[k] // N * n != other.shape[k]:
        return None
    if N == 1:
        return Layout(k, "samples")
    by_position = out.unflatten(k, (-1, N)).select(k + 1, 0)
    close = torch.allclose(by_position, other, rtol=1e-3, atol=1e-6)
    by_sample = torch.allclose(out.narrow(k, 0, other.shape[k]), other, rtol=1e-3, atol=1e-6)
    if close == by_sample:  # data that cannot tell: exact without a layout
        return None
    return Layout(k, "positions" if close else "samples")


def refuse_random(first: Record, second: Record) -> None:
    """Raise ValueError where two runs on the same x differ."""
    if not torch.equal(first.y, second.y) and not _close(first.y, second.y):
        raise ValueError(
            f"layer {first_difference(first.trail, second.trail)!r} is random: two runs on the same x differ by "
            f"{(first.y - second.y).norm().item():.2g}, and a random forward has no Jacobian (model.eval()?)"
        )


def refuse_interaction(whole: Record, alone: Record, sample: int) -> None:
    """Raise ValueError where a sample gives another output alone than in its batch."""
    if not _close(alone.y[0], whole.y[sample]):
        raise ValueError(
            f"sample {sample} gives another output alone than in its batch (they differ by "
            f"{(alone.y[0] - whole.y[sample]).norm().item():.2g}): the samples of this model interact in layer "
            f"{first_difference(whole.trail, alone.trail, sample)!r}, and have no Jacobian of their own"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return (a - b).norm().item() <= torch.finfo(a.dtype).eps ** 0.5 * (1 + a.norm().item())
