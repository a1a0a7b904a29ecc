"""The forward pass with open eyes: fused functions run as the composition they stand for, so that every weight is seen.

Numbers change by rounding at most. Attention and recurrent cells multiply by their weights inside one function; some
fused kernels have no batched derivative; compiled code hides its calls altogether.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nt_kernel.capture import recurrent


@functools.cache
def _undispatched(function: Callable) -> Callable:
    """The Python body of a ``torch.nn.functional`` function, without its own dispatch: what it calls is dispatched."""
    code = {**function.__globals__, "has_torch_function": lambda *args: False}
    copy = types.FunctionType(function.__code__, code, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _prelu(x, weight):
    slope = weight.reshape(1, -1, *[1] * (x.dim() - 2)) if weight.numel() > 1 else weight.reshape(())
    return torch.where(x > 0, x, slope * x)


_COMPOSITIONS = {
    F.prelu: _prelu,  # its derivative cannot be batched
    F.multi_head_attention_forward: _undispatched(F.multi_head_attention_forward),
    **{getattr(torch, f"{name}_cell"): recurrent.cell(step) for name, step in recurrent.STEPS.items()},
    **{getattr(torch, name): recurrent.layers(step) for name, step in recurrent.STEPS.items()},
}


def composition_of(function: Callable) -> Callable | None:
    """The composition that a fused function stands for, to be called with dispatch on; None for all others.

    It returns NotImplemented for arguments that it does not know.
    """
    return _COMPOSITIONS.get(function)


def run_batchable(function: Callable, args: tuple, kwargs: dict):
    """Call a function so that its derivative can be batched."""
    if function is F.scaled_dot_product_attention:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' derivatives cannot
            return function(*args, **kwargs)
    if function is F.embedding:  # a Jacobian is dense, and not weighed by how often a row is read
        return _plain_embedding(*args, **kwargs)
    return function(*args, **kwargs)


def _plain_embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if max_norm is not None:
        raise ValueError(
            f"an embedding with max_norm={max_norm} rewrites its own table in the forward pass, which has no Jacobian; "
            "renormalise the table outside of the model"
        )
    return F.embedding(input, weight, padding_idx)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run ``torch.compile``d code as the Python it was compiled from."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
