"""The driver of all Gram products: Σ over forms of J J'ᵀ, by rows of tiles, the mirrored half copied.

A symmetric Gram matrix is built from its upper blocks alone, half the multiplications, and all forms (all layers, for
the kernel of a network) add into a tile while it is in the cache.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from math import ceil

from torch import Tensor

from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.positions import Positions

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
    pairs = [_alike(a, b) for a, b in zip(forms, forms if symmetric else others, strict=True)]
    *stack, N, C = forms[0].shape
    M = N if symmetric else others[0].shape[-2]
    step = max(1, TILE_ROWS // C)
    if stack or 2 * step >= N:  # stacked twins are one batched product already
        return _products([a.matched(b)] for a, b in pairs)
    passes = _passes(pairs)
    step = ceil(N / ceil(N / step))
    out = _like(forms[0]).new_empty(N * C, M * C)  # as a matrix: two-dimensional transposes copy fast
    for group in passes:
        matched = [(*pair, _samples(*pair)) for pair in (a.matched(b) for a, b in group)]
        whole = isinstance(group[0][0], Weighted)  # chunked already, in the other direction
        for start in range(0, N, N if whole else step):
            rows, beyond = slice(start, N if whole else min(start + step, N)), slice(start if symmetric else 0, M)
            tile = out[rows.start * C : rows.stop * C, beyond.start * C :]
            parts = [(a.rows(rows), b.rows(beyond), s if s is None else s[rows, beyond]) for a, b, s in matched]
            _write(tile, parts, add=group is not passes[0])
    if symmetric:
        _mirror(out, step * C)
    return out.unflatten(-1, (M, C)).unflatten(0, (N, C))


def _passes(pairs: Sequence[tuple[Form, Form]]) -> list[list[tuple[Form, Form]]]:
    """The forms that are read as they are, together; each that is first made larger (a summed J) by itself, so that only
    one of these is in memory at a time."""
    as_they_are = [p for p in pairs if isinstance(p[0], Outer | Flat | Decoupled)]
    alone = [[p] for p in pairs if not isinstance(p[0], Outer | Flat | Decoupled)]
    return ([as_they_are] if as_they_are else []) + alone


def _mirror(matrix: Tensor, step: int) -> None:
    """Copy the upper blocks of a square matrix to below its diagonal, in place."""
    for start in range(0, len(matrix) - step, step):
        stop = start + step
        matrix[stop:, start:stop] = matrix[start:stop, stop:].mT.contiguous()


def _alike(a: Form, b: Form) -> tuple[Form, Form]:
    """The pair matched; one position on one side counts as a sum over one where the other side has several."""
    if type(a) is not type(b):
        return tuple(
            Positions(f.inputs[..., None, :], f.deltas[..., None, :]) if isinstance(f, Outer) else f for f in (a, b)
        )
    return a, b


def blocks_of(forms: Sequence[Form]) -> Tensor:
    """The diagonal blocks Σ_k J_{k,i}J_{k,i}ᵀ, [..., N, C, C]."""
    return reduce(Tensor.add_, (form.block_gram() for form in forms))


def _like(form: Form) -> Tensor:
    """A tensor of the type and device of the Gram matrix."""
    if isinstance(form, Flat):
        return form.jacobian
    return form.inputs if isinstance(form, Decoupled) else form.deltas


def _samples(a: Form, b: Form) -> Tensor | None:
    """The sample Gram matrix for all tiles at once, where it is small beside theirs."""
    return a.sample_gram(b) if isinstance(a, Outer | Decoupled) and a.shape[-1] > 1 else None


def _write(tile: Tensor, parts: Sequence[tuple[Form, Form, Tensor | None]], add: bool) -> None:
    """Σ J J'ᵀ over pairs of forms into ``tile`` [NC, MC], or added to it; the third of each part is its sample Gram matrix."""
    late: list[tuple[Decoupled, Tensor]] = []  # these add a few entries to what is there
    for a, b, samples in parts:
        if isinstance(a, Outer | Decoupled) and samples is None:
            samples = a.sample_gram(b)
        if isinstance(a, Decoupled):
            late.append((a, samples))
            continue
        if isinstance(a, Outer):
            a.write(b, tile, add, samples)
        else:
            found = a.gram(b).flatten(-2).flatten(0, 1)
            tile.add_(found) if add else tile.copy_(found)
        add = True
    for a, samples in late:
        tile = tile if add else tile.zero_()
        tile.unflatten(1, (-1, a.outputs)).unflatten(0, (-1, a.outputs)).diagonal(dim1=1, dim2=3).add_(samples[..., None])
        add = True


def _products(groups: Iterable[Sequence[tuple[Form, Form]]]) -> Tensor:
    """Σ J J'ᵀ over all pairs of all groups; a group is dropped when the next one is made."""
    total: Tensor | None = None
    late: list[tuple[Decoupled, Decoupled]] = []  # these add a few entries to what is there
    for pairs in groups:
        for a, b in pairs:
            if isinstance(a, Decoupled):
                late.append((a, b))
            else:
                total = a.gram(b) if total is None else total.add_(a.gram(b))
    for a, b in late:
        total = a.gram(b) if total is None else a.add_to(total, b)
    return total
