"""Kernels between two point sets by blocks of samples: observed block by block, computed tile by tile, written in place.

A symmetric kernel is computed in its upper blocks alone. All points in one block is the fastest: every layer's forms go
through one pass. In several blocks layers go one at a time, so that one layer's temporaries are the most there is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.factors import Factor, matching
from nt_kernel.kernels.points import Points
from nt_kernel.mass import Masses
from nt_kernel.products.forms import Decoupled
from nt_kernel.products.reduced import diagonal_of, trace_of
from nt_kernel.products.tiles import Form, gram_of

Factors = Mapping[str, Factor]  # of one block of samples, by layer


@dataclass(frozen=True)
class Reduction:
    """Which entries of K_{(i,c),(j,d)} are wanted: their product, the array's shape, its transpose in (i,c) ↔ (j,d)."""

    product: Callable[[Sequence[Form], Sequence[Form] | None], Tensor]
    shape: Callable[[int, int, int], tuple[int, ...]]  # of N, C, M
    columns: int  # the dimension of j
    mirrored: Callable[[Tensor], Tensor]

    def block(self, kernel: Tensor, rows: slice, columns: slice) -> Tensor:
        """The entries of some samples with some others, a view."""
        return kernel[(rows, *[slice(None)] * (self.columns - 1), columns)]


def _sample_gram(forms: Sequence[Form], others: Sequence[Form] | None) -> Tensor:
    (form, *_), (other, *_) = forms, others or forms
    if isinstance(form, Decoupled):
        return form.sample_gram(other)
    return trace_of(forms, others).div_(form.shape[-1])  # tr(A ⊗ I_C) = C·A


FULL = Reduction(gram_of, lambda N, C, M: (N, C, M, C), 2, lambda t: t.permute(2, 3, 0, 1))
DIAGONAL = Reduction(diagonal_of, lambda N, C, M: (N, M, C), 1, lambda t: t.transpose(0, 1))
TRACE = Reduction(trace_of, lambda N, C, M: (N, M), 1, lambda t: t.mT)
SAMPLES = Reduction(_sample_gram, lambda N, C, M: (N, M), 1, lambda t: t.mT)  # A of K = A ⊗ I_C
OUTPUTS = {"full": FULL, "diagonal": DIAGONAL, "trace": TRACE}


def reduction_of(outputs: str) -> Reduction:
    """Raises ValueError, naming the known ones, for an unknown reduction."""
    if not isinstance(outputs, str) or outputs not in OUTPUTS:
        raise ValueError(unknown_name("outputs", outputs, OUTPUTS))
    return OUTPUTS[outputs]


@dataclass(frozen=True)
class Wanted:
    """The kernels to compute: of each the layers it sums over and the entries wanted; and the masses."""

    layers: Mapping[str, Sequence[str]]
    reductions: Mapping[str, Reduction]
    masses: Masses

    def whole(self, first: Factors, second: Factors | None) -> dict[str, Tensor]:
        """The kernels of points observed at once, all layers in one pass."""
        return {
            name: self.reductions[name].product(*self._forms(layers, first, second))
            for name, layers in self.layers.items()
        }

    def only(self, name: str) -> "Wanted":
        """One of the kernels."""
        return Wanted({name: self.layers[name]}, {name: self.reductions[name]}, self.masses)

    def allocate(self, N: int, C: int, M: int, like: Tensor) -> dict[str, Tensor]:
        """Kernels yet to be filled."""
        return {name: like.new_empty(self.reductions[name].shape(N, C, M)) for name in self.layers}

    def fill(self, kernels: Mapping[str, Tensor], rows: slice, columns: slice, first: Factors, second: Factors | None):
        """Write one tile of every kernel, layer by layer; ``second=None``: a tile on the diagonal."""
        for name, (one, *more) in self.layers.items():
            reduction = self.reductions[name]
            block = reduction.block(kernels[name], rows, columns)
            block.copy_(reduction.product(*self._forms([one], first, second)))
            for layer in more:
                block.add_(reduction.product(*self._forms([layer], first, second)))

    def mirror(self, kernels: Mapping[str, Tensor], rows: slice, columns: slice) -> None:
        """Copy a tile above the diagonal to its place below."""
        for name, kernel in kernels.items():
            reduction = self.reductions[name]
            reduction.block(kernel, columns, rows).copy_(reduction.mirrored(reduction.block(kernel, rows, columns)))

    def _forms(
        self, layers: Sequence[str], first: Factors, second: Factors | None
    ) -> tuple[list[Form], list[Form] | None]:
        pairs = [(first[n], None) if second is None else matching(first[n], second[n]) for n in layers]
        rows, columns = ([f for f in side if f is not None] for side in zip(*pairs, strict=True))
        forms, others = (  # the masses are checked: once for all layers and blocks
            [form for f in side for part in f.parts for form in part.forms(self.masses)] for side in (rows, columns)
        )
        return forms, None if second is None else others


def sweep(
    rows: Points, columns: Points | None, wanted: Callable[[Factors], Wanted]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs at the rows, [N, C], and the kernels; ``columns=None`` stands for the same points.

    ``wanted`` is asked once, with the factors of the first block.
    """
    symmetric = columns is None
    columns = columns or rows
    across, outputs, job = columns.blocks, [], None
    number, held = -1, None  # the column block observed last
    for i, I in enumerate(rows.blocks):
        own = None  # let go before the next is observed
        own = held if symmetric and number == i else rows.observed(I)
        outputs.append(own[0])
        if job is None:
            job = wanted(own[1])
            if len(rows.blocks) == len(across) == 1:
                other = None if symmetric else _agreeing(own[0], columns.observed(across[0]))[1]
                return own[0], job.whole(own[1], other)
            kernels = job.allocate(rows.size, own[0].shape[1], columns.size, own[0])
        order = range(i if symmetric else 0, len(across))
        for j in order if i % 2 == 0 else reversed(order):  # there and back: the block at the turn is still held
            if symmetric and j == i:
                job.fill(kernels, I, I, own[1], None)
                continue
            if number != j:
                number, held = j, None
                held = _agreeing(own[0], columns.observed(across[j]))
            job.fill(kernels, I, across[j], own[1], held[1])
            if symmetric:
                job.mirror(kernels, I, across[j])
    return torch.cat(outputs), kernels


def _agreeing(y: Tensor, seen: tuple[Tensor, Factors]) -> tuple[Tensor, Factors]:
    if seen[0].shape[1] != y.shape[1]:
        raise ValueError(
            f"the model gives {y.shape[1]} outputs per sample at the rows, {seen[0].shape[1]} at the columns; a kernel is "
            "between points with equally many"
        )
    return seen
