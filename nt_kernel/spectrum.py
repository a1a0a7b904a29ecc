"""Eigenvalues of kernel matrices, and a lower bound of the smallest that rounding cannot fake."""

import torch
from torch import Tensor

# From this size of c·K on, R = (I − S⁻¹)/c is how a kernel may be formed (``nt_kernel.inner``): its rounding is that of the
# identity, whatever the size of K. Below, K − cKS⁻¹K is used, whose rounding is that of K.
INVERTIBLE = 1e-2


def rounding_radius(size: int, norm: float, dtype: torch.dtype = torch.float64) -> float:
    """4·P·ε·norm: how far computed eigenvalues of a symmetric P × P matrix may be off.

    ``norm`` bounds the sizes that entered: for a matrix that is given it is its own norm, for H the formation error of
    :func:`kernel_error_scale`. By Weyl an eigenvalue moves by no more than the norm of the perturbation; P·ε·norm is the
    usual backward error of products, factorisations and eigensolvers, 4 the safety on it.

    >>> f"{rounding_radius(100, 1.0):.1e}"
    '8.9e-14'
    """
    return 4 * size * torch.finfo(dtype).eps * norm


def kernel_error_scale(gram_norm: float, n: int, c: float) -> float:
    """The size whose relative rounding error H_α = (1/n)R_α carries: (1 + c‖K‖)/(nc), or 2‖K‖/n for small c‖K‖.

    R = (I − S⁻¹)/c with S = I + cK: the inverse of a matrix of condition 1 + c‖K‖ is known to that many ε of 1/c. In
    the form K − cKS⁻¹K, used for small K alone, it is known to ε‖K‖.

    >>> kernel_error_scale(8.0, n=2, c=0.0), kernel_error_scale(100.0, n=2, c=0.5), kernel_error_scale(0.1, n=2, c=0.5)
    (4.0, 51.0, 1.05)
    """
    if c == 0:
        return gram_norm / n
    return 2 * gram_norm / n if c * gram_norm < INVERTIBLE else (1 + c * gram_norm) / (n * c)


def safe_lambda_min(smallest: float, radius: float) -> float:
    """A lower bound of λ_min ≥ 0: ``smallest − radius``, and exactly 0.0 where the two cannot be told apart.

    A kernel of rank below n·p has λ_min = 0, computed as ±1e-16: an ξ of 1e-17 would make a bound of 1e20 look finite.

    >>> safe_lambda_min(1e-17, 1e-15), safe_lambda_min(0.5, 1e-15) > 0.49
    (0.0, True)
    """
    return smallest - radius if smallest > 2 * radius else 0.0


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of (A + Aᵀ)/2, ascending, [..., P], in float64.

    >>> symmetric_eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).tolist()
    [1.0, 3.0]
    """
    matrix = matrix.to(torch.float64)
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)


def largest_block_eigenvalues(blocks: Tensor) -> Tensor:
    """λ_max of each symmetric block, [..., p, p] → [...]."""
    return torch.linalg.eigvalsh(blocks)[..., -1]
