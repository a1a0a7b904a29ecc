"""Eigenvalues of kernel matrices, the model of their rounding, and the numbers that sum a spectrum up.

What is here of rounding is a first-order model. Bounds that hold without one are in ``nt_kernel.spectra.certified``.
"""

import math

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name

EFFECTIVE_RANKS = ("entropy", "participation", "intrinsic")

# From this size of c·K on, R = (I − S⁻¹)/c is how a kernel may be formed (``nt_kernel.metric.inner``): its rounding is that of
# the identity, whatever the size of K. Below, K − cKS⁻¹K is used, whose rounding is that of K.
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


def effective_rank(eigenvalues: Tensor, kind: str = "entropy") -> Tensor:
    """How many eigenvalues carry a positive semidefinite matrix, [..., P] → [...]: between 1 and its rank, 0 for A = 0.

    With p = λ/tr(A):

    - "entropy": exp(−Σ p log p) (O. Roy and M. Vetterli, *The effective rank*, EUSIPCO 2007; singular values there);
    - "participation": tr(A)²/tr(A²) = 1/Σ p², the participation ratio;
    - "intrinsic": tr(A)/λ_max = 1/max p, the intrinsic dimension (J. A. Tropp, *Matrix concentration inequalities*, §7.1).

    They are the exponentials of p's Rényi entropies of order 1, 2 and ∞: intrinsic ≤ participation ≤ entropy ≤ rank.

    Raises ValueError for an unknown kind, an empty spectrum, NaN or inf, and eigenvalues more negative than
    :func:`rounding_radius` explains; those within it count as 0.

    >>> effective_rank(torch.tensor([0.0, 2.0, 2.0])), effective_rank(torch.tensor([1.0, 3.0]), "intrinsic")
    (tensor(2.0000, dtype=torch.float64), tensor(1.3333, dtype=torch.float64))
    """
    if kind not in EFFECTIVE_RANKS:
        raise ValueError(unknown_name("kind of effective rank", kind, EFFECTIVE_RANKS))
    values = _nonnegative(eigenvalues)
    largest = values.amax(-1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1.0)  # from here on only A = 0 sums to less than 1
    if kind == "intrinsic":
        return values.sum(-1)
    if kind == "participation":
        return values.sum(-1).square() / values.square().sum(-1).clamp_min(1.0)
    total = values.sum(-1, keepdim=True)
    entropy = torch.special.entr(values / total.clamp_min(1.0)).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def effective_dimension(eigenvalues: Tensor, ridge: float) -> Tensor:
    """tr(A(A + ridge·I)⁻¹) = Σ λ/(λ + ridge) of a positive semidefinite matrix, [..., P] → [...], between 0 and its rank.

    The degrees of freedom of kernel ridge regression (T. Zhang, Neural Computation 17, 2005). For K and ridge = n·γ with
    the usual empirical risk, for H or K/n with ridge = γ.

    Raises ValueError for a ridge that is not a positive finite number; otherwise as :func:`effective_rank`.

    >>> effective_dimension(torch.tensor([0.0, 1.0, 3.0]), ridge=1.0)
    tensor(1.2500, dtype=torch.float64)
    """
    if not 0 < ridge < math.inf:
        raise ValueError(
            f"ridge is {ridge}, expected a finite number > 0; at 0 it would be the rank, which no rounding leaves"
        )
    values = _nonnegative(eigenvalues)
    return (values / (values + ridge)).sum(-1)


def _nonnegative(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues [..., P] in float64, what rounding made negative set to 0."""
    given = torch.as_tensor(eigenvalues)
    if given.is_complex() or given.ndim == 0 or given.shape[-1] == 0:
        raise ValueError(
            f"eigenvalues are {given.dtype} {list(given.shape)}, expected real numbers [..., P] with P ≥ 1"
        )
    values = given.to(torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError("eigenvalues hold NaN or inf, expected finite numbers")
    dtype = given.dtype if given.is_floating_point() else torch.float64
    radius = rounding_radius(values.shape[-1], 1.0, dtype) * values.abs().amax(-1, keepdim=True)
    if (values < -radius).any():
        raise ValueError(
            f"eigenvalues hold {values.min().item():.3g}, expected those of a positive semidefinite matrix; "
            "write eigenvalues.clamp_min(0) where the negative part is to be left out"
        )
    return values.clamp_min(0.0)
