"""Momentum: the recursion against torch.optim.SGD, closed-form rates, metrics, and a recorded run."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nt_kernel import generalized_ntk
from stability.contraction.metric import contraction_metric
from stability.contraction.momentum import momentum_matrices, momentum_metric, momentum_rate, momentum_step_limit
from stability.contraction.result import metric_enclosure

F64 = torch.float64
STYLES = st.sampled_from([(0.0, 0.6, False), (0.9, 0.0, False), (0.5, 0.3, False), (0.8, 1.0, False), (0.7, 0.0, True)])


def linear_problem(seed, n=3, p=2, d=5):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    model = nn.Linear(d, p).to(F64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(randn(*parameter.shape))
    return model, randn(n, d), randn(n, p)


def train(model, x, a, steps, weights=None, **options):
    """Outputs along torch.optim.SGD on (1/2n) Σ ‖y − a‖² (times weights[t] at step t), [steps + 1, n·p]."""
    model = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), **options)
    outputs = [model(x).detach().flatten()]
    for t in range(steps):
        opt.zero_grad()
        factor = 1.0 if weights is None else weights[t]
        (factor * 0.5 * (model(x) - a).square().sum() / len(x)).backward()
        opt.step()
        outputs.append(model(x).detach().flatten())
    return torch.stack(outputs)


@given(seed=st.integers(0, 10_000), style=STYLES, lr=st.sampled_from([0.01, 0.2]))
@settings(max_examples=30, deadline=None)
def test_the_recursion_is_what_torch_does_on_quadratics(seed, style, lr):
    """H_t = weight_t·H: kernels that change from step to step, so that H_t and H_{t−1} cannot be mixed up."""
    b, damp, nesterov = style
    model, x, a = linear_problem(seed)
    steps, other = 7, linear_problem(seed + 1)[0]
    weights = [1.0, 0.3, 2.0, 0.7, 1.5, 0.1, 1.0]
    options = {"lr": lr, "momentum": b, "dampening": damp, "nesterov": nesterov}
    e = train(model, x, a, steps, weights, **options) - train(other, x, a, steps, weights, **options)
    H = generalized_ntk(model, x, scale="none").matrix
    A = momentum_matrices([w * H for w in weights], lr, b, damp, nesterov)
    state = torch.cat([e[0], torch.zeros_like(e[0])])
    for t in range(steps):
        state = A[t] @ state
        expected = torch.cat([e[t + 1], e[t + 1] - e[t]])
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10 * float(e.abs().max()))
    # cut out of a longer run
    if nesterov:
        later = momentum_matrices([w * H for w in weights[2:]], lr, b, damp, True, first_step=False)
        torch.testing.assert_close(later, A[3:])
    else:
        later = momentum_matrices([w * H for w in weights[2:]], lr, b, damp, first_step=False)
        torch.testing.assert_close(later, A[2:])


@given(seed=st.integers(0, 10_000), style=STYLES, lr=st.floats(0.001, 2.0))
@settings(max_examples=60, deadline=None)
def test_closed_form_rates_are_spectral_radii(seed, style, lr):
    b, damp, nesterov = style
    values = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=F64) * 3
    rates = momentum_rate(values, lr, b, damp, nesterov)
    for value, rate in zip(values, rates, strict=True):
        A = momentum_matrices([value.reshape(1, 1)] * 2, lr, b, damp, nesterov, first_step=False)[-1]
        assert torch.linalg.eigvals(A).abs().max().item() == pytest.approx(rate.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("b", "damp", "nesterov"), [(0.0, 0.6, False), (0.9, 0.0, False), (0.5, 0.3, False), (0.8, 0.0, True)]
)
def test_step_limits_separate_stable_from_unstable(b, damp, nesterov):
    limit = momentum_step_limit(b, damp, nesterov)
    inside, outside = momentum_rate(torch.tensor([1 - 1e-6, 1 + 1e-6], dtype=F64) * limit, 1.0, b, damp, nesterov)
    assert inside < 1 < outside
    if b == 0:  # torch.optim.SGD has no buffer then, so nothing to dampen
        assert limit == 2


def test_underdamped_heavy_ball_decays_at_the_root_of_its_momentum():
    H, b = torch.diag(torch.tensor([0.05, 0.3, 1.0], dtype=F64)), 0.81
    (A,) = momentum_matrices([H], 1.0, b)
    assert torch.linalg.matrix_norm(A, 2) > 1.2  # no contraction in the Euclidean norm
    assert not contraction_metric([A], kind="discrete", condition=1).feasible
    found = contraction_metric([A], kind="discrete")
    assert 0.9 <= found.rate <= 0.9 + 1e-3
    assert torch.linalg.eigvalsh(found.rate**2 * found.metric - A.mT @ found.metric @ A)[0] >= -1e-12
    gain = contraction_metric([A], kind="discrete", objective="gain")
    assert gain.gain <= 1.01 * found.gain


def test_nesterov_on_a_quadratic_reaches_its_closed_form_rate():
    H, b, lr = torch.diag(torch.tensor([0.2, 0.5, 1.0], dtype=F64)), 0.8, 0.9
    A = momentum_matrices([H, H], lr, b, nesterov=True, first_step=False)[0]
    closed = momentum_rate(H.diagonal(), lr, b, nesterov=True).max().item()
    assert torch.linalg.matrix_norm(A, 2) > 1
    found = contraction_metric([A], kind="discrete")
    assert closed <= found.rate <= closed + 1e-3


def test_one_metric_for_any_number_of_outputs_and_turning_kernels():
    draw = torch.Generator().manual_seed(0)
    kernels = []
    for _ in range(5):  # nothing commutes
        Q = torch.linalg.qr(torch.randn(30, 30, generator=draw, dtype=F64)).Q
        kernels.append(Q @ torch.diag(torch.linspace(0.1, 1.0, 30, dtype=F64)) @ Q.mT)
    found = momentum_metric(kernels, 0.3, 0.5)
    assert found.feasible
    assert found.metric.shape == (60, 60)
    assert found.projected is None
    for A in momentum_matrices(kernels, 0.3, 0.5):
        assert torch.linalg.eigvalsh(found.rate**2 * found.metric - A.mT @ found.metric @ A)[0] >= -1e-12
    scalar = [torch.full((1, 1), v, dtype=F64) for v in (0.1, 1.0)]
    ends = contraction_metric(momentum_matrices(scalar, 0.3, 0.5), kind="discrete")
    assert found.rate == pytest.approx(ends.rate, abs=1e-6)  # the two ends decide, up to the solver's tolerance
    wide = momentum_metric([torch.diag(torch.tensor([1e-3, 3.0], dtype=F64))], 1.0, 0.9)
    assert not wide.feasible
    assert "no metric Θ₂ ⊗ I for λ in [0.001, 3]" in wide.reason


@pytest.mark.parametrize(("lr", "b"), [(0.9, 0.5), (0.5, 0.8)])
def test_nesterov_splits_by_pairs_of_successive_kernels(lr, b):
    """One output, H from step to step 0.6, 1, 0.6, 1: Θ₂ of the pairs is the metric of the whole."""
    kernels = [torch.full((1, 1), v, dtype=F64) for v in (0.6, 1.0, 0.6, 1.0)]
    whole = contraction_metric(momentum_matrices(kernels, lr, b, nesterov=True), kind="discrete")
    split = momentum_metric(kernels, lr, b, nesterov=True)
    assert split.feasible
    assert split.rate == pytest.approx(whole.rate, abs=1e-4)


def test_dampening_of_the_first_step_counts():
    kernels = [torch.eye(2, dtype=F64) * v for v in (1.0, 1.0, 1.0)]
    found = momentum_metric(kernels, 0.4, 0.3, dampening=0.5)
    assert found.feasible
    for A in momentum_matrices(kernels, 0.4, 0.3, 0.5):
        assert torch.linalg.eigvalsh(found.rate**2 * found.metric - A.mT @ found.metric @ A)[0] >= -1e-12


def test_the_enclosure_in_a_metric_where_that_of_the_euclidean_norm_explodes():
    model, x, a = linear_problem(3)
    H = generalized_ntk(model, x, scale="none").matrix
    lr, b, steps = 0.5 / torch.linalg.eigvalsh(H)[-1].item(), 0.6, 60
    options = {"lr": lr, "momentum": b}
    twin = a.clone()
    twin[0] += 1.0
    e = train(model, x, twin, steps, **options) - train(model, x, a, steps, **options)
    states = torch.cat([e, torch.cat([torch.zeros_like(e[:1]), e.diff(dim=0)])], 1)
    A = momentum_matrices([H] * steps, lr, b)
    found = contraction_metric(A[:1], kind="discrete", objective="gain")
    assert found.feasible
    E = metric_enclosure(states, A, found)
    assert (found.norm(states) <= E * (1 + 1e-9)).all()
    assert (states.norm(dim=1) <= E * (1 + 1e-9)).all()
    norm = torch.linalg.matrix_norm(A[0], 2)
    euclid = torch.zeros((), dtype=F64)
    for t in range(steps):
        euclid = norm * euclid + (states[t + 1] - A[t] @ states[t]).norm()
    assert euclid > 10 * E[-1]
    # w_t of the definition: reproduced by hand
    w = states[1] - A[0] @ states[0]
    torch.testing.assert_close(E[1], found.norm(w))
    torch.testing.assert_close(E[2], found.rate * E[1] + found.norm(states[2] - A[1] @ states[1]))
    with pytest.raises(ValueError, match="feasible discrete metric"):
        metric_enclosure(states, A, contraction_metric([-torch.eye(2)]))
    with pytest.raises(ValueError, match=r"errors must be \[T \+ 1, D\]"):
        metric_enclosure(states, A[:-1], found)


@pytest.fixture(scope="module")
def digits():
    from studies import Study
    from studies.data.subsets import draw

    study = Study.from_toml("digits", ["n=6", "mass=1", "width=16"])
    return draw(study, study.points()[0])


def recorded(digits, lr, b, steps=6):
    """H_t along a run of the metric step with heavy-ball momentum, the preconditioned gradient in the buffer."""
    from optim import Woodbury

    model = copy.deepcopy(digits.model)
    params, buffer, kernels = list(model.parameters()), None, []
    for _ in range(steps):
        kernels.append(generalized_ntk(model, digits.x).matrix)
        before = [p.detach().clone() for p in params]
        opt = Woodbury(model, lr=1.0, check_step=False)
        (0.5 * (model(digits.x) - digits.targets).square().sum(1).mean()).backward()
        opt.step()
        direction = [old - p.detach() for old, p in zip(before, params, strict=True)]
        buffer = direction if buffer is None else [b * v + g for v, g in zip(buffer, direction, strict=True)]
        with torch.no_grad():
            for p, old, v in zip(params, before, buffer, strict=True):
                p.copy_(old - lr * v)
        opt.zero_grad()
    return kernels


def test_a_recorded_run_with_momentum(digits):
    """60 outputs, 120 states: a certificate on all of them three ways, at a small momentum, and why not at a large one."""
    kernels = recorded(digits, 0.3, 0.2)
    A = momentum_matrices(kernels, 0.3, 0.2)
    assert max(torch.linalg.matrix_norm(M, 2) for M in A) > 1
    radius = max(torch.linalg.eigvals(M).abs().max().item() for M in A)
    split = momentum_metric(kernels, 0.3, 0.2)
    projected = contraction_metric(A, kind="discrete", max_states=12)
    varying = contraction_metric(A, kind="discrete", max_states=12, time_varying=True, objective="gain")
    for found in (split, projected, varying):
        assert found.feasible, found.reason
        assert found.margin >= 0
        assert found.metric.shape[-1] == 120
    assert radius <= split.rate < 1
    assert radius <= projected.rate < 1
    assert projected.projected.dimension <= 12
    assert projected.projected.whole
    assert "extended to all" in str(projected)
    for M in A:
        for found in (split, projected):
            slack = found.rate**2 * found.metric - M.mT @ found.metric @ M
            assert torch.linalg.eigvalsh((slack + slack.mT) / 2)[0] >= 0
    for t, M in enumerate(A):
        slack = varying.rate**2 * varying.metric[t] - M.mT @ varying.metric[t + 1] @ M
        assert torch.linalg.eigvalsh((slack + slack.mT) / 2)[0] >= -1e-12
    assert "Lyapunov's recursion" in varying.assumptions

    fast = recorded(digits, 0.3, 0.5)
    refused = momentum_metric(fast, 0.3, 0.5)
    assert not refused.feasible
    assert "no metric Θ₂ ⊗ I" in refused.reason
    assert np.isfinite(refused.rate)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([torch.eye(2)], 0.0, 0.9), "lr must be positive"),
        (([torch.eye(2)], 0.1, 1.0), r"momentum must be in \[0, 1\)"),
        (([torch.eye(2)], 0.1, 0.5, 1.5), "dampening must be"),
        (([torch.eye(2)], 0.1, 0.0, 0.0, True), "Nesterov needs momentum > 0"),
        (([torch.eye(2)], 0.1, 0.5, 0.1, True), "Nesterov needs momentum > 0"),
        (([torch.eye(2)], 0.1, 0.5, 0.0, True, False), "at least two kernels"),
        ((torch.ones(2, 2), 0.1, 0.5), r"kernels must be T >= 1 matrices \[D, D\]"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=text):
        momentum_matrices(*arguments)
