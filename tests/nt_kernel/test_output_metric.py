"""Output metrics by name and by factor: what holds for every one of them, and the step that rests on their split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nt_kernel import generalized_ntk
from nt_kernel.metric.inner import InnerSystem
from nt_kernel.metric.output_metric import (
    NAMED,
    from_factor,
    huber,
    resolve_output_metric,
    sampled_fisher,
    scaled,
    softmax_factor,
)
from tests.reference import Dense, definite_metric, identity_matrix, singular_metric, softmax_matrix

F64 = torch.float64


def logistic_matrix(y):
    return torch.diag_embed(torch.sigmoid(y) * torch.sigmoid(-y))


def two_rows(y):
    """A user's factor of two rows, singular for three outputs and more."""
    return torch.stack([y, 1 + y.square()], -2)


MATRIX = {
    "identity": identity_matrix,
    "squared": identity_matrix,
    "cross_entropy": softmax_matrix,
    "logistic": logistic_matrix,
    "fisher_gaussian": identity_matrix,
    "fisher_categorical": softmax_matrix,
    "fisher_bernoulli": logistic_matrix,
}
METRICS = {
    **{name: lambda y, name=name: name for name in MATRIX},
    "huber": lambda y: huber(torch.linspace(-1, 1, y.shape[-1], dtype=F64).repeat(y.shape[-2], 1), 0.7),
    "sampled categorical": lambda y: sampled_fisher("categorical", 2),
    "sampled bernoulli": lambda y: sampled_fisher("bernoulli", 3),
    "sampled gaussian": lambda y: sampled_fisher("gaussian", 7),
    "factor": lambda y: from_factor(two_rows),
    "matrix": lambda y: definite_metric,
    "singular matrix": lambda y: singular_metric,
    "zero matrix": lambda y: lambda y: torch.zeros(*y.shape, y.shape[-1]),
    "scaled squared": lambda y: scaled("squared", 2 / y.shape[-1]),
    "scaled softmax": lambda y: scaled("cross_entropy", 1e-3),
    "scaled matrix": lambda y: scaled(singular_metric, 5.0),
}
SOFTMAX = {"cross_entropy", "fisher_categorical", "sampled categorical", "scaled softmax"}
CLOSED = [*MATRIX, "huber", "scaled squared", "scaled softmax", "sampled categorical", "sampled bernoulli"]


def rows(factor, y):
    return torch.eye(y.shape[-1], dtype=y.dtype).expand(*y.shape, -1) if factor is None else factor


@given(
    st.sampled_from(sorted(METRICS)),
    st.integers(1, 12),
    st.sampled_from([(), (2,), (2, 3)]),
    st.integers(-2, 3),
    st.sampled_from([torch.float32, F64]),
    st.integers(0, 1000),
)
def test_every_split_is_exact(name, C, batch, log_size, dtype, seed):
    """r = Lᵀρ + r⊥ for any r at any logits, with r⊥ no larger than r and Lᵀρ: nothing is added to be taken away."""
    if name in SOFTMAX and C == 1:
        C = 2
    torch.manual_seed(seed)
    y = (torch.randn(*batch, 4, C, dtype=F64) * 10.0**log_size).to(dtype)
    metric = resolve_output_metric(METRICS[name](y))
    L = metric.factor(y)
    label = torch.eye(C, dtype=dtype)[torch.randint(C, y.shape[:-1])]
    for r in (torch.randn_like(y), y.softmax(-1) - label, y.sigmoid() - label, torch.zeros_like(y)):
        rho, rest = metric.lift(y, L, r)
        assert torch.isfinite(rho).all()
        pulled = (rows(L, y).mT @ rho[..., None])[..., 0]
        size = max(r.abs().max().item(), torch.finfo(dtype).tiny)
        assert (pulled + rest - r).abs().max() <= 64 * torch.finfo(dtype).eps * size
        assert rest.norm(dim=-1).le((C**0.5 + 1e-3) * r.norm(dim=-1) + 1e-30).all()


