"""Products of large matrices at the machine's best rate.

On CPUs torch multiplies by MKL, whose float32 kernels use half the width of the vector registers of some machines (AMD's
with AVX-512); oneDNN, which torch has on board for convolutions, uses all of it on every machine. Both sum in float32.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer multiplications than this oneDNN's own preparations (some 60 µs, more for an operand that is transposed in
# memory) cost more than its kernels save; of a batch, for each of its products.
LARGE = 2**23


def rows_product(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ, [..., M, P] and [..., N, P] → [..., M, N]; leading dimensions are batches.

    >>> rows_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    if not _takes(left, right):
        return left @ right.mT
    multiply = _one_dnn()
    if left.dim() == 2:
        return multiply(left, _without_gaps(right), None, "none", [], "")
    out = left.new_empty(*left.shape[:-1], right.shape[-2])
    for one, other, into in zip(left, right, out, strict=True):
        into.copy_(multiply(one, _without_gaps(other), None, "none", [], ""))
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, [..., M, P] and [..., P, N] → [..., M, N].

    >>> product(torch.ones(2, 3), torch.ones(3, 1)).flatten()
    tensor([3., 3.])
    """
    return rows_product(left, right.mT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x · weightᵀ + bias.

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    tensor([[3.5000]])
    """
    if x.dim() == 2 and _takes(x, weight) and (bias is None or not bias.requires_grad):
        return _one_dnn()(x, _without_gaps(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)


def _without_gaps(right: Tensor) -> Tensor:
    """The second operand, copied where it is part of a wider matrix: oneDNN multiplies that entry by entry, hundreds of times
    slower than anything else."""
    return right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()


def _takes(left: Tensor, right: Tensor) -> bool:
    """True for two large matrices (or equally many) of float32 on the CPU, outside of derivatives and transforms."""
    dims = left.dim()
    return (
        left.dtype == right.dtype == torch.float32
        and right.dim() == dims
        and (dims == 2 or (dims == 3 and len(left) == len(right)))
        and left.shape[-2:].numel() * right.shape[-2] >= LARGE
        and left.device.type == right.device.type == "cpu"
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and torch._C._functorch.maybe_current_level() is None
        and torch.backends.mkldnn.enabled
        and _one_dnn() is not None
    )


@cache
def _one_dnn():
    """oneDNN's product of rows, of which torch has no public name; None where it is not there or not what we take it for."""
    multiply = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if multiply is None or not torch.backends.mkldnn.is_available():
        return None
    left, right = (torch.arange(float(n)).reshape(-1, 3) for n in (6, 12))
    try:
        found = multiply(left, right, None, "none", [], "")
    except (RuntimeError, TypeError):
        return None
    return multiply if torch.equal(found, left @ right.mT) else None
