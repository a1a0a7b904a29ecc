"""Products of large matrices at the machine's best rate.

On CPUs torch multiplies by MKL, whose float32 kernels use half the width of the vector registers of some machines (AMD's
with AVX-512); oneDNN, which torch has on board for convolutions, uses all of it on every machine. Both sum in float32.
"""

from functools import cache

import torch
from torch import Tensor

# Fewer multiplications than this are over before oneDNN has looked at its operands.
LARGE = 2**20


def rows_product(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ, [..., M, P] and [..., N, P] → [..., M, N]; leading dimensions are batches.

    >>> rows_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    if _takes(left, right):
        return _one_dnn()(left, right, None, "none", [], "")
    return left @ right.mT


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, [..., M, P] and [..., P, N] → [..., M, N].

    >>> product(torch.ones(2, 3), torch.ones(3, 1)).flatten()
    tensor([3., 3.])
    """
    return rows_product(left, right.mT)


def _takes(left: Tensor, right: Tensor) -> bool:
    """True for two large matrices of float32 on the CPU, outside of derivatives and transforms, where oneDNN is there."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.dim() == right.dim() == 2
        and left.numel() * len(right) >= LARGE
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
