"""The inner system S = I + c·L_y K L_yᵀ of one metric block: factorised once, used for steps and kernels.

K = J D⁻¹Jᵀ is the mass-weighted Gram matrix on the points that build the metric, L_y the factor of the output metric,
c the scale. Everything here lives in output space; parameters never appear. Two representations share the code: a Gram
matrix over (sample, output) pairs [..., NC, NC], and, for output layers with M = I, one over samples [..., N, N] with
the C outputs as right-hand sides (K = A ⊗ I_C).
"""

from copy import copy

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from nt_kernel.linear_output import kron_identity
from nt_kernel.output_metric import OutputMetric
from nt_kernel.spectrum import kernel_error_scale

# Below this size of c·K the identity (I − S⁻¹)/c loses the digits that K − cKS⁻¹K keeps.
_SMALL = 1e-2


class InnerSystem:
    """Cholesky of S for a Gram matrix [..., NC, NC], or [..., N, N] with ``decoupled=True`` (then M = I)."""

    def __init__(
        self,
        gram: Tensor,
        C: int,
        c: float,
        metric: OutputMetric,
        y: Tensor | None = None,
        *,
        decoupled: bool = False,
        where: str = "",
    ):
        self.C, self.c, self.metric, self.y, self.decoupled = C, c, metric, y, decoupled
        self.gram = gram  # [..., P, P], P = NC or N
        self.factor = None if c == 0 else metric.factor(y)  # L_y [..., N, q, C]
        if decoupled and self.factor is not None:
            raise ValueError("a decoupled Gram matrix needs the identity as output metric")
        self.chol = None if c == 0 else _cholesky(self._system(), where)

    def _system(self) -> Tensor:
        S = self.weigh(self.weigh(self.gram).mT).mul(self.c)
        S.diagonal(dim1=-2, dim2=-1).add_(1)
        return S

    def weigh(self, matrix: Tensor) -> Tensor:
        """L_y applied to the rows: [..., NC, R] → [..., Nq, R]."""
        if self.factor is None:
            return matrix
        return (self.factor @ matrix.unflatten(-2, (-1, self.C))).flatten(-3, -2)

    def unweigh(self, matrix: Tensor) -> Tensor:
        """L_yᵀ applied to the rows: [..., Nq, R] → [..., NC, R]."""
        if self.factor is None:
            return matrix
        return (self.factor.mT @ matrix.unflatten(-2, tuple(self.factor.shape[-3:-1]))).flatten(-3, -2)

    def rows(self, v: Tensor) -> Tensor:
        """[..., N, C] as the columns this system works on: [..., NC, 1] or [..., N, C]."""
        return v if self.decoupled else v.flatten(-2)[..., None]

    def unrows(self, v: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        return v if self.decoupled else v[..., 0].unflatten(-1, (-1, self.C))

    def dual(self, r: Tensor) -> Tensor:
        """v [..., N, C] with G⁻¹Jᵀr = D⁻¹Jᵀv: v = r − c·L_yᵀS⁻¹L_y K r, for r [..., N, C].

        With r = L_yᵀρ + r⊥ this is L_yᵀS⁻¹(ρ − c·L_y K r⊥) + r⊥, which does not cancel at small mass.
        """
        if self.c == 0:
            return r
        if self.factor is None:
            return self.unrows(_solve(self.chol, self.rows(r)))
        rho, rest = self.metric.lift(self.y, self.factor, r)
        rest = rest.flatten(-2)[..., None]
        inner = rho.flatten(-2)[..., None] - self.c * self.weigh(self.gram @ rest)
        v = self.unweigh(_solve(self.chol, inner)) + rest
        return v[..., 0].unflatten(-1, (-1, self.C))

    def woodbury(self, b: Tensor) -> Tensor:
        """c·L_yᵀS⁻¹L_y b for b [..., N, C]: the correction of G⁻¹ = D⁻¹ − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹."""
        if self.c == 0:
            return torch.zeros_like(b)
        inner = _solve(self.chol, self.weigh(self.rows(b)))
        return self.unrows(self.c * self.unweigh(inner))

    def reduce(self, K_AS: Tensor, K_SB: Tensor, K_AB: Tensor) -> Tensor:
        """J_A G⁻¹J_Bᵀ = K_AB − c·K_AS L_yᵀS⁻¹L_y K_SB; matrices in this system's representation, so is the result."""
        if self.c == 0:
            return K_AB
        return K_AB - self.c * K_AS @ self.unweigh(_solve(self.chol, self.weigh(K_SB)))

    def self_kernel(self) -> Tensor:
        """R = J G⁻¹Jᵀ on the points of the metric, symmetric; for M = I it is (I − S⁻¹)/c."""
        if self.c == 0:
            return self.gram
        if self.factor is None and bool((self.c * self.gram.diagonal(dim1=-2, dim2=-1).amax(-1) >= _SMALL).all()):
            R = torch.cholesky_inverse(self.chol).mul_(-1 / self.c)
            R.diagonal(dim1=-2, dim2=-1).add_(1 / self.c)
            return R
        half = torch.linalg.solve_triangular(self.chol, self.weigh(self.gram), upper=False)  # chol⁻¹L_yK
        return self.gram - self.c * half.mT @ half

    def runs(self, which: slice) -> "InnerSystem":
        """Of a stacked system, the runs ``which``; nothing is factorised again."""
        part = copy(self)
        part.gram, part.chol = self.gram[which], None if self.chol is None else self.chol[which]
        part.y = None if self.y is None else self.y[which]
        part.factor = None if self.factor is None else self.factor[which]
        return part

    def extended_kernel(self, gram: Tensor) -> Tensor:
        """R on more points than the metric's, which come first: ``gram`` is K on all of them, in this representation."""
        P = self.gram.shape[-1]
        R = torch.empty_like(gram)
        R[..., :P, :P] = self.self_kernel()
        if self.factor is None and self.c > 0:  # then R_SB = S⁻¹K_SB: no product with K, and nothing cancels
            R[..., :P, P:] = _solve(self.chol, gram[..., :P, P:])
            R[..., P:, P:] = gram[..., P:, P:] - self.c * gram[..., P:, :P] @ R[..., :P, P:]
        else:
            R[..., :, P:] = self.reduce(gram[..., :, :P], gram[..., :P, P:], gram[..., :, P:])
        R[..., P:, :P] = R[..., :P, P:].mT
        return R

    def error_scale(self, n: int) -> float:
        """The size whose rounding (1/n)R carries (``nt_kernel.spectrum``), the largest of a stack."""
        norm = self.gram.norm(dim=(-2, -1)).max().item()
        if self.factor is None:
            return kernel_error_scale(norm, n, self.c)
        weighed = self.weigh(self.weigh(self.gram).mT).norm(dim=(-2, -1)).max().item()
        return kernel_error_scale(weighed, n, self.c) + (1 + self.c * weighed) * norm / n

    def expand(self, matrix: Tensor) -> Tensor:
        """A matrix in this representation as one over (sample, output) pairs."""
        return kron_identity(matrix, self.C).flatten(-4, -3).flatten(-2) if self.decoupled else matrix

    def add_to(self, total: Tensor | None, matrix: Tensor) -> Tensor:
        """``total + expand(matrix)``, in place where there is a total (of this method's making) already."""
        if total is None:
            return self.expand(matrix)
        if not self.decoupled:
            return total.add_(matrix)
        pairs = total.unflatten(-1, (-1, self.C)).unflatten(-3, (-1, self.C))
        pairs.diagonal(dim1=-3, dim2=-1).add_(matrix[..., None])
        return total


def _cholesky(system: Tensor, where: str) -> Tensor:
    chol, info = torch.linalg.cholesky_ex(system)
    if bool((info == 0).all()) and bool(torch.isfinite(chol.diagonal(dim1=-2, dim2=-1)).all()):
        return chol
    if not bool(torch.isfinite(system).all()):
        raise NumericalError("the Gram matrix is not finite (did training diverge?)", where=where)
    smallest = torch.linalg.eigvalsh(system)[..., 0].min().item()
    raise NumericalError("I + c·L K Lᵀ is not positive definite: smallest eigenvalue", where=where, value=smallest)


def _solve(chol: Tensor, b: Tensor) -> Tensor:
    """S⁻¹b by two triangular solves; ``torch.cholesky_solve`` copies the factor, ten times the work for one column."""
    half = torch.linalg.solve_triangular(chol, b, upper=False)
    return torch.linalg.solve_triangular(chol.mT, half, upper=True)
