"""Closed-form Gauss–Newton factors against torch's own Hessians of torch's own losses, at any logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import hessian, vmap
from torch.nn import functional as F

from nt_kernel.metric.gauss_newton import huber, lift_logistic, logistic_factor, softmax_factor
from nt_kernel.metric.output_metric import resolve_output_metric
from tests.reference import softmax_matrix

F64 = torch.float64
EXTREME = [
    [0.0, 0.0, 0.0],
    [800.0, 0.0, -800.0],
    [0.0, 0.0, 1e4],
    [-1e308, 0.0, 1e308],
    [40.0, 39.0, -40.0],
    [1e-300, 0.0, -1e-300],
    [-40.0, 300.0, 300.0],
]


@pytest.mark.parametrize("logits", EXTREME)
def test_factors_at_extreme_logits(logits):
    y = torch.tensor([logits], dtype=F64)
    L = softmax_factor(y)
    assert L.shape == (1, 2, 3)
    torch.testing.assert_close(L.mT @ L, softmax_matrix(y), rtol=1e-14, atol=1e-16)
    L = logistic_factor(y)
    assert L.shape == (1, 3, 3)
    torch.testing.assert_close(
        L.mT @ L, torch.diag_embed(y.sigmoid() * (-y).sigmoid()), rtol=1e-14 * max(1, abs(logits[0])), atol=1e-300
    )


@given(st.integers(2, 12), st.integers(1, 4), st.floats(0, 1e3), st.integers(0, 1000))
def test_softmax_is_the_hessian_of_cross_entropy(C, N, size, seed):
    torch.manual_seed(seed)
    y, a = (torch.rand(N, C, dtype=F64) * 2 - 1) * size, torch.randint(C, (N,))
    L = softmax_factor(y)
    assert L.shape == (N, C - 1, C)
    torch.testing.assert_close(L.mT @ L, vmap(hessian(F.cross_entropy))(y, a), rtol=1e-12, atol=1e-14)


@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 1e3), st.integers(0, 1000))
def test_logistic_is_the_hessian_of_binary_cross_entropy(C, N, size, seed):
    torch.manual_seed(seed)
    y, a = (torch.rand(N, C, dtype=F64) * 2 - 1) * size, torch.rand(N, C, dtype=F64)
    L = logistic_factor(y)
    assert L.shape == (N, C, C)
    loss = lambda y, a: F.binary_cross_entropy_with_logits(y, a, reduction="sum")  # noqa: E731
    torch.testing.assert_close(L.mT @ L, vmap(hessian(loss))(y, a), rtol=1e-12, atol=1e-14)


@given(st.integers(1, 12), st.integers(1, 4), st.floats(1e-3, 1e3), st.floats(1e-2, 10), st.integers(0, 1000))
def test_huber_is_the_hessian_of_torchs_loss(C, N, size, delta, seed):
    torch.manual_seed(seed)
    y, a = (torch.rand(N, C, dtype=F64) * 2 - 1) * size, torch.randn(N, C, dtype=F64)
    y[0, 0] = a[0, 0]  # no residual at all
    L = huber(a, delta).factor(y)
    assert L.shape == (N, C, C)
    loss = lambda y, a: F.huber_loss(y, a, reduction="sum", delta=delta)  # noqa: E731
    assert torch.equal(L.mT @ L, vmap(hessian(loss))(y, a))


def test_huber_at_delta_itself_is_as_torch_has_it():
    y = torch.tensor([[0.5, -0.5, 0.4999, 0.5001]], dtype=F64)
    L = huber(torch.zeros(1, 4, dtype=F64), 0.5).factor(y)[0]
    loss = lambda y: F.huber_loss(y, torch.zeros(4, dtype=F64), reduction="sum", delta=0.5)  # noqa: E731
    assert torch.equal(L, torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64)))
    assert torch.equal(L, hessian(loss)(y[0]))


def test_huber_of_all_inside_is_squared_and_of_none_is_zero():
    y, a = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    assert torch.equal(huber(a, float("inf")).factor(y), torch.eye(3, dtype=F64).expand(4, 3, 3))
    assert not huber(a + 100, 1.0).factor(y).any()


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3), (5, 4, 3), (2, 1, 4, 3), (2, 5, 4, 3)])
def test_huber_targets_broadcast_over_stacked_networks(shape):
    torch.manual_seed(0)
    y, a = torch.randn(2, 5, 4, 3, dtype=F64), torch.randn(shape, dtype=F64)
    expected = torch.diag_embed(((y - a).abs() <= 0.8).to(F64))
    assert torch.equal(huber(a, 0.8).factor(y), expected)


def test_huber_keeps_its_own_targets():
    a = torch.zeros(4)
    metric, y = huber(a), torch.zeros(4, 1, dtype=F64)
    a += 100
    assert torch.equal(metric.factor(y), torch.ones(4, 1, 1, dtype=F64))  # [N] is [N, 1]; the dtype is that of y


def test_what_is_not_a_number_is_no_outlier():
    y = torch.tensor([[float("nan"), 0.0]])
    assert huber(torch.zeros(1, 2)).factor(y).isnan().any()
    assert logistic_factor(y).isnan().any()
    assert softmax_factor(y).isnan().any()


@given(st.floats(-2e3, 2e3), st.sampled_from([torch.float32, F64]))
def test_the_logistic_lift_is_exact_where_the_matrix_underflows(logit, dtype):
    """s(1 − s) is zero from |y| = 745 in float64, the factor is not: there ρ still carries the gradient."""
    y = torch.tensor([[logit, 0.0]], dtype=dtype)
    for r in (y.sigmoid(), y.sigmoid() - 1):
        rho, rest = lift_logistic(y, logistic_factor(y), r)
        assert torch.isfinite(rho).all()
        pulled = (logistic_factor(y).mT @ rho[..., None])[..., 0]
        torch.testing.assert_close(pulled + rest, r, rtol=4 * torch.finfo(dtype).eps, atol=0)
        if abs(logit) < (700 if dtype == F64 else 85):
            assert rest.abs().max() <= torch.finfo(dtype).eps


REFUSED = {
    "no tensor": (lambda: huber([[0.0]]), TypeError, r"real tensor \[N, C\], got list"),
    "complex": (lambda: huber(torch.zeros(1, 1, dtype=torch.complex64)), TypeError, "got a tensor of torch.complex64"),
    "a number": (lambda: huber(torch.tensor(1.0)), ValueError, r"needs targets \[N, C\], got a single number"),
    "not finite": (lambda: huber(torch.tensor([[float("nan")]])), ValueError, "targets hold NaN or inf"),
    "delta 0": (lambda: huber(torch.zeros(1, 1), 0), ValueError, "needs a number delta > 0, got 0"),
    "delta NaN": (lambda: huber(torch.zeros(1, 1), float("nan")), ValueError, "delta > 0, got nan"),
    "delta text": (lambda: huber(torch.zeros(1, 1), "1"), ValueError, "delta > 0, got '1'"),
    "one class": (lambda: softmax_factor(torch.zeros(4, 1)), ValueError, "needs at least 2 outputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("targets", "y"),
    [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((2, 4, 3), (4, 3)), ((2, 4, 3), (3, 4, 3)), ((4,), (4, 2)), ((1, 3), (4, 3))],
)
def test_targets_of_other_points_are_refused(targets, y):
    message = (
        rf"targets have shape \({', '.join(map(str, targets))},?\), the outputs \({', '.join(map(str, y))}\); expected"
    )
    with pytest.raises(ValueError, match=message):
        resolve_output_metric(huber(torch.zeros(targets))).factor(torch.zeros(y))
