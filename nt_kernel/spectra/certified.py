"""Bounds of λ_min, λ_max and the condition number of a stored matrix that hold whatever the rounding did.

**The proof.** For any real matrix L whatever, LLᵀ ⪰ 0. Let B = A − αI with its diagonal rounded downwards. Then
A ⪰ αI + B = αI + LLᵀ + (B − LLᵀ), so

    λ_min(A) ≥ α − ‖B − LLᵀ‖₂,      |B − LLᵀ| ≤ |B − fl(LLᵀ)| + γ_k |L||L|ᵀ entry by entry, k ≈ 2√P,

and the norm of the right side is bounded by :func:`nt_kernel.spectra.directed.perron_upper`. L is the floating-point Cholesky
factor of B, so that the difference is a few roundings; α is the computed λ_min less the room that Cholesky needs.

This is the verification of positive definiteness of S. M. Rump (BIT Numer. Math. 46, 433–452, 2006) with one change. Rump
bounds ‖B − LLᵀ‖ before the factorisation, by γ_{P+1}·tr, and takes the factorisation's success for the proof; that presumes
a textbook Cholesky, and libraries multiply by rounded reciprocals or by inverted diagonal blocks. Here L is multiplied
out, and nothing is believed of how it was found; γ_k for γ_{P+1} makes the bound closer. All of it costs two to three times
the ``eigvalsh`` that α is taken from.

**Rigorous**: for the matrix as stored (float32 entries are doubles; a matrix symmetric only to rounding stands for its
exact symmetric part), under what ``nt_kernel.spectra.directed`` assumes of the machine. **Not covered**: how the stored matrix
was formed. A kernel carries the rounding of its products and solves; that is ``nt_kernel.spectra.spectrum.rounding_radius``, a
first-order model and not a bound.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.spectra.directed import (
    UNDERFLOW,
    UNIT,
    checked_symmetric,
    gamma,
    next_down,
    next_up,
    perron_upper,
    round_up,
    scaled,
)
from nt_kernel.spectra.ritz import enclose
from nt_kernel.spectra.spectrum import rounding_radius

ATTEMPTS = 8  # each gives Cholesky four times the room of the last: 4⁷ P·u·‖A‖ in the end


def certified_lambda_min(matrix) -> Tensor:
    """A lower bound of λ_min of a symmetric matrix as stored, [..., P, P] → [...], float64, that rounding cannot break.

    The proof and what it covers head this module. Singular and indefinite matrices get a bound ≤ 0, which is as rigorous.
    The bound lies below λ_min by a small multiple of P·ε·‖A‖. Computed on the CPU whatever the device.

    Raises TypeError for entries that are not real floating-point numbers, ValueError for a shape that is not square, for
    NaN or inf, and for a matrix that is not symmetric to rounding.

    >>> bound = certified_lambda_min(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).item()
    >>> 1 - 1e-14 < bound <= 1
    True
    >>> certified_lambda_min(torch.ones(3, 3)).item() <= 0  # singular
    True
    """
    A = checked_symmetric(matrix).cpu()
    bounds = [_lower_bound(one) for one in A.reshape(-1, *A.shape[-2:])]
    return torch.tensor(bounds, dtype=torch.float64).reshape(A.shape[:-2])


def certified_lambda_max(matrix) -> Tensor:
    """An upper bound of λ_max of a symmetric matrix as stored, [..., P, P] → [...]: −(lower bound of λ_min(−A)).

    >>> bound = certified_lambda_max(torch.tensor([[2.0, -1.0], [-1.0, 2.0]])).item()
    >>> 3 <= bound < 3 + 1e-14
    True
    """
    return -certified_lambda_min(-torch.as_tensor(matrix))


def _lower_bound(A: Tensor) -> float:
    """The larger of Gershgorin's bound (exact for diagonal matrices) and that of the factorisation."""
    scaled_A, exponent = scaled(A)
    bound = next_down(_bound_by_cholesky(scaled_A) * 2.0**exponent)
    return max(bound, _gershgorin(A))


def _gershgorin(A: Tensor) -> float:
    """min_i (a_ii − Σ_{j≠i} |a_ij|), rounded down, of the symmetric part."""
    off = (A.abs() / 2 + A.mT.abs() / 2).fill_diagonal_(0.0)
    radii = round_up(off.sum(1), len(A) + 3)
    rounded = torch.nextafter(A.diagonal() - radii - len(A) * UNDERFLOW, torch.tensor(-math.inf, dtype=torch.float64))
    return torch.where(radii > 0, rounded, A.diagonal()).min().item()


def _bound_by_cholesky(A: Tensor) -> float:
    """α − ‖A − αI − LLᵀ‖ for the largest α that Cholesky accepts; max|a_ij| in [1, 2). −inf where it accepts none."""
    size, downwards = len(A), torch.tensor(-math.inf, dtype=torch.float64)
    S = (A + A.mT) / 2
    unsymmetric = torch.where(A.mT == A, 0.0, UNIT * S.abs())  # the rounding of the line above, where there was one
    eigenvalues = torch.linalg.eigvalsh(S)
    room = size * UNIT * max(eigenvalues.abs().max().item(), UNIT)
    for _ in range(ATTEMPTS):
        alpha = eigenvalues[0].item() - room
        B = S.clone()
        B.diagonal().copy_(torch.nextafter(S.diagonal() - alpha, downwards))
        L, failed = torch.linalg.cholesky_ex(B)
        if not failed and torch.isfinite(L).all():
            return next_down(alpha - _distance(B, L, unsymmetric))
        room *= 4
    return -math.inf


