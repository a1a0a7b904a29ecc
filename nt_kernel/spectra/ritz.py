"""Ritz pairs and what their residuals prove about the eigenvalues of a symmetric operator."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.spectra.directed import UNDERFLOW, UNIT, column_norms, gamma, next_down, next_up, round_up, scaled


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs (θ_i, v_i) of a symmetric A [P, P], θ ascending, with their residuals computed afresh.

    **What is bounded.** ‖Av − θv‖ ≤ ρ‖v‖ puts *an* eigenvalue of A into [θ − ρ, θ + ρ] (Krylov–Weinstein; B. N. Parlett,
    *The Symmetric Eigenvalue Problem*, thm. 4.5.1): ``lower``, ``upper``. Which one it is, it does not say, and two intervals
    that overlap may hold the same one. A Rayleigh quotient lies between λ_min and λ_max: ``lambda_max_lower`` is a lower
    bound of λ_max, ``lambda_min_upper`` an upper bound of λ_min, converged or not.
    **What is not.** No iteration bounds λ_min from below or λ_max from above: Lanczos may have missed the extreme
    eigenvalue, and ``lower[0]`` is no lower bound of λ_min. Those bounds are
    :func:`nt_kernel.spectra.certified.certified_lambda_min`, :func:`nt_kernel.spectra.certified.certified_lambda_max` and
    :func:`nt_kernel.spectra.directed.lambda_max_upper`, of matrices.

    ``rounding`` tells what the rounding allowances within ρ rest on: "proved" for a stored matrix, "modelled" for an
    operator whose products are taken at their word up to an error of assumed size.
    """

    values: Tensor  # θ, Rayleigh quotients, ascending, [k] float64
    vectors: Tensor  # v, [P, k] float64, of norm 1 to rounding
    residuals: Tensor  # ρ ≥ ‖Av − θv‖/‖v‖, rounding included, [k]
    rayleigh_errors: Tensor  # ≥ |θ − vᵀAv/vᵀv|, [k]
    converged: Tensor  # computed residual ≤ tolerance·‖A‖, [k] bool
    which: str = "largest"  # end of the spectrum that was asked for
    method: str = "dense"  # what found the vectors
    rounding: str = "proved"
    message: str = ""  # what the iteration complained of, word for word

    @property
    def lower(self) -> Tensor:
        """θ − ρ, rounded down, [k]: an eigenvalue of A lies in [lower_i, upper_i]."""
        return torch.nextafter(self.values - self.residuals, torch.full_like(self.values, -math.inf))

    @property
    def upper(self) -> Tensor:
        """θ + ρ, rounded up, [k]."""
        return torch.nextafter(self.values + self.residuals, torch.full_like(self.values, math.inf))

    @property
    def lambda_max_lower(self) -> float:
        """A lower bound of λ_max: the largest Rayleigh quotient less its rounding."""
        return next_down((self.values - self.rayleigh_errors).max().item())

    @property
    def lambda_min_upper(self) -> float:
        """An upper bound of λ_min: the smallest Rayleigh quotient plus its rounding."""
        return next_up((self.values + self.rayleigh_errors).min().item())

    def sharpened(self, index: int, *, below: float = -math.inf, above: float = math.inf) -> tuple[float, float]:
        """An interval of the one eigenvalue λ in (``below``, ``above``), by Kato and Temple.

        θ − ρ²/(above − θ) ≤ λ ≤ θ + ρ²/(θ − below).

        It must be *known*, from elsewhere, that exactly one eigenvalue lies strictly between the two numbers, θ too: no
        residual tells. With only it known that nothing lies below λ, ``below`` stays −inf. The result is cut with
        [lower, upper] where that interval lies within (``below``, ``above``) and so holds the same λ. For pairs solved to
        rounding there is nothing to gain.

        Raises ValueError where θ with its rounding does not lie strictly between.
        Source: T. Kato, J. Phys. Soc. Japan 4, 334 (1949).

        >>> A = torch.diag(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
        >>> pairs = enclose(A, torch.tensor([[0.0], [0.1], [1.0]], dtype=torch.float64))
        >>> pairs.lower.item(), pairs.sharpened(0, below=1.0)
        (2.782178217822, (2.98019801980, 3.00000000000))
        """
        theta, rho, error = (t[index].item() for t in (self.values, self.residuals, self.rayleigh_errors))
        to_above, to_below = next_down(above - next_up(theta + error)), next_down(next_down(theta - error) - below)
        if not (to_above > 0 and to_below > 0):
            raise ValueError(
                f"θ = {theta:.6g} (± {error:.1g}) does not lie strictly between below = {below:.6g} and above = {above:.6g}; "
                "give two numbers around it with exactly one eigenvalue between them"
            )
        square = next_up(rho * rho)
        lower = next_down(theta - next_up(error + next_up(square / to_above)))
        upper = next_up(theta + next_up(error + next_up(square / to_below)))
        if below < self.lower[index].item() and self.upper[index].item() < above:
            lower, upper = max(lower, self.lower[index].item()), min(upper, self.upper[index].item())
        return lower, upper


