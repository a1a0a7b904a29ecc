"""Factors of output metrics: LᵀL = M, and the split r = Lᵀρ + r⊥ that the push-through form rests on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel import NumericalError
from nt_kernel.inner import InnerSystem
from nt_kernel.output_metric import psd_factor, resolve_output_metric, softmax_factor
from tests.reference import definite_metric, singular_metric, softmax_matrix

F64 = torch.float64
EXTREME = [
    [0.0, 0.0, 0.0],
    [800.0, 0.0, -800.0],
    [0.0, 0.0, 1e4],
    [-1e308, 0.0, 1e308],
    [40.0, 39.0, -40.0],
    [1e-300, 0.0, -1e-300],
]


@pytest.mark.parametrize("logits", EXTREME, ids=str)
def test_softmax_factor_at_extreme_logits(logits):
    y = torch.tensor([logits], dtype=F64)
    L = softmax_factor(y)
    assert L.shape == (1, 2, 3)
    torch.testing.assert_close(L.mT @ L, softmax_matrix(y), rtol=1e-14, atol=1e-16)


@given(st.integers(2, 7), st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
def test_softmax_factor_and_lift(C, N, log_size, seed):
    torch.manual_seed(seed)
    y = torch.randn(N, C, dtype=F64) * 10.0**log_size
    metric = resolve_output_metric("cross_entropy")
    L = metric.factor(y)
    assert L.shape == (N, C - 1, C)
    torch.testing.assert_close(L.mT @ L, softmax_matrix(y), rtol=1e-13, atol=1e-15)
    for r in (y.softmax(-1) - torch.eye(C, dtype=F64)[seed % C], torch.randn(N, C, dtype=F64)):  # a gradient, and any r
        rho, rest = metric.lift(y, L, r)
        # The split is exact by construction, whatever the logits; r⊥ is computed as the difference.
        torch.testing.assert_close(
            (L.mT @ rho[..., None])[..., 0] + rest, r, rtol=0, atol=1e-14 * max(1, rho.abs().max().item())
        )
    if log_size < 1:  # every class alive: the gradient of cross-entropy lies in the range of Lᵀ, nothing is left over
        rest = metric.lift(y, L, y.softmax(-1) - torch.eye(C, dtype=F64)[0])[1]
        assert rest.abs().max() < 1e-13


@pytest.mark.parametrize(
    "metric", ["cross_entropy", definite_metric, singular_metric, lambda y: torch.zeros(*y.shape, 3)], ids=str
)
def test_stacked_networks_have_their_own_factors(metric):
    torch.manual_seed(0)
    y, metric = torch.randn(2, 4, 3, dtype=F64), resolve_output_metric(metric)
    for k in range(2):
        torch.testing.assert_close(metric.factor(y)[k], metric.factor(y[k]), rtol=0, atol=1e-15)


def test_a_callable_sees_one_network_at_a_time():
    shapes = []

    def metric(y):
        shapes.append(tuple(y.shape))
        return torch.eye(y.shape[-1], dtype=y.dtype).expand(*y.shape, -1) / len(y)

    factor = resolve_output_metric(metric).factor(torch.zeros(5, 4, 3, dtype=F64))
    assert set(shapes) == {(4, 3)}
    torch.testing.assert_close(factor[2, 1], torch.eye(3, dtype=F64) / 2)


@given(st.integers(0, 1000), st.sampled_from([1.0, 1e3, 1e6]), st.integers(0, 17))
def test_dual_is_the_dense_solve(seed, size, decades):
    """v = (I + cMK)⁻¹r, M with eigenvalues from 1 down to 10^−decades (below rounding: singular), K of any size."""
    torch.manual_seed(seed)
    N, C, c = 3, 3, 1 / 3
    Q = torch.linalg.qr(torch.randn(N, C, C, dtype=F64))[0]
    M = (Q * torch.logspace(0, -decades, C, dtype=F64)) @ Q.mT
    J = torch.randn(N * C, 30, dtype=F64) * size**0.5
    K, r = J @ J.T, torch.randn(N, C, dtype=F64)
    inner = InnerSystem(K, C, c, resolve_output_metric(lambda y: (M + M.mT) / 2), torch.zeros(N, C, dtype=F64))
    system = torch.eye(N * C, dtype=F64) + c * torch.block_diag(*M) @ K
    expected = torch.linalg.solve(system, r.flatten())
    # M is known to one rounding of its largest entry, which K multiplies: the promise is 1e-12·max(1, ‖cK‖).
    assert (inner.dual(r).flatten() - expected).norm() <= 1e-12 * max(1, c * K.norm().item()) * r.norm()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("gap", [0, 5, 20, 80, 800])
def test_dual_with_the_softmax_metric(gap, right):
    torch.manual_seed(gap)
    y = torch.randn(3, 4, dtype=F64)
    y[:, 0] += gap
    r = y.softmax(-1) - torch.eye(4, dtype=F64)[[0, 0, 0] if right else [1, 2, 0]]
    J = torch.randn(12, 30, dtype=F64)
    for size in (1.0, 1e3, 1e6):
        K = size * J @ J.T
        v = InnerSystem(K, 4, 1 / 3, resolve_output_metric("cross_entropy"), y).dual(r).flatten()
        expected = torch.linalg.solve(
            torch.eye(12, dtype=F64) + torch.block_diag(*softmax_matrix(y)) @ K / 3, r.flatten()
        )
        assert (v - expected).norm() <= 1e-15 * max(1, K.norm().item()) * max(r.norm().item(), 1e-300)


def test_root_of_a_singular_matrix_has_its_rank():
    """A root of rounding, √1e-17 = 3e-9, would look like a direction of M."""
    torch.manual_seed(0)
    v = torch.randn(50, 4, dtype=F64)
    M = v[:, :, None] * v[:, None, :]
    assert (torch.linalg.matrix_rank(psd_factor(M, v), tol=1e-12) == 1).all()
    torch.testing.assert_close(psd_factor(M, v).square().sum((1, 2)), v.square().sum(1))


def test_an_indefinite_metric_is_refused_with_its_eigenvalue():
    y = torch.zeros(3, 2, dtype=F64)
    M = torch.eye(2, dtype=F64).repeat(3, 1, 1)
    M[1] = torch.tensor([[1.0, 0.0], [0.0, -1e-3]])
    with pytest.raises(
        NumericalError, match=r"sample 1 is not positive semidefinite: smallest eigenvalue \(-0\.001\)"
    ) as error:
        psd_factor(M, y)
    assert error.value.value == pytest.approx(-1e-3)
    M[1, 1, 1] = -1e-17  # rounding
    assert torch.equal(psd_factor(M, y)[1], torch.diag(torch.tensor([1.0, 0.0], dtype=F64)))


BAD = {
    "nearest name": (
        "cross_entropi",
        ValueError,
        r"unknown output metric 'cross_entropi'.*did you mean 'cross_entropy'\?",
    ),
    "no name at all": (3, TypeError, "must be a name or a callable"),
    "wrong shape": (lambda y: torch.eye(2), ValueError, r"shape \(2, 2\), expected \(4, 2, 2\) = \[N, C, C\]"),
    "no tensor": (lambda y: y.tolist(), TypeError, r"must return a tensor \(4, 2, 2\) = \[N, C, C\], got list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metrics(case):
    metric, error, message = BAD[case]
    with pytest.raises(error, match=message):
        resolve_output_metric(metric).factor(torch.zeros(4, 2))


def test_cross_entropy_needs_two_outputs():
    with pytest.raises(ValueError, match="needs at least 2 outputs"):
        softmax_factor(torch.zeros(4, 1))


def test_a_metric_that_is_not_finite_is_refused_by_sample():
    matrix = torch.eye(2).repeat(3, 1, 1)
    matrix[1, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="the output metric of sample 1 holds NaN or inf"):
        psd_factor(matrix, torch.zeros(3, 2))
