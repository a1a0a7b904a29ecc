"""Certified bounds against exact rational arithmetic: true whatever the matrix, and close where it is tame."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_kernel.spectra import certified
from nt_kernel.spectra.certified import certified_lambda_max, certified_lambda_min, condition_number
from nt_kernel.spectra.directed import checked_symmetric, gamma, lambda_max_upper, perron_upper, round_up, scaled
from tests.nt_kernel.exact import largest_is_at_most, pivots, smallest_is_at_least

F64, EPS = torch.float64, 2.0**-52


def rotated(values: torch.Tensor, seed: int) -> torch.Tensor:
    """QΛQᵀ for a random orthogonal Q, as rounding stores it, symmetric."""
    normal = torch.randn(len(values), len(values), dtype=F64, generator=torch.Generator().manual_seed(seed))
    Q, _ = torch.linalg.qr(normal)
    A = Q @ torch.diag(values) @ Q.mT
    return (A + A.mT) / 2


def hilbert(size: int) -> torch.Tensor:
    i = torch.arange(1, size + 1, dtype=F64)
    return 1 / (i[:, None] + i - 1)


def second_difference(size: int) -> torch.Tensor:
    """tridiag(−1, 2, −1), stored exactly; eigenvalues 2 − 2cos(jπ/(P+1))."""
    off = torch.ones(size - 1, dtype=F64)
    return 2 * torch.eye(size, dtype=F64) - torch.diag(off, 1) - torch.diag(off, -1)


@st.composite
def matrices(draw):
    """Symmetric matrices of all kinds: definite, singular, indefinite, graded, integer, tiny, huge, off by an ulp."""
    size, seed = draw(st.integers(1, 7)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(["gram", "low rank", "indefinite", "integer", "graded", "spread", "rank one"]))
    normal = torch.randn(size, size, dtype=F64, generator=generator)
    if kind == "gram":
        A = normal @ normal.mT
    elif kind == "low rank":
        A = normal[:, : max(1, size // 2)] @ normal[:, : max(1, size // 2)].mT
    elif kind == "indefinite":
        A = normal + normal.mT
    elif kind == "integer":
        A = (3 * normal).round()
        A = A @ A.mT
    elif kind == "graded":
        scale = 10.0 ** -torch.arange(size, dtype=F64)
        A = scale[:, None] * (normal @ normal.mT) * scale
    elif kind == "spread":
        A = rotated(torch.logspace(-17, 0, size, dtype=F64), seed)
    else:
        A = torch.outer(normal[0], normal[0])
    A = torch.tril(A) + torch.tril(A, -1).mT
    if draw(st.booleans()) and size > 1:
        A[0, 1] = torch.nextafter(A[0, 1], A[0, 1] + 1)
    return A * 2.0 ** draw(st.sampled_from([0, 0, 0, 40, -40, 1000, -1000, -1060]))


@given(matrices())
@settings(max_examples=150)
def test_the_bounds_are_true_in_exact_arithmetic(A):
    lower, upper, cheap = certified_lambda_min(A).item(), certified_lambda_max(A).item(), lambda_max_upper(A).item()
    assert smallest_is_at_least(A, lower)
    assert largest_is_at_most(A, upper)
    assert largest_is_at_most(A, cheap)


@given(matrices())
@settings(max_examples=60)
def test_the_bounds_are_close_in_exact_arithmetic(A):
    largest = A.abs().max().clamp_min(1e-300)
    room = (
        10 * len(A) * EPS * ((A / largest).norm() * largest).item() + 1e-290
    )  # the second for matrices whose entries are next to underflow
    lower, upper = certified_lambda_min(A).item(), certified_lambda_max(A).item()
    assert not smallest_is_at_least(A, lower + room)
    assert not largest_is_at_most(A, upper - room)


@given(st.integers(2, 7), st.integers(0, 10_000), st.sampled_from([-30, 0, 0, 30]))
@settings(max_examples=60)
def test_exactly_singular_matrices_never_get_a_positive_bound(size, seed, exponent):
    """Integer Gram matrices of rank < P: every entry, and the singularity, survives storage."""
    factor = torch.randint(-9, 10, (size, size - 1), dtype=F64, generator=torch.Generator().manual_seed(seed))
    A = factor @ factor.mT * 2.0**exponent
    found = pivots(A, 0.0)
    assert found is None or math.prod(found) == 0
    assert certified_lambda_min(A).item() <= 0


@pytest.mark.parametrize("size", [1, 2, 3, 10, 40, 150, 400])
def test_second_difference_has_the_known_ends(size):
    A = second_difference(size)
    smallest = 4 * math.sin(math.pi / (2 * (size + 1))) ** 2
    largest = 4 * math.cos(math.pi / (2 * (size + 1))) ** 2
    room = 10 * size * EPS * 4
    assert smallest - room <= certified_lambda_min(A).item() <= smallest * (1 + 4 * EPS)
    assert largest * (1 - 4 * EPS) <= certified_lambda_max(A).item() <= largest + room


@pytest.mark.parametrize(
    ("size", "smallest"),
    [(3, 2.687340355773529e-3), (5, 3.287928772171863e-6), (8, 1.111538966372442e-10)],
)
def test_hilbert_matrices_are_certified_positive(size, smallest):
    bound = certified_lambda_min(hilbert(size)).item()
    assert 0 < bound < smallest + size * EPS
    assert bound > smallest - 20 * size * EPS
    assert smallest_is_at_least(hilbert(size), bound)


def test_hilbert_of_order_13_is_not_certified_and_not_refuted():
    """λ_min = 1.8e-18 lies below what storing the entries does to it: no positive bound can be close."""
    bound = certified_lambda_min(hilbert(13)).item()
    assert -1e-13 < bound < 1e-16


@pytest.mark.parametrize("size", [20, 100, 300])
@pytest.mark.parametrize("spectrum", ["flat", "wide", "indefinite", "low rank"])
def test_close_at_larger_sizes(size, spectrum):
    values = {
        "flat": torch.linspace(1, 2, size, dtype=F64),
        "wide": torch.logspace(-9, 0, size, dtype=F64),
        "indefinite": torch.linspace(-1, 1, size, dtype=F64),
        "low rank": torch.cat([torch.zeros(size // 2, dtype=F64), torch.ones(size - size // 2, dtype=F64)]),
    }[spectrum]
    A = rotated(values, size)
    stored = torch.linalg.eigvalsh(A)
    room, norm = 10 * size * EPS, values.abs().max().item()
    lower, upper = certified_lambda_min(A).item(), certified_lambda_max(A).item()
    assert stored[0].item() - room * norm <= lower <= values[0].item() + room * norm / 10
    assert values[-1].item() - room * norm / 10 <= upper <= stored[-1].item() + room * norm
    assert spectrum != "wide" or lower > 0.99e-9


def test_diagonal_and_zero_matrices_are_exact():
    values = torch.tensor([3.0, 1e-200, 2.0**700, 7.0], dtype=F64)
    assert certified_lambda_min(torch.diag(values)).item() == 1e-200
    assert certified_lambda_max(torch.diag(values)).item() == 2.0**700
    assert certified_lambda_min(torch.zeros(3, 3)).item() == 0
    assert lambda_max_upper(torch.zeros(3, 3)).item() == 0


def test_nothing_is_believed_of_the_factorisation(monkeypatch):
    """A Cholesky that is wrong in the fifth digit, and one that lies about success, cost closeness and not truth."""
    A = rotated(torch.linspace(1, 2, 6, dtype=F64), 0)
    good, true_cholesky = certified_lambda_min(A).item(), torch.linalg.cholesky_ex

    def sloppy(B):
        L, info = true_cholesky(B)
        return L * (1 + 1e-5), info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", sloppy)
    assert smallest_is_at_least(A, certified_lambda_min(A).item())
    assert certified_lambda_min(A).item() < good - 1e-6
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda B: (torch.eye(6, dtype=F64), torch.tensor(0)))
    assert smallest_is_at_least(A, certified_lambda_min(A).item())
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda B: (torch.full((6, 6), math.nan, dtype=F64), torch.tensor(0))
    )
    assert smallest_is_at_least(A, certified_lambda_min(A).item())  # Gershgorin is left


def test_nothing_is_believed_of_the_eigenvalues(monkeypatch):
    A, true_eigenvalues = rotated(torch.linspace(1, 2, 6, dtype=F64), 0), torch.linalg.eigvalsh
    for wrong in (0.1, -3.0):
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda B, wrong=wrong: true_eigenvalues(B) + wrong)
        assert smallest_is_at_least(A, certified_lambda_min(A).item())


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_the_product_of_the_factor_is_within_its_share_of_the_exact_one(size, seed):
    L = torch.randn(size, size, dtype=F64, generator=torch.Generator().manual_seed(seed)).tril()
    product, roundings = certified._multiplied_out(L)
    share, rows = Fraction(gamma(roundings)), [[Fraction(x) for x in row] for row in L.tolist()]
    worst = Fraction(0)
    for i in range(0, size, 7):
        for j in range(size):
            exact = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            error = abs(Fraction(product[i, j].item()) - exact)
            assert error <= share * sum(abs(a * b) for a, b in zip(rows[i], rows[j], strict=True))
            worst = max(worst, error)
    assert certified._distance(product, L, torch.zeros_like(L)) >= worst  # the computed difference is 0


@pytest.mark.parametrize("seed", range(5))  # one α rounds all twelve differences the same way
def test_what_is_factorised_lies_below_the_shifted_matrix(monkeypatch, seed):
    """B ≤ A − αI on the diagonal, exactly, and the rounding of the symmetric part is handed on."""
    A, seen = rotated(torch.linspace(0.1, 1, 12, dtype=F64), seed), {}
    A[0, 1] = torch.nextafter(A[0, 1], torch.tensor(9.0, dtype=F64))

    def keep(B, L, extra):
        seen.update(B=B, extra=extra)
        return 0.0

    monkeypatch.setattr(certified, "_distance", keep)
    A = scaled(A)[0]
    alpha = math.nextafter(certified._bound_by_cholesky(A), math.inf)
    for below, entry in zip(seen["B"].diagonal().tolist(), A.diagonal().tolist(), strict=True):
        assert Fraction(below) <= Fraction(entry) - Fraction(alpha)
    middle = (Fraction(A[0, 1].item()) + Fraction(A[1, 0].item())) / 2
    assert abs(Fraction(seen["B"][0, 1].item()) - middle) <= Fraction(seen["extra"][0, 1].item())
    assert seen["extra"][0, 1].item() == seen["extra"][1, 0].item() > 0 == seen["extra"][2:].abs().max().item()
    monkeypatch.undo()
    ones = torch.ones(3, 3, dtype=F64)
    assert certified._distance(0 * ones, 0 * ones, ones) >= 3


def test_leading_dimensions_dtypes_and_the_caller_s_matrix():
    stack = torch.stack([rotated(torch.linspace(i + 1, i + 2, 4, dtype=F64), i) for i in range(6)]).reshape(2, 3, 4, 4)
    kept = stack.clone()
    bounds = certified_lambda_min(stack)
    assert bounds.shape == (2, 3)
    assert bounds[1, 2].item() == certified_lambda_min(stack[1, 2]).item()
    assert lambda_max_upper(stack).shape == certified_lambda_max(stack).shape == (2, 3)
    assert torch.equal(stack, kept)
    single = stack[0, 0].float()
    assert certified_lambda_min(single).item() == certified_lambda_min(single.double()).item()
    assert certified_lambda_min(stack[0, 0].numpy()).item() == bounds[0, 0].item()
    assert certified_lambda_min(stack[0, 0].requires_grad_()).requires_grad is False


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        (torch.ones(2, 3), ValueError, "square"),
        (torch.ones(3), ValueError, "square"),
        (torch.ones(0, 0), ValueError, "P ≥ 1"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), ValueError, "NaN or inf"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError, "not symmetric"),
        (torch.eye(2, dtype=torch.int64), TypeError, r"\.double\(\)"),
        (torch.eye(2, dtype=torch.complex128), TypeError, "complex128"),
    ],
)
@pytest.mark.parametrize("bound", [certified_lambda_min, certified_lambda_max, lambda_max_upper])
def test_bad_matrices_are_named(bound, matrix, error, text):
    with pytest.raises(error, match=text):
        bound(matrix)


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_perron_bound_lies_between_the_spectral_radius_and_the_largest_row_sum(size, seed):
    T = torch.randint(0, 9, (size, size), dtype=F64, generator=torch.Generator().manual_seed(seed))
    bound = perron_upper(lambda x: T @ x, size, size)
    assert (
        torch.linalg.eigvals(T).abs().max().item() * (1 - 1e-12)
        <= bound
        <= T.sum(1).max().item() * (1 + 1e-12) + 1e-200
    )


def test_directed_roundings():
    for k in (1, 2, 7, 100, 10**6):
        assert Fraction(gamma(k)) >= Fraction(k, 2**53) / (1 - Fraction(k, 2**53))
    terms = torch.rand(1000, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = sum(Fraction(t) for t in terms.tolist())
    assert exact <= Fraction(round_up(terms.sum().item(), 999)) <= exact * (1 + Fraction(10**-12))
    for A in (
        torch.full((1, 1), 3e300, dtype=F64),
        torch.full((1, 1), -3e-300, dtype=F64),
        torch.zeros(1, 1, dtype=F64),
    ):
        B, exponent = scaled(A)
        assert (B * 2.0**exponent).item() == A.item()
        assert B.abs().item() < 2
    assert checked_symmetric(torch.eye(2, dtype=torch.float16)).dtype == F64


@given(matrices())
@settings(max_examples=60)
def test_condition_number_bounds_hold_exactly(A):
    """κ ≤ u: λ_max ≤ u·λ_min, and the reverse; decided with the eigenvalues bracketed to 1e-6 of their size in rationals."""
    kappa = condition_number(A)
    assert 1 <= kappa.lower <= kappa.upper
    if not math.isfinite(kappa.upper):
        return
    values = torch.linalg.eigvalsh(scaled(A)[0])
    smallest, largest = Fraction(values[0].item()), Fraction(values[-1].item())
    slack = Fraction(len(A) * 4 * EPS * values.abs().max().item())
    assert smallest > 0
    assert Fraction(kappa.lower) <= (largest + slack) / max(smallest - slack, Fraction(1, 10**40))
    assert Fraction(kappa.upper) >= (largest - slack) / (smallest + slack)
    assert kappa.lower <= kappa.estimate * (1 + 1e-9) or kappa.estimate == math.inf


def test_condition_number_is_sharp_where_it_can_be_and_inf_where_it_must():
    A = rotated(torch.linspace(1, 100, 30, dtype=F64), 1)
    kappa = condition_number(A)
    assert kappa.lower <= kappa.estimate <= kappa.upper
    assert kappa.upper / kappa.lower - 1 < 1e-10
    assert kappa.estimate == pytest.approx(100, rel=1e-12)
    singular = condition_number(torch.ones(4, 4))
    assert singular.estimate == singular.upper == math.inf
    assert singular.lower > 1e14
    indefinite = condition_number(torch.diag(torch.tensor([-1.0, 5.0])))
    assert (indefinite.estimate, indefinite.lower, indefinite.upper) == (math.inf,) * 3
    assert condition_number(torch.tensor([[4.0]])).estimate == 1
    widened = condition_number(A, radius=0.5)
    assert widened.lower < 100 / 1.4 < 100 / 0.6 < widened.upper
    assert condition_number(A, radius=2.0).upper == math.inf


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.floats(0, 0.009), st.integers(0, 1000))
def test_condition_number_of_eigenvalues_covers_all_within_the_radius(values, radius, seed):
    values = torch.tensor(values, dtype=F64)
    kappa = condition_number(values, radius=radius)
    noise = (torch.rand(len(values), dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * radius
    moved = values + noise
    assert kappa.lower * (1 - 1e-12) <= moved.max().item() / moved.min().item() <= kappa.upper * (1 + 1e-12)


@pytest.mark.parametrize(
    ("given_", "radius", "text"),
    [
        (torch.ones(2, 2, 2), None, "matrix .*or eigenvalues"),
        (torch.ones(0), None, "P ≥ 1"),
        (torch.tensor(1.0), None, "matrix .*or eigenvalues"),
        (torch.tensor([1.0, math.inf]), None, "NaN or inf"),
        (torch.ones(2), -1.0, "radius is -1"),
        (torch.ones(2), math.nan, "radius is nan"),
    ],
)
def test_bad_arguments_of_condition_number_are_named(given_, radius, text):
    with pytest.raises(ValueError, match=text):
        condition_number(given_, radius=radius)
