"""One metric block of the run on S, as every S^(k→z) sees it: kernels between S, z and the held-out points, and its inverse.

Vectors are output gradients and their duals, on S [R, n, p] (the removed sample's entry is not read, and is zero in
what comes back) and at the candidate's own z [R, 1, p]. Inside, an output layer under M = I works on samples with the p
outputs as columns (K = A ⊗ I_p), everything else on (sample, output) pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.factors import Factor
from nt_kernel.mass import Masses
from nt_kernel.metric.inner import InnerSystem, inner_system
from nt_kernel.metric.output_metric import OutputMetric
from nt_kernel.metric.triangular import triangular_inverse
from stability.prediction.algebra import Rebuilt, common_product, rebuild, take_columns, without_block


@dataclass(frozen=True)
class Own:
    """R candidates: which sample goes, what comes (row ``z`` of the z-factors), and the metric's factor there."""

    k: Tensor  # [R]
    z: Tensor  # [R]
    y_z: Tensor  # the twin's outputs at z, [R, 1, p]
    L_z: Tensor | None  # [R, q, p]; None for M = I


class SharedBlock:
    """What all candidates share of one block: K_SS, FFᵀ = I + cL K_SS Lᵀ with F⁻¹, and K_QS to the held-out points Q."""

    def __init__(
        self,
        factor: Factor,
        held_out: Factor | None,
        n: int,
        mass: Masses,
        c: float,
        metric: OutputMetric,
        y: Tensor,
        where: str = "",
    ):
        self.factor, self.held_out, self.mass, self.c, self.metric, self.y = factor, held_out, mass, c, metric, y
        self.inner: InnerSystem = inner_system(factor, n, mass, c, metric, y, where)[0]
        self.p = y.shape[-1]
        self.K_QS = None if held_out is None else self._gram(held_out, factor)
        self.half_inverse = None if c == 0 else triangular_inverse(self.inner.chol)

    def dual_of_run(self, r: Tensor) -> Tensor:
        """v of the S run itself, [n, p] (``InnerSystem.dual``)."""
        return self.inner.dual(r)

    def push_run(self, v: Tensor, z_factor: Factor) -> tuple[Tensor, Tensor, Tensor | None]:
        """K_{·S}v of the S run at S [n, p], at the points of ``z_factor`` [Z, p] and on the held-out points [Q, p]."""
        rows = self.inner.rows(v)
        S, z = self.inner.gram @ rows, self._gram(self.factor, z_factor).mT @ rows
        return (
            self.inner.unrows(S),
            self.inner.unrows(z),
            None if self.K_QS is None else self.inner.unrows(self.K_QS @ rows),
        )

    def candidates(self, z_factor: Factor, own: Own) -> "CandidateBlock":
        """The block rebuilt on the data of R candidates, whose z are points of ``z_factor``."""
        return CandidateBlock(self, z_factor, own)

    def _gram(self, A: Factor, B: Factor) -> Tensor:
        if self.inner.decoupled:
            return A.sample_gram(B, self.mass)
        return A.gram(B, self.mass).flatten(-4, -3).flatten(-2)


