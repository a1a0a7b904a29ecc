"""Jacobians J D^(−1/2) reduced to what their Gram matrices need: four forms, each multiplied its own way.

Masses are folded in (``nt_kernel.capture.linear`` and its siblings do that), so a form knows no parameter names. N samples, C
outputs; arrays may carry leading batch dimensions (stacked twins), written ``...``. Every form has

    gram(other)   J J'ᵀ, [..., N, C, N', C]           block_gram()   its diagonal blocks, [..., N, C, C]
    rows(which)   the form on a slice of its samples   matched(other) the pair in the form that multiplies cheapest
    shape         (..., N, C)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from nt_kernel.products.dense import product, rows_product

# Where J has to be formed, it is formed this many bytes at a time: what is fetched from the system anew, or read from outside
# of the cache, costs more than its products.
CHUNK_BYTES = 8 * 2**20


# Writes the Gram matrix of some rows with some columns (slices of samples) into a tile [NC, MC], or adds it to what is there.
Writer = Callable[[slice, slice, Tensor, bool], None]


def kron_identity(samples: Tensor, C: int) -> Tensor:
    """A ⊗ I_C as [..., N, C, N', C] from A [..., N, N'].

    >>> kron_identity(torch.tensor([[2.0]]), 2).reshape(2, 2)
    tensor([[2., 0.],
            [0., 2.]])
    """
    out = samples.new_zeros(*samples.shape[:-1], C, samples.shape[-1], C)
    out.diagonal(dim1=-3, dim2=-1).copy_(samples[..., None])
    return out


def flat_product(left: Tensor, right: Tensor) -> Tensor:
    """Σ_p left_{ncp} right_{mdp}: [..., N, C, P] and [..., M, D, P] → [..., N, C, M, D].

    >>> flat_product(torch.ones(1, 2, 3), torch.ones(4, 2, 3)).shape
    torch.Size([1, 2, 4, 2])
    """
    flat = rows_product(left.flatten(-3, -2), right.flatten(-3, -2))
    return flat.unflatten(-1, right.shape[-3:-1]).unflatten(-3, left.shape[-3:-1])


def outer_sums(deltas: Tensor, inputs: Tensor) -> Tensor:
    """Σ_s δ_{ics} ⊗ a_{is}, [..., N, C, o, d], as one product per sample: inputs are not repeated for every output."""
    left = deltas.mT.flatten(-3, -2)  # [..., N, C·o, T]
    few_columns = inputs.shape[-1] < 16  # a product with so narrow a result runs at a fraction of the rate
    out = (inputs.mT @ left.mT).mT if few_columns else product(left, inputs)
    return out.unflatten(-2, (deltas.shape[-3], deltas.shape[-1]))


def repeated(samples: Tensor, C: int) -> Tensor:
    """The factor of a sample pair [..., N, M], repeated over the second output: [..., N, 1, MC]. Long rows multiply fast."""
    return samples[..., None].expand(*samples.shape, C).flatten(-2)[..., :, None, :]


def unit_chunks(left: "Weighted", right: "Weighted", d: int) -> list[slice]:
    """The units o of a weight [o, d] in slices whose Jacobians on both sides together take ``CHUNK_BYTES``."""
    (N, C, _, o), M = left.deltas.shape[-4:], 0 if right is left else right.deltas.shape[-4]
    step = max(1, CHUNK_BYTES // ((N + M) * C * d * left.deltas.element_size()))
    return [slice(start, min(start + step, o)) for start in range(0, o, step)]


@dataclass(frozen=True)
class Outer:
    """J_{ic} = δ_{ic} ⊗ a_i: ``inputs`` a [..., N, d], ``deltas`` δ [..., N, C, o]; J J'ᵀ = (a_i·a_j)(δ_{ic}·δ_{jd})."""

    inputs: Tensor
    deltas: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.deltas.shape[:-1]

    def rows(self, which: slice) -> "Outer":
        return Outer(self.inputs[..., which, :], self.deltas[..., which, :, :])

    def matched(self, other: "Outer") -> tuple["Outer", "Outer"]:
        left = Outer(self.inputs, self.deltas.contiguous())  # once, not in every tile
        return left, left if other is self else Outer(other.inputs, other.deltas.contiguous())

    @cached_property
    def input_gram(self) -> Tensor:
        """a_i·a_j, [..., N, N]: made once for the products and the preconditioner of one solve."""
        return rows_product(self.inputs, self.inputs)

    def sample_gram(self, other: "Outer") -> Tensor:
        """a_i·a_j, [..., N, N']."""
        return rows_product(self.inputs, other.inputs)

    def gram(self, other: "Outer") -> Tensor:
        gram = flat_product(self.deltas, other.deltas)
        gram.flatten(-2).mul_(repeated(self.sample_gram(other), gram.shape[-1]))
        return gram

    def writer(self, other: "Outer") -> Writer:
        """Writes tiles of the Gram matrix [NC, N'C]."""
        C = self.shape[-1]
        left, right = self.deltas.flatten(0, 1), other.deltas.flatten(0, 1)
        # For all tiles at once where it is small beside them.
        pairs = repeated(self.sample_gram(other), C) if C > 1 else None

        def write(rows: slice, columns: slice, tile: Tensor, add: bool) -> None:
            weights = self.inputs[rows], other.inputs[columns]
            weights = (
                rows_product(*weights)[:, None]
                if pairs is None
                else pairs[rows, :, columns.start * C : columns.stop * C]
            )
            found = rows_product(left[rows.start * C : rows.stop * C], right[columns.start * C : columns.stop * C])
            found, tile = found.view(len(weights), C, -1), tile.unflatten(0, (-1, C))
            if add:
                tile.addcmul_(found, weights)
            else:
                torch.mul(found, weights, out=tile)

        return write

    def block_gram(self) -> Tensor:
        return (self.deltas @ self.deltas.mT) * self.inputs.square().sum(-1)[..., None, None]


