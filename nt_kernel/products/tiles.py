"""The driver of all Gram products: Σ over forms of J J'ᵀ, by rows of tiles, the mirrored half copied.

A symmetric Gram matrix is built from its upper blocks alone, half the multiplications, and all forms (all layers, for
the kernel of a network) add into a tile while it is in the cache.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from math import ceil

from torch import Tensor

from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted, Writer
from nt_kernel.products.positions import Positions

Form = Outer | Flat | Decoupled | Weighted | Positions

# Rows (sample, output) of a tile: measured from 40 to 320 on MLPs, convolutions and attention.
TILE_ROWS = 160


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
    step = ceil(N / ceil(N / step))
    out = _like(forms[0]).new_empty(N * C, M * C)  # as a matrix: two-dimensional transposes copy fast
    for number, group in enumerate(_passes(pairs)):
        writers = [_writer(a, b) for a, b in group]
        for start in range(0, N, step):
            rows, columns = slice(start, min(start + step, N)), slice(start if symmetric else 0, M)
            tile = out[rows.start * C : rows.stop * C, columns.start * C :]
            for place, write in enumerate(writers):
                write(rows, columns, tile, number + place > 0)
        del group, writers
    if symmetric:
        _mirror(out, step * C)
    return out.unflatten(-1, (M, C)).unflatten(0, (N, C))


def _passes(pairs: Sequence[tuple[Form, Form]]) -> Iterator[list[tuple[Form, Form]]]:
    """Matched pairs to go through tile by tile: first all that are read as they are; then, one after the other, what is made
    larger for it (a Jacobian, in pieces), so that little of that is in memory at a time."""
    small = [a.matched(b) for a, b in pairs if isinstance(a, Outer | Flat | Decoupled)]
    small.sort(key=lambda pair: isinstance(pair[0], Decoupled))  # these add a few entries to what is there
    if small:
        yield small
    for a, b in pairs:
        if isinstance(a, Weighted) or (isinstance(a, Positions) and a.cheapest(b) == "summed"):
            yield from ([piece] for piece in a.pieces(b))
        elif isinstance(a, Positions):
            yield [a.matched(b)]


def _mirror(matrix: Tensor, step: int) -> None:
    """Copy the upper blocks of a square matrix to below its diagonal, in place."""
    for start in range(0, len(matrix) - step, step):
        stop = start + step
        # Copied first: torch transposes what is contiguous twice as fast.
        matrix[stop:, start:stop] = matrix[start:stop, stop:].contiguous().mT.contiguous()


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


def _writer(a: Form, b: Form) -> Writer:
    """What writes tiles of J J'ᵀ (``nt_kernel.products.forms``)."""
    if isinstance(a, Outer | Decoupled):
        return a.writer(b)

    def write(rows: slice, columns: slice, tile: Tensor, add: bool) -> None:
        found = a.rows(rows).gram(b.rows(columns)).flatten(-2).flatten(0, 1)
        tile.add_(found) if add else tile.copy_(found)

    return write


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
