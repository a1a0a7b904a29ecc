"""Eigenvalues, the rounding radius around them, and the numbers that sum them up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_kernel import generalized_ntk
from nt_kernel.spectra.spectrum import (
    effective_dimension,
    effective_rank,
    kernel_error_scale,
    largest_block_eigenvalues,
    rounding_radius,
    safe_lambda_min,
    symmetric_eigenvalues,
)

F64 = torch.float64


@given(st.integers(1, 30), st.integers(0, 1000), st.integers(-6, 6))
def test_eigenvalues_of_a_known_spectrum_lie_within_the_radius(size, seed, log_norm):
    """A reflection I − 2vvᵀ/|v|² with integer v of |v|² = 2^k is exact in floating point, and so is Q·diag·Q."""
    torch.manual_seed(seed)
    v = torch.zeros(size, dtype=F64)
    v[: min(size, 4)] = 1.0 if size >= 4 else 0.0
    Q = torch.eye(size, dtype=F64) - (2 * torch.outer(v, v) / 4 if size >= 4 else 0)
    values = torch.randint(0, 2**20, (size,), dtype=F64).sort().values * 2.0 ** (3 * log_norm)
    A = Q @ torch.diag(values) @ Q
    radius = rounding_radius(size, A.norm().item())
    assert (symmetric_eigenvalues(A) - values).abs().max().item() <= radius
    assert safe_lambda_min(symmetric_eigenvalues(A)[0].item(), radius) <= values[0].item()


def test_only_the_symmetric_part_counts_and_float32_is_lifted():
    A = torch.tensor([[2.0, 3.0], [-1.0, 2.0]])
    assert symmetric_eigenvalues(A).dtype == F64
    assert symmetric_eigenvalues(A).tolist() == pytest.approx([1.0, 3.0], rel=1e-15)


@pytest.mark.parametrize(
    ("smallest", "radius", "expected"),
    [
        (0.0, 1e-16, 0.0),
        (-1e-18, 1e-16, 0.0),
        (1.5e-16, 1e-16, 0.0),
        (2e-16, 1e-16, 0.0),
        (-1.0, 0.1, 0.0),
        (float("nan"), 1e-16, 0.0),
        (1.0, float("nan"), 0.0),
    ],
)
def test_what_cannot_be_told_from_zero_is_zero(smallest, radius, expected):
    found = safe_lambda_min(smallest, radius)
    assert found == expected
    assert str(found) == "0.0"


def test_safe_value_keeps_clear_of_the_radius():
    assert safe_lambda_min(1.0, 0.25) == 0.75


def test_error_scale_is_continuous_enough_and_never_below_the_kernel():
    # R ≤ min(K, 1/c): its rounding may exceed it, but not fall short of it.
    for norm in (1e-8, 0.1, 1.0, 1e6):
        for c in (0.0, 0.25, 1.0):
            R = norm / (1 + c * norm)
            assert kernel_error_scale(norm, 4, c) >= R / 4
    assert kernel_error_scale(1e6, n=2, c=0.0) == 5e5


def test_block_eigenvalues():
    blocks = torch.diag_embed(torch.tensor([[1.0, 5.0], [7.0, 2.0]], dtype=F64))
    assert largest_block_eigenvalues(blocks).tolist() == [5.0, 7.0]


@given(
    seed=st.integers(0, 10_000),
    log_mass=st.floats(-3, 5),
    scale=st.sampled_from(["mean", "sum", "none"]),
    outputs=st.integers(1, 3),
)
@settings(max_examples=150)
def test_equal_inputs_never_get_a_positive_rate_whatever_the_size_of_the_kernel(seed, log_mass, scale, outputs):
    # c·K from 1e-5 to 1e4, through the size where the form of the kernel changes.
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.Tanh(), torch.nn.Linear(12, outputs)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    x[2] = x[0]
    assert generalized_ntk(model, x, mass=10**log_mass, scale=scale).xi == 0.0


SPECTRA = st.lists(st.floats(0, 1e6), min_size=1, max_size=12)


@given(SPECTRA, st.sampled_from([1e-200, 1e-3, 1.0, 1e150]))
def test_effective_ranks_are_ordered_between_1_and_the_rank(values, unit):
    values = torch.tensor(values, dtype=F64) * unit
    entropy, participation, intrinsic = (
        effective_rank(values, kind).item() for kind in ("entropy", "participation", "intrinsic")
    )
    rank = (values > 0).sum().item()
    if values.max() == 0:
        assert entropy == participation == intrinsic == 0
        return
    slack = 1 + 1e-12
    assert intrinsic * slack >= 1
    assert intrinsic <= participation * slack
    assert participation <= entropy * slack
    assert entropy <= rank * slack


def test_effective_ranks_against_the_matrix_formulas():
    A = torch.randn(6, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    A = A @ A.mT
    values = torch.linalg.eigvalsh(A)
    p = values / A.trace()
    assert effective_rank(values).item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-13)
    assert effective_rank(values, "participation").item() == pytest.approx((A.trace() ** 2 / (A @ A).trace()).item())
    assert effective_rank(values, "intrinsic").item() == pytest.approx((A.trace() / torch.linalg.norm(A, 2)).item())


def test_effective_rank_of_a_flat_spectrum_is_its_rank():
    values = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0])
    for kind in ("entropy", "participation", "intrinsic"):
        assert effective_rank(values, kind).item() == pytest.approx(3, rel=1e-14)


def test_effective_dimension_against_the_trace():
    A = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    A = A @ A.mT
    ridge = 0.3
    reference = torch.linalg.solve(A + ridge * torch.eye(6, dtype=F64), A).trace().item()
    assert effective_dimension(torch.linalg.eigvalsh(A), ridge).item() == pytest.approx(reference, rel=1e-12)


@given(SPECTRA, st.floats(1e-6, 1e6), st.floats(1, 100))
def test_effective_dimension_falls_with_the_ridge_from_the_rank(values, ridge, factor):
    values = torch.tensor(values, dtype=F64)
    found = effective_dimension(values, ridge).item()
    assert 0 <= found <= (values > 0).sum().item()
    assert found <= values.sum().item() / ridge * (1 + 1e-12)
    assert effective_dimension(values, ridge * factor).item() <= found * (1 + 1e-12)


def test_summaries_of_stacked_spectra_and_of_rounded_zeros():
    stack = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]], dtype=F64)
    assert effective_rank(stack).shape == effective_dimension(stack, 1.0).shape == (2,)
    assert effective_rank(stack)[1].item() == 1
    assert effective_rank(stack)[0].item() == effective_rank(stack[0]).item()
    assert effective_rank(torch.tensor([-1e-16, 1.0], dtype=F64)).item() == 1
    assert effective_rank(torch.tensor([-1e-7, 1.0])).item() == 1  # float32 knows its own zeros
    mixed = torch.tensor([[-1e-10, 1.0], [1e9, 1e9]], dtype=F64)
    with pytest.raises(ValueError, match="positive semidefinite"):
        effective_rank(mixed)  # each spectrum has its own radius


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (torch.tensor([]), "P ≥ 1"),
        (torch.tensor(1.0), "P ≥ 1"),
        (torch.tensor([1j]), "real numbers"),
        (torch.tensor([1.0, math.nan]), "NaN or inf"),
        (torch.tensor([-1.0, 1.0]), "positive semidefinite"),
    ],
)
def test_bad_spectra_are_named(values, text):
    with pytest.raises(ValueError, match=text):
        effective_rank(values)
    with pytest.raises(ValueError, match=text):
        effective_dimension(values, 1.0)


def test_bad_options_of_the_summaries_are_named():
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        effective_rank(torch.ones(2), "entropie")
    for ridge in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="ridge is"):
            effective_dimension(torch.ones(2), ridge)