@dataclass(frozen=True)
class Flat:
    """J itself, [..., N, C, P]: small, or without structure."""

    jacobian: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.jacobian.shape[:-1]

    def rows(self, which: slice) -> "Flat":
        return Flat(self.jacobian[..., which, :, :])

    def matched(self, other: "Flat") -> tuple["Flat", "Flat"]:
        return self, other

    def gram(self, other: "Flat") -> Tensor:
        return flat_product(self.jacobian, other.jacobian)

    def block_gram(self) -> Tensor:
        return self.jacobian @ self.jacobian.mT


@dataclass(frozen=True)
class Decoupled:
    """J_i = I_C ⊗ a_i of an output layer: ``inputs`` a [..., N, d]; J J'ᵀ = (a_i·a_j) I_C."""

    inputs: Tensor
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.inputs.shape[:-1], self.outputs)

    def rows(self, which: slice) -> "Decoupled":
        return Decoupled(self.inputs[..., which, :], self.outputs)

    def matched(self, other: "Decoupled") -> tuple["Decoupled", "Decoupled"]:
        return self, other

    def sample_gram(self, other: "Decoupled") -> Tensor:
        """a_i·a_j, [..., N, N']: the Gram matrix without its factor I_C."""
        return rows_product(self.inputs, other.inputs)

    def gram(self, other: "Decoupled") -> Tensor:
        return kron_identity(self.sample_gram(other), self.outputs)

    def writer(self, other: "Decoupled") -> Writer:
        """Writes tiles of the Gram matrix [NC, N'C]."""
        C = self.outputs
        samples = self.sample_gram(other) if C > 1 else None

        def write(rows: slice, columns: slice, tile: Tensor, add: bool) -> None:
            found = self.rows(rows).sample_gram(other.rows(columns)) if samples is None else samples[rows, columns]
            tile = tile if add else tile.zero_()
            tile.unflatten(1, (-1, C)).unflatten(0, (-1, C)).diagonal(dim1=1, dim2=3).add_(found[..., None])

        return write

    def add_to(self, total: Tensor, other: "Decoupled") -> Tensor:
        """total + gram, in place: C entries of every C·C block."""
        total.diagonal(dim1=-3, dim2=-1).add_(self.sample_gram(other)[..., None])
        return total

    def block_gram(self) -> Tensor:
        squares = self.inputs.square().sum(-1)
        return torch.diag_embed(squares[..., None].expand(*squares.shape, self.outputs))


@dataclass(frozen=True)
class Weighted:
    """J_{ic} = (Σ_s δ_{ics} ⊗ a_{is}) ∘ w for an arbitrary diagonal mass, w = D^(−1/2) [o, d]; formed in chunks of o.

    ``inputs`` [..., N, T, d], ``deltas`` [..., N, C, T, o].
    """

    inputs: Tensor
    deltas: Tensor
    weights: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.deltas.shape[:-2]

    def rows(self, which: slice) -> "Weighted":
        return Weighted(self.inputs[..., which, :, :], self.deltas[..., which, :, :, :], self.weights)

    def matched(self, other: "Weighted") -> tuple["Weighted", "Weighted"]:
        return self, other

    def pieces(self, other: "Weighted") -> Iterator[tuple[Flat, Flat]]:
        """The two Jacobians, some units o at a time."""
        for which in unit_chunks(self, other, self.inputs.shape[-1]):
            left = Flat(self._jacobian(which))
            yield left, left if other is self else Flat(other._jacobian(which))

    def _jacobian(self, which: slice) -> Tensor:
        return (outer_sums(self.deltas[..., which], self.inputs) * self.weights[which]).flatten(-2)

    def gram(self, other: "Weighted") -> Tensor:
        return reduce(Tensor.add_, (left.gram(right) for left, right in self.pieces(other)))

    def block_gram(self) -> Tensor:
        return reduce(Tensor.add_, (left.block_gram() for left, _ in self.pieces(self)))
