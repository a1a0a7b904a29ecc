"""Upper bounds that rounding cannot undercut: γ_k, ‖·‖₂ of a matrix known entry by entry, λ_max of a stored matrix.

What is assumed of the machine: IEEE double precision in rounding to nearest, no torch.set_flush_denormal, and matrix
products that are sums of the n³ products of entries, in any order, blocked or in parallel, with or without FMA. That is
so of CPUs; it is not so of the emulated float64 products of some GPUs, so bounds are computed on the CPU.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

UNIT = 2.0**-53  # u, the largest relative error of one operation
# An underflow costs at most 2⁻¹⁰⁷⁵. For matrices scaled to max|a| in [1, 2) and n < 2²⁰ all of them together,
# enlarged 2¹⁰ times by the quotients of ``perron_upper``, stay below this.
UNDERFLOW = 2.0**-900
COLLATZ_STEPS = 4


def gamma(k: int) -> float:
    """γ_k = ku/(1 − ku), rounded up: |fl(xᵀy) − xᵀy| ≤ γ_k |x|ᵀ|y| for vectors of length k, in any order of summation.

    N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §3.1.

    >>> 10 * UNIT < gamma(10) < 13 * UNIT
    True
    """
    k = k + 2  # for the roundings of this line itself
    return k * UNIT / (1 - k * UNIT)


def round_up(value, operations: int):
    """At least the exact value of a sum, product or quotient of numbers ≥ 0 that took this many roundings to compute.

    >>> round_up(0.1 + 0.2, 1) > 0.3
    True
    """
    return value * (1 + 2 * (operations + 2) * UNIT)  # the bracket is exact


def column_norms(X: Tensor) -> Tensor:
    """‖x_j‖ of the columns of X [P, k] without under- or overflow on the way, to γ_{P+4} relative.

    >>> column_norms(torch.tensor([[3e-200], [4e-200]], dtype=torch.float64)) * 1e200
    tensor([5.], dtype=torch.float64)
    """
    largest = X.abs().amax(0)
    unit = torch.where(largest > 0, largest, 1.0)
    return unit * (X / unit).square().sum(0).sqrt()


def next_down(value: float) -> float:
    """The next smaller double: below the exact result of the one operation that gave ``value``.

    >>> next_down(1.0) < 1.0, next_down(math.inf)
    (True, inf)
    """
    return value if math.isinf(value) else math.nextafter(value, -math.inf)


def next_up(value: float) -> float:
    """The next larger double: above the exact result of the one operation that gave ``value``.

    >>> next_up(1.0) > 1.0
    True
    """
    return -next_down(-value)


def checked_symmetric(matrix, what: str = "matrix") -> Tensor:
    """``matrix`` as a float64 tensor [..., P, P], exactly; symmetric to rounding or refused.

    Raises TypeError for what is not a real floating-point array, ValueError for a shape that is not square, for NaN or
    inf, and for |A − Aᵀ| above √ε·max|A| in the precision of ``matrix``.

    >>> checked_symmetric(torch.eye(2)).dtype
    torch.float64
    """
    A = torch.as_tensor(matrix).detach()
    if not A.is_floating_point():
        raise TypeError(f"{what} has dtype {A.dtype}, expected a real floating-point matrix; write {what}.double()")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise ValueError(f"{what} has shape {list(A.shape)}, expected a square matrix [..., P, P] with P ≥ 1")
    if not torch.isfinite(A).all():
        raise ValueError(f"{what} holds NaN or inf, expected finite entries; look for them with torch.isfinite({what})")
    allowed, A = math.sqrt(torch.finfo(A.dtype).eps), A.to(torch.float64)
    skew = ((A / 2 - A.mT / 2).abs().amax((-2, -1)) * 2 - allowed * A.abs().amax((-2, -1))).max().item()
    if skew > 0:
        raise ValueError(
            f"{what} is not symmetric: |A − Aᵀ| exceeds {allowed:.0e}·max|A| by {skew:.3g}; "
            f"write ({what} + {what}.mT) / 2 where the symmetric part is meant"
        )
    return A


def scaled(A: Tensor) -> tuple[Tensor, int]:
    """(2⁻ᵉA, e) with max|2⁻ᵉA| in [1, 2): exact save for underflow. e stays within ±1000, so 2ᵉ and 2⁻ᵉ are normal.

    >>> scaled(torch.tensor([[6.0]]))
    (tensor([[1.5000]]), 2)
    """
    largest = A.abs().max().item()
    exponent = max(-1000, min(1000, math.frexp(largest)[1] - 1)) if largest else 0
    return A * 2.0**-exponent, exponent


def perron_upper(apply: Callable[[Tensor], Tensor], size: int, operations: int) -> float:
    """An upper bound of the spectral radius of an entrywise nonnegative matrix T, given as ``apply``: x ↦ Tx, [P] → [P].

    Collatz and Wielandt: ρ(T) ≤ max_i (Tx)_i/x_i for every x > 0; x = 1 gives the largest row sum, and a few steps of
    x ← Tx bring it down to ρ(T). ``operations`` bounds the roundings in an entry of Tx. Where |E| ≤ T entry by entry and
    E is symmetric, ‖E‖₂ ≤ ρ(|E|) ≤ ρ(T). Entries of T must be 0 or not far from 1 (see :func:`scaled`).

    >>> T = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> 3.0 <= perron_upper(lambda x: T @ x, 2, operations=2) < 3.0 + 1e-14
    True
    """
    x, least = torch.ones(size, dtype=torch.float64), math.inf
    for _ in range(COLLATZ_STEPS):
        y = apply(x)
        least = min(least, (y / x).max().item())
        x = y / y.max().clamp_min(UNDERFLOW) + 2.0**-10  # any x > 0 will do; this keeps the quotients tame
    return round_up(least, operations + 2) + UNDERFLOW


def lambda_max_upper(matrix) -> Tensor:
    """A cheap upper bound of λ_max of a symmetric matrix as stored, [..., P, P] → [...]: O(P²), nothing is factorised.

    The smaller of ρ(|A|) by :func:`perron_upper` (no more than the largest row sum) and ‖A‖_F, both rounded up; it bounds
    max|λ_i| for every symmetric matrix. It is sharp for nonnegative kernels, up to √P too large for others:
    :func:`nt_kernel.spectra.certified.certified_lambda_max` is sharp for all and costs a factorisation. Errors as
    :func:`checked_symmetric`; a matrix symmetric only to rounding stands for its symmetric part.

    >>> lambda_max_upper(torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)).item()
    3.000000000000
    """
    A = checked_symmetric(matrix).cpu()
    bounds = [_norm_upper(one) for one in A.reshape(-1, *A.shape[-2:])]
    return torch.tensor(bounds, dtype=torch.float64).reshape(A.shape[:-2])


def _norm_upper(A: Tensor) -> float:
    if not A.any():
        return 0.0
    size = len(A)
    A, exponent = scaled(A)
    B = (A.abs() + A.mT.abs()) / 2
    perron = perron_upper(lambda x: B @ x, size, size + 2)
    frobenius = round_up(A.square().sum().sqrt().item(), size * size + 2) + UNDERFLOW  # max|a| ≥ 1, or A is next to 0
    return next_up(min(perron, frobenius) * 2.0**exponent)