def _distance(B: Tensor, L: Tensor, extra: Tensor) -> float:
    """An upper bound of ‖B + X − LLᵀ‖₂ over all symmetric X with |X| ≤ ``extra``."""
    size = len(B)
    product, roundings = _multiplied_out(L)
    computed, absolute, share = (B - product).abs() + extra, L.abs(), gamma(roundings)
    bound = perron_upper(lambda x: computed @ x + share * (absolute @ (absolute.mT @ x)), size, operations=2 * size + 8)
    return next_up(bound + UNDERFLOW)


def _multiplied_out(L: Tensor) -> tuple[Tensor, int]:
    """fl(LLᵀ) of a lower triangular L, and the k of |fl(LLᵀ) − LLᵀ| ≤ γ_k |L||L|ᵀ.

    Summed over √P blocks of √P columns, k is 2√P: one product would leave P, and γ_P |L||L|ᵀ would be most of the bound.
    """
    size = len(L)
    width = min(size, max(16, math.isqrt(size)))
    product, blocks = torch.zeros_like(L), range(0, size, width)
    for start in blocks:
        columns = L[start:, start : start + width]
        product[start:, start:] += columns @ columns.mT  # two steps, for the sum must not enter the products' summation
    return product, width + len(blocks)


@dataclass(frozen=True)
class ConditionNumber:
    """κ = λ_max/λ_min of a positive definite matrix, inf for any other: a value and what is certain of it."""

    estimate: float  # of the computed eigenvalues; inf where λ_min cannot be told from 0
    lower: float  # κ ≥ this; inf where the matrix is certainly not positive definite
    upper: float  # κ ≤ this; inf where λ_min > 0 is not certified


def condition_number(given, *, radius: float | None = None) -> ConditionNumber:
    """κ = λ_max/λ_min with an estimate and two bounds, of a symmetric matrix [P, P] or of eigenvalues [P].

    For a matrix the bounds are rigorous for the matrix as stored: λ_max and λ_min from outside by
    :func:`certified_lambda_max` and :func:`certified_lambda_min`, from inside by Rayleigh quotients; ``radius``, if given,
    is a bound of ‖true − stored‖₂ and widens all four (for a kernel its formation error, ``GeneralizedNTK.error``). For
    eigenvalues all rests on ``radius``, how far each may be off, by default :func:`rounding_radius` of their own norm.

    Raises ValueError for a shape that is neither, for NaN or inf, and for a negative radius; otherwise as
    :func:`certified_lambda_min`.

    >>> kappa = condition_number(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> kappa.estimate, kappa.lower <= 3 <= kappa.upper < 3 + 1e-13
    (3.000000000000, True)
    >>> condition_number(torch.ones(2, 2)).upper, condition_number(torch.tensor([1.0, 4.0]), radius=0.5)
    (inf, ConditionNumber(estimate=4.0, lower=2.33333333333, upper=9.00000000000))
    """
    given = torch.as_tensor(given)
    if given.ndim not in (1, 2) or given.numel() == 0:
        raise ValueError(f"given has shape {list(given.shape)}, expected a matrix [P, P] or eigenvalues [P], P ≥ 1")
    if radius is not None and not 0 <= radius < math.inf:
        raise ValueError(f"radius is {radius}, expected a finite number ≥ 0, or None")
    if given.ndim == 2:
        A = checked_symmetric(given, "given").cpu()
        values, vectors = torch.linalg.eigh(A / 2 + A.mT / 2)
        ends = enclose(A, vectors[:, [0, -1]])
        inside = ends.lambda_min_upper, ends.lambda_max_lower
        outside = certified_lambda_min(A).item(), certified_lambda_max(A).item()
        radius = radius or 0.0
        resolution = max(radius, rounding_radius(len(A), values.abs().max().item()))
    else:
        values = given.to(torch.float64).sort().values
        if not torch.isfinite(values).all():
            raise ValueError("given holds NaN or inf, expected finite eigenvalues")
        inside = outside = values[0].item(), values[-1].item()
        if radius is None:
            dtype = given.dtype if given.is_floating_point() else torch.float64
            radius = rounding_radius(len(values), values.abs().max().item(), dtype)
        resolution = radius
    estimate = values[-1].item() / values[0].item() if values[0].item() > resolution else math.inf
    return ConditionNumber(
        estimate,
        lower=max(1.0, _quotient_down(next_down(inside[1] - radius), next_up(inside[0] + radius))),
        upper=_quotient_up(next_up(outside[1] + radius), next_down(outside[0] - radius)),
    )


def _quotient_down(largest: float, smallest: float) -> float:
    """Lower bound of λ_max/λ_min from λ_max ≥ ``largest`` and λ_min ≤ ``smallest``."""
    return math.inf if smallest <= 0 else next_down(largest / smallest)


def _quotient_up(largest: float, smallest: float) -> float:
    """Upper bound of λ_max/λ_min from λ_max ≤ ``largest`` and λ_min ≥ ``smallest``."""
    return math.inf if smallest <= 0 else next_up(largest / smallest)