class CandidateBlock:
    """One block of R candidates: G' on S^(k→z), Jacobians at the parameters of the S run."""

    def __init__(self, shared: SharedBlock, z_factor: Factor, own: Own):
        self.shared, self.own = shared, own
        inner, self.b = shared.inner, 1 if shared.inner.decoupled else shared.p
        cross = shared._gram(shared.factor, z_factor)  # K_Sz at every z, [P, Z·b]
        self.K_Sz = self._of_each(cross)  # [R, P, b]
        self.K_Qz = None if shared.held_out is None else self._of_each(shared._gram(shared.held_out, z_factor))
        self.K_zz = self._diagonal(z_factor)  # [R, b, b]
        self.rebuilt = None if shared.c == 0 else self._rebuild(inner, cross)

    def _of_each(self, cross: Tensor) -> Tensor:
        return cross.unflatten(-1, (-1, self.b))[:, self.own.z].transpose(0, 1)

    def _diagonal(self, z_factor: Factor) -> Tensor:
        blocks = z_factor.block_gram(self.shared.mass)[self.own.z]
        return blocks[:, :1, :1] if self.shared.inner.decoupled else blocks  # A ⊗ I_p: a multiple of I_p

    def _rebuild(self, inner: InnerSystem, cross: Tensor) -> Rebuilt:
        c, L_z = self.shared.c, self.own.L_z
        half = torch.linalg.solve_triangular(inner.chol, inner.weigh(cross), upper=False)  # what equal z share
        half, corner = self._of_each(half), c * self.K_zz
        if L_z is not None:
            half, corner = half @ L_z.mT, L_z @ corner @ L_z.mT
        eye = torch.eye(corner.shape[-1], dtype=corner.dtype, device=corner.device)
        removed = take_columns(self.shared.half_inverse, self.own.k, corner.shape[-1])
        return rebuild(inner.chol, removed, c * half, eye + corner, self.own.k)

    def dual(self, r: Tensor, r_z: Tensor) -> tuple[Tensor, Tensor]:
        """v with G'⁻¹J'ᵀr' = D⁻¹J'ᵀv: v = r' − c·L'ᵀS'⁻¹L'K'r', on S [R, n, p] (zero at k) and at z [R, 1, p].

        With r' = L'ᵀρ + r⊥ this is L'ᵀS'⁻¹(ρ − c·L'K'r⊥) + r⊥, as in ``InnerSystem.dual``.
        """
        shared, own = self.shared, self.own
        if shared.c == 0:
            return without_block(r, own.k, 1), r_z
        if own.L_z is None:
            return self.solve(r, r_z)
        L = shared.inner.factor.expand(len(r), *shared.inner.factor.shape)
        rho, rest = shared.metric.lift(shared.y.expand_as(r), L, r)
        rho_z, rest_z = shared.metric.lift(own.y_z, own.L_z[:, None], r_z)
        rest = without_block(rest, own.k, 1)
        b, b_z = self._kernel(self._rows(rest), self._rows(rest_z))
        inner = self._rows(rho) - shared.c * shared.inner.weigh(b)
        t, t_z = self.rebuilt.solve(inner, self._rows(rho_z) - shared.c * own.L_z @ b_z)
        return self._unrows(shared.inner.unweigh(t)) + rest, self._unrows(own.L_z.mT @ t_z) + rest_z

    def solve(self, u: Tensor, u_z: Tensor) -> tuple[Tensor, Tensor]:
        """(I + c·L'K'L'ᵀ)⁻¹u on S [R, n, q] (zero at k) and at z [R, 1, q]."""
        v, v_z = self.rebuilt.solve(self._rows(u), self._rows(u_z))
        return self._unrows(v, u.shape[-1]), self._unrows(v_z, u.shape[-1])

    def push(self, v: Tensor, v_z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """K_{·S'}v on S [R, n, p] (the removed x_k included), at z [R, 1, p] and on the held-out points [R, Q, p]."""
        rows, rows_z = self._rows(v), self._rows(v_z)
        S, z = self._kernel(rows, rows_z)
        Q = None if self.K_Qz is None else common_product(self.shared.K_QS, rows) + self.K_Qz @ rows_z
        return self._unrows(S), self._unrows(z), None if Q is None else self._unrows(Q)

    def _kernel(self, x: Tensor, x_z: Tensor) -> tuple[Tensor, Tensor]:
        S = common_product(self.shared.inner.gram, x) + self.K_Sz @ x_z
        return S, self.K_Sz.mT @ x + self.K_zz @ x_z

    def _rows(self, v: Tensor) -> Tensor:
        """[R, N, p] as the columns this block works on, [R, N, p] or [R, N·p, 1]."""
        return v if self.shared.inner.decoupled else v.flatten(-2)[..., None]

    def _unrows(self, v: Tensor, p: int | None = None) -> Tensor:
        return v if self.shared.inner.decoupled else v[..., 0].unflatten(-1, (-1, p or self.shared.p))
