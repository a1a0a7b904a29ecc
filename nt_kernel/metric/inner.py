"""The inner system S = I + c·L_y K L_yᵀ of one metric block: factorised once, used for steps and kernels.

K = J D⁻¹Jᵀ is the mass-weighted Gram matrix on the points that build the metric, L_y the factor of the output metric,
c the scale. Everything here lives in output space; parameters never appear. Two representations share the code: a Gram
matrix over (sample, output) pairs [..., NC, NC], and, for output layers with M = I, one over samples [..., N, N] with
the C outputs as right-hand sides (K = A ⊗ I_C).
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from nt_kernel.factors import Factor
from nt_kernel.mass import Masses
from nt_kernel.metric.output_metric import OutputMetric
from nt_kernel.metric.triangular import solve_factored, triangular_inverse
from nt_kernel.products.forms import kron_identity
from nt_kernel.spectra.spectrum import INVERTIBLE, kernel_error_scale


@dataclass(frozen=True)
class Solve:
    """How an inner system was last solved: "cholesky", "cg" or "none" (c = 0), CG's iterations and its ‖b − Sx‖/‖b‖.

    Cholesky with iterations and a residual took over from CG, which had come that far.

    >>> str(Solve("cg", 5, 3e-5)), str(Solve("cholesky"))
    ('cg, 5 iterations, residual 3e-05', 'cholesky')
    """

    solver: str
    iterations: int = 0
    residual: float | None = None

    def __str__(self) -> str:
        if self.residual is None:
            return self.solver
        return f"{self.solver}, {self.iterations} iterations, residual {self.residual:.2g}"


class InnerSystem:
    """Cholesky of S for a Gram matrix [..., NC, NC], or [..., N, N] with ``decoupled=True`` (then M = I)."""

    last = Solve("cholesky")

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
        self.chol = None if c == 0 else self._factorise(where)

    def _factorise(self, where: str) -> Tensor:
        """Cholesky of S, as √c times that of L_y K L_yᵀ + I/c: the shift goes on the diagonal in place, for a while."""
        if self.factor is not None:
            system = self.weigh(self.weigh(self.gram).mT)
            system.diagonal(dim1=-2, dim2=-1).add_(1 / self.c)
            return _cholesky(system, self.c, where)
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        kept = diagonal.clone()
        diagonal.add_(1 / self.c)
        try:
            return _cholesky(self.gram, self.c, where)
        finally:
            diagonal.copy_(kept)

    def weigh(self, matrix: Tensor) -> Tensor:
        """L_y applied to the rows: [..., NC, R] → [..., Nq, R]."""
        return matrix if self.factor is None else apply_blocks(self.factor, matrix)

    def unweigh(self, matrix: Tensor) -> Tensor:
        """L_yᵀ applied to the rows: [..., Nq, R] → [..., NC, R]."""
        return matrix if self.factor is None else apply_blocks(self.factor.mT, matrix)

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
            return self.unrows(solve_factored(self.chol, self.rows(r)))
        rho, rest = self.metric.lift(self.y, self.factor, r)
        rest = rest.flatten(-2)[..., None]
        inner = rho.flatten(-2)[..., None] - self.c * self.weigh(self.gram @ rest)
        v = self.unweigh(solve_factored(self.chol, inner)) + rest
        return v[..., 0].unflatten(-1, (-1, self.C))

    def woodbury(self, b: Tensor) -> Tensor:
        """c·L_yᵀS⁻¹L_y b for b [..., N, C]: the correction of G⁻¹ = D⁻¹ − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹."""
        if self.c == 0:
            return torch.zeros_like(b)
        inner = solve_factored(self.chol, self.weigh(self.rows(b)))
        return self.unrows(self.c * self.unweigh(inner))

    def reduce(self, K_AS: Tensor, K_SB: Tensor, K_AB: Tensor) -> Tensor:
        """J_A G⁻¹J_Bᵀ = K_AB − c·K_AS L_yᵀS⁻¹L_y K_SB; matrices in this system's representation, so is the result."""
        if self.c == 0:
            return K_AB
        return K_AB - K_AS @ self.unweigh(solve_factored(self.chol, self.weigh(K_SB))).mul_(self.c)

    def self_kernel(self) -> Tensor:
        """R = J G⁻¹Jᵀ on the points of the metric, symmetric; for M = I it is (I − S⁻¹)/c."""
        if self.c == 0:
            return self.gram.clone()
        if self._inverts():
            R = torch.cholesky_inverse(self.chol).mul_(-1 / self.c)
            R.diagonal(dim1=-2, dim2=-1).add_(1 / self.c)
            return R
        half = torch.linalg.solve_triangular(self.chol, self.weigh(self.gram), upper=False)  # chol⁻¹L_yK
        return self.gram - self.c * half.mT @ half

    def _inverts(self) -> bool:
        """True where (I − S⁻¹)/c is the kernel and keeps its digits."""
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        return self.factor is None and bool((self.c * diagonal.amax(-1) >= INVERTIBLE).all())

    def runs(self, which: slice) -> "InnerSystem":
        """Of a stacked system, the runs ``which``; nothing is factorised again."""
        part = copy(self)
        part.gram, part.chol = self.gram[which], None if self.chol is None else self.chol[which]
        part.y = None if self.y is None else self.y[which]
        part.factor = None if self.factor is None else self.factor[which]
        return part

    def apply(self, gram: Tensor, b: Tensor) -> Tensor:
        """R b on more points than the metric's, which come first: ``gram`` is K on all of them, b [..., A·C, R].

        R b = K b − c·K_AS L_yᵀS⁻¹L_y(K b)_S: for a few columns far cheaper than R itself.
        """
        P = self.gram.shape[-1]
        if self.decoupled:  # the outputs of a sample become columns
            b = b.unflatten(-2, (-1, self.C)).flatten(-2)
        Kb = (b.mT @ gram).mT  # K is symmetric; few rows on the left are twice as fast as few columns on the right
        if self.c > 0:
            inner = self.unweigh(solve_factored(self.chol, self.weigh(Kb[..., :P, :])))
            Kb = Kb - self.c * (inner.mT @ gram[..., :P, :]).mT
        return Kb.unflatten(-1, (self.C, -1)).flatten(-3, -2) if self.decoupled else Kb

    def diagonal_blocks(self, gram: Tensor) -> Tensor:
        """R_ii [..., A, C, C] at every point of ``gram``, those of the metric first."""
        P, p = self.gram.shape[-1], 1 if self.decoupled else self.C
        blocks = gram.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)).diagonal(dim1=-4, dim2=-2)  # [..., p, p, A]
        blocks = blocks.movedim(-1, -3).clone()
        if self.c > 0:
            invert, own = self._inverts(), P // p
            if invert:  # (I − S⁻¹)/c there, S⁻¹ = XᵀX with X = chol⁻¹: only the columns of each block meet
                eye = torch.eye(p, dtype=gram.dtype, device=gram.device)
                blocks[..., :own, :, :] = (eye - _column_grams(triangular_inverse(self.chol), p)) / self.c
            rest = slice(own if invert else 0, None)
            columns = self.weigh(gram[..., :P, P if invert else 0 :])
            half = torch.linalg.solve_triangular(self.chol, columns, upper=False)
            blocks[..., rest, :, :] -= self.c * _column_grams(half, p)
        if not self.decoupled:
            return blocks
        return torch.diag_embed(blocks[..., 0].expand(*blocks.shape[:-2], self.C))

    def error_scale(self, n: int) -> float:
        """The size whose rounding (1/n)R carries (``nt_kernel.spectra.spectrum``), the largest of a stack."""
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


