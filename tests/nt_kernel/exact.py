"""Statements about stored symmetric matrices decided without rounding, in rational numbers."""

from fractions import Fraction


def rationals(matrix) -> list[list[Fraction]]:
    """The entries as stored (doubles are rationals); of the exact symmetric part where it is not symmetric."""
    rows = [[Fraction(x) for x in row] for row in matrix.tolist()]
    return [[(rows[i][j] + rows[j][i]) / 2 for j in range(len(rows))] for i in range(len(rows))]


def pivots(matrix, shift: float, sign: int = 1) -> list[Fraction] | None:
    """Pivots of sign·(A − shift·I) by symmetric elimination without interchange, None where one is 0 over a nonzero column."""
    A = rationals(matrix)
    size = len(A)
    for i in range(size):
        A[i][i] -= Fraction(shift)
    A = [[sign * x for x in row] for row in A]
    found = []
    for i in range(size):
        found.append(A[i][i])
        if A[i][i] == 0:
            if any(A[j][i] for j in range(i + 1, size)):
                return None
            continue
        for j in range(i + 1, size):
            ratio = A[j][i] / A[i][i]
            if ratio:
                for k in range(i + 1, size):
                    A[j][k] -= ratio * A[i][k]
    return found


def smallest_is_at_least(matrix, bound: float) -> bool:
    """λ_min(A) ≥ bound: A − bound·I is positive semidefinite."""
    found = pivots(matrix, bound)
    return found is not None and min(found) >= 0


def largest_is_at_most(matrix, bound: float) -> bool:
    """λ_max(A) ≤ bound."""
    found = pivots(matrix, bound, sign=-1)
    return found is not None and min(found) >= 0


def count_below(matrix, number: float) -> int | None:
    """How many eigenvalues are < number (Sylvester's law of inertia), None where the elimination meets a zero pivot."""
    found = pivots(matrix, number)
    return None if found is None or not all(found) else sum(pivot < 0 for pivot in found)
