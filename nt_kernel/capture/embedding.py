"""The Jacobian of an embedding: row numbers in place of inputs. J_{ic} = Σ_s δ_{ics} ⊗ e_{row(i,s)}; two positions meet where
their rows agree, so (J Jᵀ)_{(i,c),(j,d)} = Σ_{s,t} [row_{is} = row_{jt}] δ_{ics}·δ_{jdt} and no one-hot matrix is needed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nt_kernel.capture.linear import inverse_root
from nt_kernel.mass import Masses, RowColumnMass
from nt_kernel.products.positions import Positions


@dataclass(frozen=True)
class EmbeddingPart:
    """Jacobian of the table ``weight`` [V, o]: ``rows_read`` [..., N, T] integers, ``deltas`` [..., N, C, T, o]."""

    rows_read: Tensor
    deltas: Tensor
    weight: str
    shape: tuple[int, int]
    kind = "embedding"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,)

    def to(self, dtype: torch.dtype) -> "EmbeddingPart":
        return replace(self, deltas=self.deltas.to(dtype))

    def runs(self, which: slice) -> "EmbeddingPart":
        return replace(self, rows_read=self.rows_read[which], deltas=self.deltas[which])

    def rows(self, n: int) -> "EmbeddingPart":
        return replace(self, rows_read=self.rows_read[..., :n, :], deltas=self.deltas[..., :n, :, :, :])

    def forms(self, mass: Masses) -> list:
        """J D^(−1/2) as forms (``nt_kernel.products.forms``)."""
        mu, V = mass[self.weight], self.shape[0]
        if isinstance(mu, RowColumnMass):  # rows of the table, columns of the vectors
            by_row = inverse_root(mu.row, self.deltas)[self.rows_read][..., None, :, None]
            return [Positions(self.rows_read, self.deltas * by_row * inverse_root(mu.column, self.deltas), V)]
        if isinstance(mu, Tensor):
            by_entry = inverse_root(mu, self.deltas)[self.rows_read]  # [..., N, T, o]
            return [Positions(self.rows_read, self.deltas * by_entry[..., None, :, :], V)]
        return [Positions(self.rows_read, self.deltas * mu**-0.5, V)]

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u, [..., N, C]."""
        if self.weight not in tangent:
            return self.deltas.new_zeros(self.deltas.shape[:-2])
        u = tangent[self.weight]  # [..., V, o]
        lead = torch.broadcast_shapes(u.shape[:-2], self.rows_read.shape[:-2])
        rows = self.rows_read.flatten(-2).expand(*lead, -1)[..., None].expand(*lead, -1, u.shape[-1])
        dz = u.expand(*lead, *u.shape[-2:]).gather(-2, rows).unflatten(-2, self.rows_read.shape[-2:]).flatten(-2)
        return (dz[..., None, :] @ self.deltas.flatten(-2).mT)[..., 0, :]

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v for v [..., N, C], by parameter name."""
        weighted = (v[..., None, :] @ self.deltas.flatten(-2))[..., 0, :]
        weighted = weighted.unflatten(-1, self.deltas.shape[-2:]).flatten(-3, -2)  # [..., N·T, o]
        rows = self.rows_read.flatten(-2).expand(weighted.shape[:-1])[..., None].expand_as(weighted)
        return {self.weight: weighted.new_zeros(*weighted.shape[:-2], *self.shape).scatter_add_(-2, rows, weighted)}

    def dense(self) -> dict[str, Tensor]:
        """{name: J [..., N, C, P]}; for tests."""
        J = Positions(self.rows_read, self.deltas, self.shape[0]).summed()  # [..., N, C, o·V]
        return {self.weight: J.unflatten(-1, self.shape[::-1]).mT.flatten(-2)}