def enclose(A: Tensor, vectors: Tensor, *, tolerance: float = 1e-8) -> RitzPairs:
    """Ritz pairs of a stored symmetric matrix (float64, [P, P]) from any nonzero ``vectors`` [P, k]; all rounding proved.

    Raises ValueError for a vector that is 0 or not finite.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> pairs = enclose(A, torch.tensor([[1.0], [0.9]], dtype=torch.float64))
    >>> pairs.lambda_max_lower, bool(pairs.lower[0] <= 3 <= pairs.upper[0])
    (2.99447513812, True)
    """
    A, V = A.detach().cpu(), vectors.detach().cpu().to(torch.float64)
    V = V / column_norms(V)
    if not torch.isfinite(V).all():
        raise ValueError("vectors holds NaN, inf or a column of zeros; expected finite nonzero columns [P, k]")
    A, exponent = scaled(A)
    S = (A + A.mT) / 2  # one rounding, hence the + 1
    rounding = gamma(len(A) + 1) * (S.abs() @ V.abs())
    allowance = round_up(column_norms(rounding), 3 * len(A) + 8) + UNDERFLOW
    return ritz_pairs(V, S @ V, allowance, norm=S.norm(dim=0).max().item(), tolerance=tolerance, unit=2.0**exponent)


def ritz_pairs(
    vectors: Tensor,
    products: Tensor,
    allowance: Tensor,
    *,
    norm: float,
    tolerance: float,
    unit: float = 1.0,
    rounding: str = "proved",
) -> RitzPairs:
    """Ritz pairs from V [P, k], ‖v‖ ≈ 1, and the computed AV [P, k], each column off by at most ``allowance`` [k] in norm.

    ``norm`` is what is known of ‖A‖, for the convergence flags alone. ``unit`` is a power of 2: A was divided by it.

    With θ = vᵀAv/vᵀv, r = Av − θv: ρ = (‖r‖ + allowance)/‖v‖ and |θ − vᵀAv/vᵀv| ≤ (|vᵀr| + ‖v‖·allowance)/‖v‖², upwards.

    >>> v = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    >>> ritz_pairs(v, 2 * v, torch.zeros(1), norm=2.0, tolerance=1e-8).values
    tensor([2.], dtype=torch.float64)
    """
    size, V, AV = len(vectors), vectors, products
    length = V.square().sum(0)
    values = (V * AV).sum(0) / length
    order = values.argsort()
    V, AV, allowance, length, values = V[:, order], AV[:, order], allowance[order], length[order], values[order]

    operations = 2 * size + 8
    shortest = length / (1 + 2 * (size + 2) * UNIT)  # vᵀv rounded down, up to the quotient that round_up below covers
    R = AV - V * values
    formed = round_up(gamma(3) * column_norms((V * values).abs() + AV.abs()), operations)
    underflow = size * torch.finfo(torch.float64).tiny  # of products on this page; far more than they can lose
    allowance = round_up(allowance + formed + underflow, 2)
    raw = column_norms(R)
    residuals = round_up((raw + allowance) / shortest.sqrt(), operations)
    tilt = (V * R).sum(0).abs() + gamma(size) * (V * R).abs().sum(0) + round_up(length.sqrt(), operations) * allowance
    rayleigh_errors = round_up(tilt / shortest, operations)

    threshold = tolerance * max(norm, values.abs().max().item()) * length.sqrt()
    upwards = torch.full_like(values, math.inf)
    return RitzPairs(
        values * unit,
        V,
        torch.nextafter(residuals * unit, upwards),
        torch.nextafter(rayleigh_errors * unit, upwards),
        raw <= threshold,
        rounding=rounding,
    )