def inner_system(
    factor: Factor, n: int, mass: Masses, c: float, metric: OutputMetric, y: Tensor, where: str = ""
) -> tuple[InnerSystem, Tensor]:
    """The inner system of ``factor`` on its first n points (outputs y [..., N, C]), and K on all its points.

    An output layer under the identity metric is kept as a Gram matrix over samples (``InnerSystem``, decoupled).
    """
    own = y[..., :n, :]
    if factor.decouples(mass) and (c == 0 or metric.factor(own) is None):
        gram, decoupled = factor.sample_gram(mass=mass), True
    else:
        gram, decoupled = factor.gram(mass=mass).flatten(-4, -3).flatten(-2), False
    size = n if decoupled else n * y.shape[-1]
    where = f"{where}layer {factor.name!r}"
    return InnerSystem(gram[..., :size, :size], y.shape[-1], c, metric, own, decoupled=decoupled, where=where), gram


def _column_grams(matrix: Tensor, p: int) -> Tensor:
    """X_iᵀX_i [..., A, p, p] for the blocks X_i of p columns of [..., P, A·p]."""
    columns = matrix.mT.reshape(*matrix.shape[:-2], -1, p, matrix.shape[-2])
    return columns @ columns.mT


def apply_blocks(blocks: Tensor, matrix: Tensor) -> Tensor:
    """A block diagonal matrix, one block [q, C] per sample, times rows: [..., N, q, C] and [..., NC, R] → [..., Nq, R].

    >>> apply_blocks(torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]]), torch.eye(4))
    tensor([[1., 1., 0., 0.],
            [0., 0., 2., 0.]])
    """
    return (blocks @ matrix.unflatten(-2, (-1, blocks.shape[-1]))).flatten(-3, -2)


def _cholesky(system: Tensor, c: float, where: str) -> Tensor:
    chol, info = torch.linalg.cholesky_ex(system)
    if bool((info == 0).all()) and bool(torch.isfinite(chol.diagonal(dim1=-2, dim2=-1)).all()):
        return chol.mul_(c**0.5)
    if not bool(torch.isfinite(system).all()):
        raise NumericalError("the Gram matrix is not finite (did training diverge?)", where=where)
    smallest = c * torch.linalg.eigvalsh(system)[..., 0].min().item()
    raise NumericalError("I + c·L K Lᵀ is not positive definite: smallest eigenvalue", where=where, value=smallest)