@given(st.sampled_from(sorted(MATRIX)), st.integers(1, 12), st.floats(-1e3, 1e3), st.integers(0, 1000))
def test_named_factors_at_extreme_logits(name, C, shift, seed):
    torch.manual_seed(seed)
    C = max(C, 2) if name in SOFTMAX else C
    y = torch.randn(5, C, dtype=F64) * torch.logspace(-2, 3, 5, dtype=F64)[:, None]
    y[:, seed % C] += shift
    L = rows(resolve_output_metric(name).factor(y), y)
    torch.testing.assert_close(L.mT @ L, MATRIX[name](y).to(F64), rtol=1e-13, atol=1e-16)


def test_every_name_is_tested():
    assert set(NAMED) == set(MATRIX)


@pytest.mark.parametrize("name", METRICS)
def test_stacked_networks_have_their_own_factors(name):
    torch.manual_seed(0)
    y, r = torch.randn(2, 3, 4, 3, dtype=F64), torch.randn(2, 3, 4, 3, dtype=F64)
    metric = resolve_output_metric(METRICS[name](y))
    L = metric.factor(y)
    split = metric.lift(y, L, r)
    for k in [(0, 0), (1, 2)]:
        one = metric.factor(y[k])
        assert (L is None) == (one is None)
        if L is not None:
            torch.testing.assert_close(L[k], one, rtol=0, atol=1e-15)
        for stacked, single in zip(split, metric.lift(y[k], one, r[k]), strict=True):
            torch.testing.assert_close(stacked[k], single, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_run_under_vmap(name):
    torch.manual_seed(0)
    y, r = torch.randn(5, 4, 3, dtype=F64), torch.randn(5, 4, 3, dtype=F64)
    metric = resolve_output_metric(METRICS[name](y))
    L = metric.factor(y)
    if L is None:
        assert metric.factor(y[0]) is None
        return
    torch.testing.assert_close(torch.func.vmap(metric.factor)(y), L, rtol=0, atol=1e-15)
    for mapped, stacked in zip(torch.func.vmap(metric.lift)(y, L, r), metric.lift(y, L, r), strict=True):
        torch.testing.assert_close(mapped, stacked, rtol=1e-12, atol=1e-13)


def test_what_moves_to_other_points_is_pointwise():
    y = torch.zeros(4, 3, dtype=F64)
    moving = {name for name, metric in METRICS.items() if resolve_output_metric(metric(y)).pointwise}
    assert set(METRICS) - moving == {"huber", "sampled categorical", "sampled bernoulli", "sampled gaussian"}
    assert not scaled(METRICS["huber"](y), 2.0).pointwise


def test_scaled_has_the_constant_of_mean_squared_error():
    y, a = torch.randn(5, 4, dtype=F64), torch.randn(4, dtype=F64)
    L = scaled("squared", 2 / 4).factor(y)
    hessian = torch.func.hessian(lambda y: torch.nn.functional.mse_loss(y, a))
    torch.testing.assert_close(L.mT @ L, torch.stack([hessian(one) for one in y]))
    assert scaled("squared", 0.5).name == "0.5·squared"


@pytest.mark.parametrize("metric", ["squared", "logistic", definite_metric])
def test_scaled_lifts_all_that_the_metric_lifts(metric):
    y, r = torch.randn(5, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    metric = scaled(metric, 1e-4)
    assert metric.lift(y, metric.factor(y), r)[1].abs().max() < 1e-13


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("blocks", ["layer", "network"])
def test_kernel_of_every_metric_is_the_dense_one(name, blocks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(F64)
    x = torch.randn(6, 3, dtype=F64)
    metric = METRICS[name](model(x))
    L = rows(resolve_output_metric(metric).factor(model(x).detach()), model(x))
    options = {"mass": 1e-2, "blocks": blocks}
    found = generalized_ntk(model, x, output_metric=metric, **options).matrix
    expected = Dense(model, x, output_metric=lambda y: L.mT @ L, **options).H().detach()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@given(st.integers(0, 1000), st.sampled_from([1.0, 1e3, 1e6]), st.integers(0, 17))
def test_dual_is_the_dense_solve(seed, size, decades):
    """v = (I + cMK)⁻¹r, M with eigenvalues from 1 down to 10^−decades (below rounding: singular), K of any size."""
    torch.manual_seed(seed)
    N, C = 3, 3
    Q = torch.linalg.qr(torch.randn(N, C, C, dtype=F64))[0]
    M = (Q * torch.logspace(0, -decades, C, dtype=F64)) @ Q.mT
    M = (M + M.mT) / 2
    _check_dual(lambda y: M, M, torch.zeros(N, C, dtype=F64), torch.randn(N, C, dtype=F64), size, 1e-12)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("matrix", "singular matrix")])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_dual_of_every_metric_is_the_dense_solve(name, size):
    torch.manual_seed(0)
    y, r = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    L = rows(resolve_output_metric(METRICS[name](y)).factor(y), y)
    _check_dual(METRICS[name](y), L.mT @ L, y, r, size, 1e-12)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("dominates", [0, 1])
@pytest.mark.parametrize("name", ["cross_entropy", "logistic"])
@pytest.mark.parametrize("gap", [0, 5, 20, 80, 700, 800, 1480])
def test_dual_at_saturated_outputs(gap, name, dominates, right):
    torch.manual_seed(gap)
    y = torch.randn(3, 4, dtype=F64)
    y[:, dominates] += gap
    s = y.softmax(-1) if name == "cross_entropy" else y.sigmoid()
    r = s - torch.eye(4, dtype=F64)[[dominates] * 3 if right else [1 - dominates, 2, 3]]
    for size in (1.0, 1e3, 1e6):
        _check_dual(name, MATRIX[name](y), y, r, size, 1e-15)


def _check_dual(metric, M, y, r, size, tolerance):
    # M is known to one rounding of its largest entry, which K multiplies: the promise is tolerance·max(1, ‖K‖).
    (N, C), c = y.shape, 1 / len(y)
    J = torch.randn(N * C, 30, dtype=F64) * size**0.5
    K = J @ J.T
    v = InnerSystem(K, C, c, resolve_output_metric(metric), y).dual(r).flatten()
    expected = torch.linalg.solve(torch.eye(N * C, dtype=F64) + c * torch.block_diag(*M) @ K, r.flatten())
    assert (v - expected).norm() <= tolerance * max(1, c * K.norm().item()) * max(r.norm().item(), 1e-300)


def test_the_softmax_gradient_is_lifted_whole_whichever_class_dominates():
    """r⊥ = 0 for a gradient of cross-entropy: reflected at a vanishing class, rounding would leave r⊥ of size 1."""
    for dominates in range(3):
        for gap in (0.0, 30.0, 70.0, 300.0, 700.0):
            y = torch.zeros(1, 3, dtype=F64)
            y[0, dominates] = gap
            for label in range(3):
                r = y.softmax(-1) - torch.eye(3, dtype=F64)[label]
                rest = resolve_output_metric("cross_entropy").lift(y, softmax_factor(y), r)[1]
                assert rest.abs().max() < 1e-15


BAD = {
    "nearest name": (
        "cross_entropi",
        ValueError,
        r"unknown output metric 'cross_entropi'; known are 'identity', .*did you mean 'cross_entropy'\?",
    ),
    "which Fisher": (
        "fisher",
        ValueError,
        "unknown output metric 'fisher'.*'fisher_categorical', 'fisher_bernoulli' or",
    ),
    "targets missing": ("huber", ValueError, r"unknown output metric 'huber'.*needs the targets.*huber\(targets"),
    "sampled by name": ("sampled_fisher", ValueError, r"write output_metric=sampled_fisher\('categorical'"),
    "no name at all": (3, TypeError, r"must be a name or a callable.*\[N, C, C\].*\[N, q, C\].*got 3"),
    "not called": (lambda y: huber(y), TypeError, r"got OutputMetric; call it first, as in huber\(targets\)"),
    "one class": ("fisher_categorical", ValueError, "needs at least 2 outputs.*write 'logistic'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metrics(case):
    metric, error, message = BAD[case]
    with pytest.raises(error, match=message):
        resolve_output_metric(metric).factor(torch.zeros(4, 1))


@pytest.mark.parametrize("constant", [0.0, -1.0, float("inf"), float("nan"), True, "2"])
def test_bad_constants(constant):
    with pytest.raises(ValueError, match="constant above 0 and finite, got"):
        scaled("squared", constant)
