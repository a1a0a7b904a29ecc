"""Jacobians J D^(−1/2) reduced to what their Gram matrices need: four forms, each multiplied its own way.

Masses are folded in (``nt_kernel.capture.linear`` and its siblings do that), so a form knows no parameter names. N samples, C
outputs; arrays may carry leading batch dimensions (stacked twins), written ``...``. Every form has

    gram(other)   J J'ᵀ, [..., N, C, N', C]           block_gram()   its diagonal blocks, [..., N, C, C]
    rows(which)   the form on a slice of its samples   matched(other) the pair in the form that multiplies cheapest
    shape         (..., N, C)
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nt_kernel.products.dense import rows_product

# An arbitrary diagonal mass leaves no structure: J is formed this many bytes at a time.
CHUNK_BYTES = 32 * 2**20


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
    out = (inputs.mT @ left.mT).mT if few_columns else left @ inputs
    return out.unflatten(-2, (deltas.shape[-3], deltas.shape[-1]))


def _repeated(samples: Tensor, C: int) -> Tensor:
    """The factor of a sample pair [..., N, M], repeated over the second output: [..., N, 1, MC]. Long rows multiply fast."""
    return samples[..., None].expand(*samples.shape, C).flatten(-2)[..., :, None, :]


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
        gram.flatten(-2).mul_(_repeated(self.sample_gram(other), gram.shape[-1]))
        return gram

    def write(self, other: "Outer", tile: Tensor, add: bool, samples: Tensor) -> None:
        """The Gram matrix into ``tile`` [NC, N'C], or added to it; ``samples`` is the sample Gram matrix."""
        N, C = self.shape
        deltas = rows_product(self.deltas.flatten(0, 1), other.deltas.flatten(0, 1)).unflatten(0, (N, C))
        tile, pairs = tile.unflatten(0, (N, C)), _repeated(samples, C)
        if add:
            tile.addcmul_(deltas, pairs)
        else:
            torch.mul(deltas, pairs, out=tile)

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

    def _chunks(self, other: "Weighted") -> list[slice]:
        columns = (self.deltas.shape[-4] + other.deltas.shape[-4]) * self.deltas.shape[-3] * self.inputs.shape[-1]
        step = max(1, CHUNK_BYTES // (columns * self.inputs.element_size()))
        o = self.deltas.shape[-1]
        return [slice(start, min(start + step, o)) for start in range(0, o, step)]

    def _jacobian(self, which: slice) -> Tensor:
        return (outer_sums(self.deltas[..., which], self.inputs) * self.weights[which]).flatten(-2)

    def gram(self, other: "Weighted") -> Tensor:
        total: Tensor | None = None
        for which in self._chunks(other):
            left = self._jacobian(which)
            piece = flat_product(left, left if other is self else other._jacobian(which))
            total = piece if total is None else total.add_(piece)
        return total

    def block_gram(self) -> Tensor:
        total: Tensor | None = None
        for which in self._chunks(self):
            J = self._jacobian(which)
            total = J @ J.mT if total is None else total.add_(J @ J.mT)
        return total
