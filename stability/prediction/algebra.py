"""S^(k→z) from S by a rank-2p update: (I + cL'K'L'ᵀ)⁻¹ of every candidate out of one Cholesky factor of I + cL K_SS Lᵀ = FFᵀ.

With U = F⁻¹E_k (block column k of F⁻¹) and W = F⁻¹C, C what the added z has against S: removing k projects on the complement
of U, P = I − U(UᵀU)⁻¹Uᵀ, for (FFᵀ)⁻¹ without row and column k is F⁻ᵀP F⁻¹; adding z borders it, with the Schur complement
s = corner − WᵀPW. **Derived**: Π = F⁻ᵀF⁻¹ in Π^(k) = Π − Π_{:k}Π_kk⁻¹Π_{k:} and the partitioned inverse (Horn & Johnson,
*Matrix Analysis*, §0.7.3). In these halves rounding costs s ≥ I an error of ε·cond; with Π itself it is ε·cond².
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError


@dataclass(frozen=True)
class Rebuilt:
    """The inverses of R candidates' matrices, as F and terms of b columns. N = n·b rows, blocks of b."""

    chol: Tensor  # F, [N, N]
    k: Tensor  # number of the removed block, [R]
    removed: Tensor  # U, [R, N, b]
    pivot: Tensor  # Cholesky factor of UᵀU, [R, b, b]
    added: Tensor  # PW, [R, N, b]
    schur: Tensor  # Cholesky factor of s, [R, b, b]

    def solve(self, x: Tensor, x_z: Tensor) -> tuple[Tensor, Tensor]:
        """(I + cL'K'L'ᵀ)⁻¹ on the rows of S without k, and of z: x [R, N, m] (its block k is not read), x_z [R, b, m].

        With y = P F⁻¹x̃ (x̃ = x with zeros at k) and t = s⁻¹(x_z − (PW)ᵀy): z-part t, S-part F⁻ᵀ(y − PW t), zero at k.
        2N²m operations a candidate, in two triangular solves for all.
        """
        b = x_z.shape[-2]
        y = project(self.removed, self.pivot, common_solve(self.chol, without_block(x, self.k, b)))
        t = torch.cholesky_solve(x_z - self.added.mT @ y, self.schur)
        return without_block(common_solve(self.chol.mT, y - self.added @ t, upper=True), self.k, b), t


def rebuild(chol: Tensor, removed: Tensor, half: Tensor, corner: Tensor, k: Tensor) -> Rebuilt:
    """The inverses of R matrices FFᵀ with block ``k`` removed and one block added.

    Parameters
    ----------
    chol: F [N, N], lower. removed: U = F⁻¹E_k [R, N, b]. half: W = F⁻¹C [R, N, b], C what the added block has against all of
    S (candidates with equal z share it; its block k has no effect). corner: the added diagonal block [R, b, b]. k: [R].

    Raises NumericalError where UᵀU or s = corner − WᵀPW is not positive definite.

    >>> A = torch.tensor([[2.0, 1.0, 0.5], [1.0, 3.0, 0.0], [0.5, 0.0, 4.0]], dtype=torch.float64)
    >>> F = torch.linalg.cholesky(A[:2, :2])  # replace row 0 of the first two by row 2
    >>> U, W = F.inverse()[:, :1], F.inverse() @ A[:2, 2:]
    >>> new = rebuild(F, U[None], W[None], A[None, 2:, 2:], torch.tensor([0]))
    >>> x, x_z = new.solve(torch.tensor([[[7.0], [6.0]]], dtype=torch.float64), torch.tensor([[[8.0]]], dtype=torch.float64))
    >>> x[0, 1].item(), x_z.item(), x[0, 0].item()  # [[3, 0], [0, 4]]⁻¹(6, 8)
    (2.0, 2.0, 0.0)
    """
    pivot = _cholesky(removed.mT @ removed, "the removed block of the inverse")
    added = project(removed, pivot, half)
    return Rebuilt(
        chol, k, removed, pivot, added, _cholesky(corner - added.mT @ added, "the Schur complement of the added sample")
    )


def project(removed: Tensor, pivot: Tensor, y: Tensor) -> Tensor:
    """Py = y − U(UᵀU)⁻¹Uᵀy, [R, N, m]."""
    return y - removed @ torch.cholesky_solve(removed.mT @ y, pivot)


def common_solve(chol: Tensor, x: Tensor, *, upper: bool = False) -> Tensor:
    """One triangular matrix [N, N] solved for x [R, N, m] of every candidate, as one solve, [R, N, m]."""
    R, N, m = x.shape
    flat = torch.linalg.solve_triangular(chol, x.transpose(0, 1).reshape(N, R * m), upper=upper)
    return flat.view(N, R, m).transpose(0, 1)


def common_product(matrix: Tensor, x: Tensor) -> Tensor:
    """One matrix [M, N] times x [R, N, m] of every candidate, as one matrix product, [R, M, m]."""
    R, N, m = x.shape
    flat = matrix @ x.transpose(0, 1).reshape(N, R * m)
    return flat.view(-1, R, m).transpose(0, 1)


def take_columns(matrix: Tensor, k: Tensor, b: int) -> Tensor:
    """Block column k of a matrix [M, n·b] for every candidate, [R, M, b].

    >>> take_columns(torch.arange(8.0).view(2, 4), torch.tensor([1]), 2)
    tensor([[[2., 3.],
             [6., 7.]]])
    """
    return matrix.unflatten(-1, (-1, b))[:, k].transpose(0, 1)


def without_block(x: Tensor, k: Tensor, b: int) -> Tensor:
    """x [R, n·b, m] with zeros at block k.

    >>> without_block(torch.ones(1, 4, 1), torch.tensor([1]), 2).flatten()
    tensor([1., 1., 0., 0.])
    """
    blocks = x.unflatten(-2, (-1, b)).clone()
    blocks[torch.arange(len(k), device=x.device), k] = 0
    return blocks.flatten(-3, -2)


def _cholesky(matrix: Tensor, what: str) -> Tensor:
    chol, info = torch.linalg.cholesky_ex(matrix)
    if bool((info == 0).all()) and bool(torch.isfinite(chol).all()):
        return chol
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(f"{what} is not finite")
    smallest = torch.linalg.eigvalsh(matrix)[..., 0].min().item()
    raise NumericalError(f"{what} is not positive definite: smallest eigenvalue", value=smallest)
