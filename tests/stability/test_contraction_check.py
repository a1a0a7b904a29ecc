"""The check of a contraction metric against exact rational arithmetic: what it certifies is true of the stored numbers."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability.contraction.check import certified_slack, check_metric, normalised
from stability.contraction.sdp import exponent_of


def exact(array):
    return [[Fraction(float(v)) for v in row] for row in array]


def times(A, B):
    return [
        [sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in zip(*B, strict=True)]
        for row in A
    ]


def combine(*terms):
    """Σ factor·matrix."""
    size = len(terms[0][1])
    return [[sum(f * M[i][j] for f, M in terms) for j in range(size)] for i in range(size)]


def transposed(A):
    return [list(row) for row in zip(*A, strict=True)]


def is_semidefinite(A):
    """A ⪰ 0 by elimination in rationals."""
    A = [row[:] for row in A]
    for k in range(len(A)):
        if A[k][k] < 0 or (A[k][k] == 0 and any(A[k][j] != 0 for j in range(k, len(A)))):
            return False
        for i in range(k + 1, len(A)):
            if A[k][k] != 0:
                f = A[i][k] / A[k][k]
                A[i] = [a - f * b for a, b in zip(A[i], A[k], strict=True)]
    return True


def slacks(kind, matrices, metrics, rate, intervals):
    """The exact matrices that must be ⪰ 0."""
    lam = Fraction(rate)
    for t, A in enumerate(map(exact, matrices)):
        now, after = exact(metrics[0]), exact(metrics[0])
        if len(metrics) > 1:
            now, after = exact(metrics[t]), exact(metrics[t + 1])
        if kind == "discrete":
            yield combine((lam**2, now), (-1, times(transposed(A), times(after, A))))
        else:
            slope = Fraction(0) if len(metrics) == 1 else 1 / Fraction(intervals[t])
            for Theta in (now, after):
                P = times(Theta, A)
                yield combine((-1, P), (-1, transposed(P)), (-2 * lam, Theta), (-slope, after), (slope, now))


@given(
    seed=st.integers(0, 100_000),
    size=st.integers(1, 4),
    kind=st.sampled_from(["continuous", "discrete"]),
    varying=st.booleans(),
    near=st.booleans(),
    stretch=st.sampled_from([1.0, 1e2, 1e5]),
)
@settings(max_examples=120, deadline=None)
def test_certificates_are_true_in_rational_arithmetic(seed, size, kind, varying, near, stretch):
    draw = np.random.default_rng(seed)
    T = 2
    matrices = [draw.standard_normal((size, size)) for _ in range(T)]
    metrics = []
    for _ in range(T + 1 if varying else 1):
        Q = np.linalg.qr(draw.standard_normal((size, size)))[0]
        metrics.append((Q * np.geomspace(1, stretch, size)) @ Q.T * draw.uniform(0.1, 10))
    if near:  # metrics that hardly move: either end of an interval can be the worse one
        for t in range(1, len(metrics)):
            move = draw.standard_normal((size, size))
            metrics[t] = metrics[0] + 0.02 * np.linalg.eigvalsh(metrics[0])[0] * (move + move.T) / size
    intervals = [0.1, 0.7]
    found = check_metric(kind, matrices, metrics, intervals)
    assert found is not None
    for slack in slacks(kind, matrices, found.metrics, found.rate, intervals):
        assert is_semidefinite(slack)
    one = exact(np.eye(size))
    for Theta in map(exact, found.metrics):
        assert is_semidefinite(combine((1, Theta), (-1, one)))
        assert is_semidefinite(combine((Fraction(found.condition), one), (-1, Theta)))
    # and not much is given away
    q = exponent_of(kind, matrices, found.metrics, intervals)
    rate = q / 2 if kind == "continuous" else np.sqrt(-q)
    assert abs(found.rate - rate) <= 1e-11 * stretch * max(1.0, abs(rate))
    assert found.margin >= 0


def test_tight_metrics_are_backed_off_not_believed():
    """A normal matrix in its own metric: the inequality is an equality in every direction, so rounding decides."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        Q = np.linalg.qr(draw.standard_normal((3, 3)))[0]
        A = Q @ np.diag([-0.3] * 3) @ Q.T + 0.7 * (Q @ np.array([[0, 1, 0], [-1, 0, 2], [0, -2, 0]]) @ Q.T)
        found = check_metric("continuous", [A], [np.eye(3)])
        assert 0.3 - 1e-13 < found.rate <= 0.3 + 1e-15
        assert all(is_semidefinite(s) for s in slacks("continuous", [A], found.metrics, found.rate, None))


def test_slack_is_a_lower_bound_of_the_smallest_eigenvalue():
    A, Theta = np.array([[-1.0, 0.5], [0.0, -2.0]]), np.diag([1.0, 3.0])
    slack = -(A.T @ Theta + Theta @ A) - 0.4 * Theta
    exact_value = np.linalg.eigvalsh(slack)[0]
    assert exact_value - 1e-13 <= certified_slack("continuous", [A], [Theta], 0.4) <= exact_value
    slack = 0.49 * Theta - (A.T @ Theta @ A)
    exact_value = np.linalg.eigvalsh(slack)[0]
    assert exact_value - 1e-13 <= certified_slack("discrete", [A], [Theta], -0.49) <= exact_value


@pytest.mark.parametrize("Theta", [np.diag([1.0, -1.0]), np.diag([1.0, 0.0]), np.full((2, 2), np.nan), np.ones((2, 2))])
def test_metrics_that_are_not_positive_definite_are_refused(Theta):
    assert normalised([Theta]) is None
    assert check_metric("continuous", [-np.eye(2)], [Theta]) is None


def test_growth_is_certified_too():
    found = check_metric("discrete", [np.diag([2.0, 0.5])], [np.eye(2)])
    assert 2 <= found.rate < 2 + 1e-12
    assert found.condition == 1


def test_the_last_digit_of_a_discrete_rate():
    for value in np.random.default_rng(0).uniform(0.1, 0.9, 200):
        found = check_metric("discrete", [np.array([[value]])], [np.eye(1)])
        assert Fraction(value) <= Fraction(found.rate) <= Fraction(value) * (1 + Fraction(1, 10**14))


def test_rounding_of_the_products_is_in_the_slack():
    """ΘA + AᵀΘ cancels to a 10⁻⁷th of its terms, so that forming it loses what a Cholesky factorisation cannot see."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        Q = np.linalg.qr(draw.standard_normal((3, 3)))[0]
        Theta = (Q * np.geomspace(1, 30, 3)) @ Q.T
        Theta, K = (Theta + Theta.T) / 2, 1e7 * draw.standard_normal((3, 3))
        A = np.linalg.solve(Theta, K - K.T) - np.eye(3)
        margin = certified_slack("continuous", [A], [Theta], 0.1)
        slack = next(iter(slacks("continuous", [A], [Theta], 0.05, None)))
        assert is_semidefinite(combine((1, slack), (-Fraction(margin), exact(np.eye(3)))))
