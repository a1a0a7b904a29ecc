"""Every loss against torch's own, its derivatives against autograd, its secant against what a secant must do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nt_kernel import NumericalError
from stability.losses import NAMED, huber_loss, resolve_loss, softmax_secant, squared_loss
from stability.own_loss import legendre, own_loss
from tests.stability.dense import F64

F = nn.functional


def quartic(y, a):
    return ((y - a) ** 4).sum(-1) + 0.1 * (y - a).square().sum(-1)


TORCH = {
    "squared": lambda y, a: F.mse_loss(y, a, reduction="none").sum(-1) / 2,
    "mse": lambda y, a: F.mse_loss(y, a, reduction="none").mean(-1),
    "cross_entropy": lambda y, a: F.cross_entropy(y, a, reduction="none"),
    "logistic": lambda y, a: F.binary_cross_entropy_with_logits(y, a, reduction="none").sum(-1),
    "huber": lambda y, a: F.huber_loss(y, a, reduction="none", delta=1.0).sum(-1),
    "sigma": lambda y, a: 0.35 * (y - a).square().sum(-1),
    "narrow": lambda y, a: F.huber_loss(y, a, reduction="none", delta=0.3).sum(-1),
    "own": quartic,
}
LOSSES = {name: NAMED[name] for name in NAMED} | {
    "sigma": squared_loss(0.7),
    "narrow": huber_loss(0.3),
    "own": own_loss(quartic),
}


def drawn(seed, N=5, p=3, size=2.0):
    draw = torch.Generator().manual_seed(seed)
    y, y2 = (size * torch.randn(N, p, generator=draw, dtype=F64) for _ in range(2))
    a = torch.rand(N, p, generator=draw, dtype=F64)
    return y, y2, a / a.sum(-1, keepdim=True)


def test_every_named_loss_is_held_against_torch():
    assert set(TORCH) == set(LOSSES)
    assert set(NAMED) < set(TORCH)


@pytest.mark.parametrize("name", LOSSES)
def test_value_gradient_and_hessian_are_those_of_torch(name):
    loss, reference = LOSSES[name], TORCH[name]
    y, _, a = drawn(0)
    value, gradient = loss.value(y, a), loss.gradient(y, a)
    torch.testing.assert_close(value, reference(y, a))
    torch.testing.assert_close(gradient, torch.func.grad(lambda y: reference(y, a).sum())(y))
    one = lambda y, a: reference(y[None], a[None])[0]  # noqa: E731
    hessian = torch.func.vmap(torch.func.hessian(one))(y, a)
    torch.testing.assert_close(loss.hessian(y, a), hessian)
    Lambda = loss.factor(y, a)
    torch.testing.assert_close(Lambda.mT @ Lambda, hessian)
    v = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    torch.testing.assert_close(loss.curve(y, a, v), (hessian @ v[..., None])[..., 0])
    assert torch.linalg.eigvalsh(hessian).max() <= loss.curvature(3) * (1 + 1e-12)
    stacked = torch.stack([y, y + 1]), torch.stack([a, a])
    torch.testing.assert_close(loss.gradient(*stacked)[0], gradient)
    torch.testing.assert_close(loss.hessian(*stacked)[0], hessian)


@given(
    name=st.sampled_from([n for n in LOSSES if n != "own"]),
    seed=st.integers(0, 10_000),
    p=st.integers(2, 5),
    size=st.sampled_from([1e-9, 0.1, 2.0, 30.0]),
    step=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 50.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_secant_maps_the_divergence_to_that_of_the_gradients(name, seed, p, size, step):
    loss = LOSSES[name]
    y, y2, a = drawn(seed, 4, p, size)
    y2 = y + step * y2
    S = loss.secant(y, y2, a)
    r, r2 = loss.gradient(y, a), loss.gradient(y2, a)
    change = (S @ (y2 - y)[..., None])[..., 0]
    torch.testing.assert_close(change, r2 - r, rtol=1e-9, atol=1e-14 * (1 + size * (1 + step)))
    torch.testing.assert_close(S, S.mT, rtol=0, atol=0)
    eigenvalues = torch.linalg.eigvalsh(S)
    assert eigenvalues.min() >= -1e-14
    assert eigenvalues.max() <= loss.curvature(p) * (1 + 1e-12)
    if loss.shift_invariant:
        assert S.sum(-1).abs().max() <= 1e-14
    if not step:
        torch.testing.assert_close(S, loss.hessian(y, a).contiguous())


def test_the_secant_of_an_own_loss_is_its_mean_hessian():
    loss = LOSSES["own"]
    y, y2, a = drawn(3)
    S = loss.secant(y, y2, a)
    torch.testing.assert_close((S @ (y2 - y)[..., None])[..., 0], loss.gradient(y2, a) - loss.gradient(y, a))
    x, w = legendre(24)
    for name in ("logistic", "mse"):  # where the closed form is the mean Hessian too
        mean = sum(wi * LOSSES[name].hessian(y + xi * (y2 - y), a) for xi, wi in zip(x, w, strict=True))
        torch.testing.assert_close(mean, LOSSES[name].secant(y, y2, a))
    softmax = own_loss(TORCH["cross_entropy"])
    torch.testing.assert_close(softmax.secant(y, y2, a).sum(-1), torch.zeros(5, 3, dtype=F64), rtol=0, atol=1e-12)


def test_softmax_of_two_outputs_is_the_logistic_secant():
    y, y2, _ = drawn(1, p=2)
    z, z2 = y[:, :1] - y[:, 1:], y2[:, :1] - y2[:, 1:]
    scalar = NAMED["logistic"].secant(z, z2, z)
    torch.testing.assert_close(softmax_secant(y, y2), scalar * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64))


def test_far_out_nothing_overflows():
    y = torch.tensor([[800.0, -800.0, 0.0]], dtype=F64)
    for name in ("cross_entropy", "logistic"):
        loss = NAMED[name]
        S = loss.secant(y, -y, torch.tensor([[1.0, 0.0, 0.0]], dtype=F64))
        assert S.isfinite().all()
        torch.testing.assert_close(
            (S @ (-2 * y)[..., None])[..., 0], loss.gradient(-y, y * 0) - loss.gradient(y, y * 0), rtol=1e-9, atol=1e-12
        )


def test_sigma_and_the_output_metrics_that_are_the_curvature():
    y, _, a = drawn(2, p=4)
    assert [NAMED[n].sigma(4) for n in NAMED] == [1.0, 0.5, None, None, None]
    assert squared_loss(0.7).sigma(4) == 0.7
    for name, loss in LOSSES.items():
        metric = loss.metric_for(a)
        L = metric.factor(y)
        M = torch.eye(4, dtype=F64).expand(5, 4, 4) if L is None else L.mT @ L
        torch.testing.assert_close(M, loss.hessian(y, a), msg=name)
        assert metric.pointwise == (name not in ("huber", "narrow", "own"))


def test_class_indices_become_one_hot_rows():
    loss = NAMED["cross_entropy"]
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss.encoded(labels, 3, F64), torch.eye(3, dtype=F64)[labels])
    y = drawn(0, 3)[0]
    torch.testing.assert_close(
        loss.value(y, loss.encoded(labels, 3, F64)), F.cross_entropy(y, labels, reduction="none")
    )


def test_a_loss_that_is_not_convex_is_refused_with_its_eigenvalue():
    double_well = own_loss(lambda y, a: ((y - a).square() - 1).square().sum(-1))
    with pytest.raises(NumericalError, match=r"of sample 1 is not positive semidefinite: smallest eigenvalue \(-4\)"):
        double_well.factor(torch.tensor([[3.0], [0.0]], dtype=F64), torch.zeros(2, 1, dtype=F64))


ONES = torch.ones(2, 3, dtype=F64)
BAD = [
    (lambda: resolve_loss("squard"), ValueError, r"unknown loss 'squard'; .*did you mean 'squared'"),
    (lambda: resolve_loss(3), TypeError, r"loss must be a name or a function .*got int"),
    (lambda: own_loss(lambda y, a: y - a).gradient(ONES, ONES), ValueError, r"one number per sample, \[1\] .*got \(1, 3\)"),
    (lambda: own_loss(lambda y, a: (y - a).sum()).value(ONES, ONES), ValueError, r"reduction='none'.* got \(\)"),
    (lambda: huber_loss(0.0), ValueError, r"delta must be a positive finite number, got 0.0"),
    (lambda: squared_loss(math.inf), ValueError, r"sigma must be a positive finite number, got inf"),
    (lambda: NAMED["cross_entropy"].encoded(ONES, 3), ValueError, r"must be distributions.*off by 2"),
    (lambda: NAMED["cross_entropy"].encoded(torch.tensor([3]), 3), ValueError, r"class indices 0..2, got 3"),
    (lambda: NAMED["logistic"].encoded(-ONES, 3), ValueError, r"in \[0, 1\], got -1; write labels ±1 as \(a \+ 1\)/2"),
    (lambda: NAMED["squared"].encoded(torch.tensor([1]), 3), TypeError, r"class indices go with loss='cross_entropy'"),
    (lambda: NAMED["squared"].encoded([1.0], 3), TypeError, r"targets must be a tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_bad_input_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
