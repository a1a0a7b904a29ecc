"""Large systems: the slow subspace, Lyapunov metrics, and that what was left out is said and not certified away."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability.contraction.metric import contraction_metric
from stability.contraction.projection import leaks, lyapunov_metric, lyapunov_sequence, slow_basis
from stability.contraction.sdp import exponent_of


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["continuous", "discrete"]), largest=st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_the_slow_basis_is_invariant_and_slow(seed, kind, largest):
    draw = np.random.default_rng(seed)
    mean = draw.standard_normal((8, 8))
    V = slow_basis(kind, mean, largest)
    k = V.shape[1]
    assert largest - 1 <= k <= largest  # a conjugate pair is not split
    np.testing.assert_allclose(V.T @ V, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(mean @ V, V @ (V.T @ mean @ V), atol=1e-9)
    speed = (lambda z: z.real) if kind == "continuous" else np.abs
    inside = np.sort(speed(np.linalg.eigvals(V.T @ mean @ V)))
    np.testing.assert_allclose(inside, np.sort(speed(np.linalg.eigvals(mean)))[-k:], atol=1e-8)
    out, back = leaks([mean], V)
    W = np.linalg.svd(V.T)[2][k:].T
    assert out == pytest.approx(np.linalg.norm(W.T @ mean @ V, 2), abs=1e-12)
    assert back == pytest.approx(np.linalg.norm(V.T @ mean @ W, 2), abs=1e-12)
    assert leaks([mean, 3 * mean, 2 * mean], V) == pytest.approx((3 * out, 3 * back))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["continuous", "discrete"]))
@settings(max_examples=40, deadline=None)
def test_lyapunov_metrics_have_the_exponent_asked_for(seed, kind):
    draw = np.random.default_rng(seed)
    A = draw.standard_normal((4, 4))
    z = np.linalg.eigvals(A)
    A = A - (z.real.max() + 0.5) * np.eye(4) if kind == "continuous" else 0.8 * A / np.abs(z).max()
    q, beyond = (0.9, 1.1) if kind == "continuous" else (-0.7, -0.6)
    assert exponent_of(kind, [A], [lyapunov_metric(kind, A, q)]) >= q - 1e-9
    assert lyapunov_metric(kind, A, beyond) is None


@given(seed=st.integers(0, 10_000), rho=st.sampled_from([0.3, 0.9]))
@settings(max_examples=30, deadline=None)
def test_lyapunov_sequences_have_any_rate(seed, rho):
    draw = np.random.default_rng(seed)
    matrices = list(draw.standard_normal((5, 3, 3)))
    metrics = lyapunov_sequence(matrices, rho)
    assert len(metrics) == 6
    assert exponent_of("discrete", matrices, metrics) >= -(rho**2) * (1 + 1e-9)
    assert min(np.linalg.eigvalsh(Theta)[0] for Theta in metrics) >= 1 - 1e-12


def stable(draw, size, spread):
    """Slow spirals beside fast modes, coupled from the fast into the slow."""
    A = np.diag(-np.linspace(1.0, spread, size))
    A[:2, :2] = [[0.0, 1.0], [-1.0, -0.5]]
    A[:2, 2:] = 0.3 * draw.standard_normal((2, size - 2))
    return A


def test_a_large_system_is_certified_whole_where_it_can_be():
    A = stable(np.random.default_rng(0), 30, 5.0)
    matrices = [A, A + 1e-3 * np.random.default_rng(1).standard_normal((30, 30))]
    found = contraction_metric(matrices, max_states=6)
    assert found.feasible
    assert found.metric.shape == (30, 30)
    assert found.projected.whole
    assert found.projected.states == 30
    assert found.projected.dimension == found.projected.basis.shape[1] <= 6
    assert found.rate <= -max(np.linalg.eigvals(M).real.max() for M in matrices)
    for M in matrices:
        S = M.T @ found.metric.numpy() + found.metric.numpy() @ M + 2 * found.rate * found.metric.numpy()
        assert np.linalg.eigvalsh((S + S.T) / 2)[-1] <= 1e-10
    gain = contraction_metric(matrices, max_states=6, objective="gain")
    assert gain.feasible
    assert gain.gain <= found.gain * (1 + 1e-9)
    bounded = contraction_metric(matrices, max_states=6, condition=2.0)
    assert not bounded.feasible or bounded.condition <= 2 * (1 + 1e-9)


def test_what_contracts_only_in_the_subspace_is_not_feasible():
    """The slow directions contract; two fast ones do not under any common metric, for their product expands."""
    one, two = (np.diag([-0.1, -0.2, -0.3, -1.0, -1.0]) for _ in range(2))
    one[3, 4] = two[4, 3] = 60.0
    found = contraction_metric([one, two], max_states=3)
    assert not found.feasible
    assert found.metric is None
    assert not found.projected.whole
    assert "2 left out" in str(found.projected)
    assert "no extension to all states" in found.reason
    assert "contracts there" in found.reason or "even there" in found.reason
    assert found.gain == np.inf


def test_long_runs_of_large_systems_take_the_recursion():
    draw = np.random.default_rng(0)
    matrices = [0.9 * np.linalg.qr(draw.standard_normal((12, 12)))[0] for _ in range(4)]
    matrices[2] = matrices[2] + 2 * np.eye(12)[:, :1] @ np.eye(12)[1:2]
    found = contraction_metric(matrices, kind="discrete", time_varying=True, max_states=5, objective="gain")
    assert found.feasible
    assert found.solves == 0
    assert found.metric.shape == (5, 12, 12)
    e = torch.from_numpy(draw.standard_normal(12))
    bound = found.norm(e, 0)
    for t, A in enumerate(matrices):
        e, bound = torch.from_numpy(A) @ e, bound * found.rate
        assert found.norm(e, t + 1) <= bound * (1 + 1e-12)
    fastest = contraction_metric(matrices, kind="discrete", time_varying=True, max_states=5, condition=1e6)
    assert fastest.rate < found.rate - 0.1
    assert found.gain < 0.5 * fastest.gain
    tight = contraction_metric(matrices, kind="discrete", time_varying=True, max_states=5, condition=1.01)
    assert not tight.feasible
    assert "no program was solved for 12 states" in tight.reason
