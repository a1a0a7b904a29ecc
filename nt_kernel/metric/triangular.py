"""Work with Cholesky factors [..., P, P] that torch does slowly or not at all."""

import torch
from torch import Tensor

# Below this size one triangular solve against the identity beats splitting further (measured: 64 to 128 alike).
_LEAF = 64


def solve_factored(chol: Tensor, b: Tensor) -> Tensor:
    """S⁻¹b for S = chol·cholᵀ by two triangular solves.

    ``torch.cholesky_solve`` copies the factor first, ten times the work for one column.

    >>> solve_factored(torch.tensor([[2.0]]), torch.tensor([[8.0]]))
    tensor([[2.]])
    """
    half = torch.linalg.solve_triangular(chol, b, upper=False)
    return torch.linalg.solve_triangular(chol.mT, half, upper=True)


def triangular_inverse(chol: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]].

    A solve against the identity takes no note of its zeros: three times the work.

    >>> triangular_inverse(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    tensor([[ 0.5000,  0.0000],
            [-0.5000,  1.0000]])
    """
    return _invert_into(chol, torch.zeros_like(chol))


def _invert_into(chol: Tensor, out: Tensor) -> Tensor:
    P, half = chol.shape[-1], chol.shape[-1] // 2
    if P <= _LEAF:
        eye = torch.eye(P, dtype=chol.dtype, device=chol.device).expand_as(chol)
        return out.copy_(torch.linalg.solve_triangular(chol, eye, upper=False))
    upper = _invert_into(chol[..., :half, :half], out[..., :half, :half])
    lower = _invert_into(chol[..., half:, half:], out[..., half:, half:])
    out[..., half:, :half] = -(lower @ (chol[..., half:, :half] @ upper))
    return out
