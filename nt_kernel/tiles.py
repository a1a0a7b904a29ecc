"""The driver of all Gram products: Σ over forms of J J'ᵀ, by rows of tiles, the mirrored half copied.

A symmetric Gram matrix is built from its upper blocks alone, half the multiplications, and all forms (all layers, for
the kernel of a network) add into a tile while it is in the cache.
"""

from collections.abc import Sequence
from functools import reduce
from math import ceil

from torch import Tensor

from nt_kernel.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.positions import Positions

Form = Outer | Flat | Decoupled | Weighted | Positions

# Rows (sample, output) of a tile: measured from 40 to 240 on MLPs, convolutions and attention.
TILE_ROWS = 120


def gram_of(forms: Sequence[Form], others: Sequence[Form] | None = None) -> Tensor:
    """Σ_k J_k J'_kᵀ, [..., N, C, N', C], of forms matched one to one; ``others=None`` means the same points.

    >>> import torch
    >>> form = Outer(torch.tensor([[2.0]]), torch.tensor([[[3.0]]]))
    >>> gram_of([form, form]).item()
    72.0
    """
    symmetric = others is None
    pairs = [a.matched(b) for a, b in zip(forms, forms if symmetric else others, strict=True)]
    *stack, N, C = forms[0].shape
    M = N if symmetric else others[0].shape[-2]
    step = max(1, TILE_ROWS // C)
    if stack or 2 * step >= N:  # stacked twins are one batched product already
        return _products(pairs)
    step = ceil(N / ceil(N / step))
    out: Tensor | None = None  # as a matrix: two-dimensional transposes copy fast
    for start in range(0, N, step):
        stop = min(start + step, N)
        beyond = slice(start if symmetric else 0, M)
        tile = _products([(a.rows(slice(start, stop)), b.rows(beyond)) for a, b in pairs]).flatten(-2).flatten(0, 1)
        if out is None:
            out = tile.new_empty(N * C, M * C)
        out[start * C : stop * C, beyond.start * C :] = tile
        if symmetric and stop < N:
            out[stop * C :, start * C : stop * C] = tile[:, (stop - start) * C :].mT.contiguous()
    return out.unflatten(-1, (M, C)).unflatten(0, (N, C))


def blocks_of(forms: Sequence[Form]) -> Tensor:
    """The diagonal blocks Σ_k J_{k,i}J_{k,i}ᵀ, [..., N, C, C]."""
    return reduce(Tensor.add_, (form.block_gram() for form in forms))


def _products(pairs: Sequence[tuple[Form, Form]]) -> Tensor:
    total: Tensor | None = None
    for a, b in sorted(pairs, key=lambda pair: isinstance(pair[0], Decoupled)):
        if total is None:
            total = a.gram(b)
        else:
            total = a.add_to(total, b) if isinstance(a, Decoupled) else total.add_(a.gram(b))
    return total
