"""Contraction metrics: cases with known answers, brute force over all 2 × 2 metrics, and what must be refused."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability.contraction.metric import certified_metric, contraction_metric
from stability.contraction.sdp import Programs
from stability.contraction.search import exponent_limit

SPIRAL = np.array([[0.0, 1.0], [-1.0, -0.5]])
SHEAR = np.array([[-1.0, 5.0], [0.0, -1.0]])
F64 = torch.float64


def value_at(kind, matrices, q11, q12, q22):
    """Rate (λ, or ρ) of Θ = [[q11, q12], [q12, q22]] for 2 × 2 matrices, vectorised, by the quadratic formula."""
    det = q11 * q22 - q12**2
    worst = None
    for a, b, c, d in (A.flatten() for A in matrices):
        if kind == "continuous":
            g11, g22 = 2 * (a * q11 + c * q12), 2 * (b * q12 + d * q22)
            g12 = b * q11 + d * q12 + a * q12 + c * q22
        else:
            g11 = a * a * q11 + 2 * a * c * q12 + c * c * q22
            g22 = b * b * q11 + 2 * b * d * q12 + d * d * q22
            g12 = a * b * q11 + (a * d + b * c) * q12 + c * d * q22
        trace = (g11 * q22 + g22 * q11 - 2 * g12 * q12) / det  # of Θ⁻¹G
        root = np.sqrt(np.maximum(trace**2 / 4 - (g11 * g22 - g12**2) / det, 0))
        top = trace / 2 + root
        worst = top if worst is None else np.maximum(worst, top)
    return -worst / 2 if kind == "continuous" else np.sqrt(np.maximum(worst, 0))


def brute(kind, matrices, conditions, angles=361):
    """The best rate at every χ on a grid of Θ = R diag(1, χ) Rᵀ."""
    phi = np.linspace(0, np.pi, angles)[:, None]
    chi = np.asarray(conditions, dtype=float)[None, :]
    c, s = np.cos(phi), np.sin(phi)
    rates = value_at(kind, matrices, c * c + chi * s * s, (1 - chi) * c * s, s * s + chi * c * c)
    return rates.max(0) if kind == "continuous" else rates.min(0)


def test_the_spiral():
    """Closed form: Θ = [[1, x], [x, 1]], χ = (1 + x)/(1 − x); rate 0 at x = 0, ¼ at x = ¼, that is from χ = 5/3 on."""
    identity = contraction_metric([SPIRAL], condition=1)
    assert not identity.feasible
    assert abs(identity.rate) < 1e-13
    assert identity.metric is None
    assert identity.gain == np.inf
    assert "χ ≤ 1 " in identity.reason
    middle = contraction_metric([SPIRAL], condition=1.5)
    mu = np.roots([0.96, -0.96, 0.23]).min()  # det([[−2x, −x/2], [−x/2, 2x − 1]] + μΘ) = 0 at x = 0.2
    assert middle.rate == pytest.approx(mu / 2, abs=3e-5)
    assert middle.condition <= 1.5
    for condition in (5 / 3, 4.0, None):
        found = contraction_metric([SPIRAL], condition=condition)
        assert found.rate == pytest.approx(0.25, abs=3e-5)
        assert found.rate <= 0.25
        assert found.condition == pytest.approx(5 / 3, rel=1e-3)
    assert found.gain == pytest.approx(np.sqrt(found.condition) / found.rate, rel=1e-12)


def test_the_shear_largest_rate_first_is_wrong():
    """χ*(λ) = (5/(2(1 − λ)))², so the gain is 2.5/(λ(1 − λ)): 10 at λ = ½, 25 002 at λ = 0.9999."""
    best = contraction_metric([SHEAR], objective="gain")
    assert best.gain == pytest.approx(10, rel=0.01)
    assert best.gain >= 10 * (1 - 1e-9)
    assert best.rate == pytest.approx(0.5, abs=0.06)
    assert best.gain <= 10 * (1 + 1e-5)  # λ = ½ is the first rate looked at, and the best one seen is kept
    programs = Programs("continuous", [SHEAR])
    for rate in (0.3, 0.7, 0.95, 0.999):  # and 25 002 at 0.9999
        (Theta,) = programs.roundest(2 * rate)
        assert np.linalg.cond(Theta) == pytest.approx((2.5 / (1 - rate)) ** 2, rel=1e-3)
        assert np.linalg.eigvalsh(Theta)[0] == pytest.approx(1)
    tight = contraction_metric([SHEAR], objective="gain", condition=9.0)
    assert tight.condition <= 9 * (1 + 1e-8)
    assert tight.gain == pytest.approx(3 / (1 - 2.5 / 3), rel=0.02)
    eager = contraction_metric([SHEAR])
    assert eager.rate == pytest.approx(1 - 2.5e-3, abs=2e-4)  # χ ≤ 10⁶ is spent
    assert eager.gain > 90 * best.gain


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["continuous", "discrete"]), count=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_rate_and_gain_against_all_metrics_of_two_states(seed, kind, count):
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((2, 2))
    matrices = [base + 0.2 * draw.standard_normal((2, 2)) for _ in range(count)]
    if kind == "continuous":
        matrices = [A - (np.linalg.eigvals(base).real.max() + 0.5) * np.eye(2) for A in matrices]
    else:
        matrices = [0.7 * A / np.abs(np.linalg.eigvals(base)).max() for A in matrices]
    sign, none = (1, 0.0) if kind == "continuous" else (-1, 1.0)
    at_five = sign * np.max(sign * brute(kind, matrices, np.linspace(1, 5, 60)))
    found = contraction_metric(matrices, kind=kind, condition=5.0)
    width = abs(at_five - value_at(kind, matrices, 1.0, 0.0, 1.0))
    if found.feasible:
        assert sign * (found.rate - at_five) >= -(1e-3 * width + 1e-4)
        assert sign * (found.rate - at_five) <= 0.01 * (1 + width)  # the grid is coarse, the search is not
    else:
        assert sign * (at_five - none) < 1e-4
    grid = 1 + np.logspace(-3, 4, 150)
    rates = brute(kind, matrices, grid)
    speeds = rates if kind == "continuous" else 1 - rates
    gain = contraction_metric(matrices, kind=kind, objective="gain")
    assert gain.feasible or not (speeds > 1e-6).any()
    if (speeds > 0).any():
        assert gain.gain <= 1.02 * (np.sqrt(grid) / np.where(speeds > 0, speeds, 1e-300)).min()  # and it is certified


@given(seed=st.integers(0, 10_000), size=st.integers(2, 5), kind=st.sampled_from(["continuous", "discrete"]))
@settings(max_examples=15, deadline=None)
def test_trajectories_obey_the_certificate(seed, size, kind):
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((size, size))
    z = np.linalg.eigvals(base)
    base = base - (z.real.max() + 0.3) * np.eye(size) if kind == "continuous" else 0.8 * base / np.abs(z).max()
    matrices = [base + 0.02 * draw.standard_normal((size, size)) for _ in range(3)]
    found = contraction_metric(matrices, kind=kind, objective="gain")
    if not found.feasible:
        assert found.reason
        return
    assert found.margin >= 0
    assert found.condition >= 1
    e = torch.from_numpy(draw.standard_normal(size))
    start, start_norm, w_norm, bound = e.norm(), found.norm(e), 0.3, None
    bound = start_norm
    h = 0.05
    for t in range(60):
        A = torch.from_numpy(matrices[draw.integers(3)])
        if kind == "discrete":
            w = torch.from_numpy(draw.standard_normal(size))
            w = w_norm * w / found.norm(w)
            e, bound = A @ e + w, found.rate * bound + w_norm
        else:
            e, bound = torch.linalg.matrix_exp(A * h) @ e, bound * np.exp(-found.rate * h)
            assert e.norm() <= found.condition**0.5 * np.exp(-found.rate * h * (t + 1)) * start * (1 + 1e-9)
        assert found.norm(e) <= bound * (1 + 1e-9)
        assert e.norm() <= found.norm(e) * (1 + 1e-12)
        assert found.norm(e) <= found.condition**0.5 * e.norm() * (1 + 1e-12)


def test_symmetric_closed_loops_need_no_program():
    H = np.diag([0.1, 1.0, 2.0])
    step, flow = contraction_metric([np.eye(3) - 0.5 * H], kind="discrete"), contraction_metric([-H])
    assert step.rate == pytest.approx(0.95, abs=1e-12)
    assert flow.rate == pytest.approx(0.1, abs=1e-12)
    for found in (step, flow):
        assert found.solves == 0
        assert found.condition == 1
        torch.testing.assert_close(found.metric, torch.eye(3, dtype=F64))


def test_a_curved_loss_contracts_in_the_inverse_kernel():
    """ė = −HSe of a loss of curvature S: in Θ = H⁻¹ the rate is λ_min(H^½SH^½), which no metric betters."""
    draw = np.random.default_rng(0)
    H, S = (np.diag(draw.uniform(0.2, 3, 3)) + 0.1 * B @ B.T for B in draw.standard_normal((2, 3, 3)))
    closed = np.linalg.eigvals(H @ S).real.min()
    given = certified_metric([-H @ S], np.linalg.inv(H))
    assert given.rate == pytest.approx(closed, rel=1e-9)
    assert given.condition == pytest.approx(np.linalg.cond(H))
    found = contraction_metric([-H @ S])
    assert closed * (1 - 1e-3) <= found.rate <= closed
    assert contraction_metric([-H @ S], objective="gain").gain <= given.gain * (1 + 1e-6)


def test_what_a_varying_metric_cannot_beat():
    A, h, chi = SPIRAL, 0.3, 4.0
    q, _ = exponent_limit("continuous", [A], condition=chi, intervals=[h], time_varying=True)
    grown = np.linalg.norm(scipy.linalg.expm(A * h), 2)  # ≤ √χ·e^(−λh), q = 2λ
    assert grown == pytest.approx(np.sqrt(chi) * np.exp(-q / 2 * h))
    q, _ = exponent_limit("discrete", [A], condition=chi, time_varying=True)
    assert np.linalg.norm(A, 2) == pytest.approx(np.sqrt(chi) * np.sqrt(-q))


def test_many_samples_are_generated_not_listed():
    turn = lambda a: np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])  # noqa: E731
    matrices = [turn(a).T @ SPIRAL @ turn(a) for a in np.linspace(0, 0.2, 40)]
    programs = Programs("continuous", matrices)
    programs.slackest(0.1, 3.0)
    assert len(programs._active) < 12
    few = contraction_metric([matrices[0], matrices[-1]], condition=3.0)
    many = contraction_metric(matrices, condition=3.0)
    assert many.rate <= few.rate + 1e-4
    assert many.feasible
    for A in matrices:
        S = A.T @ many.metric.numpy() + many.metric.numpy() @ A + 2 * many.rate * many.metric.numpy()
        assert np.linalg.eigvalsh(S)[-1] <= 1e-12


def test_a_program_started_without_a_sample_takes_it_in():
    tame, wild = -np.eye(2), np.array([[-1.0, 3.0], [0.0, -1.0]])
    matrices = [tame] * 10 + [wild] + [tame] * 9
    found = contraction_metric(matrices, condition=4.0)
    alone = contraction_metric([wild], condition=4.0)
    assert found.rate == pytest.approx(alone.rate, abs=1e-3)


def test_time_varying_metrics_where_no_constant_one_contracts():
    A, B = np.array([[0.9, 2.0], [0.0, 0.3]]), np.array([[0.3, 0.0], [2.0, 0.9]])
    constant = contraction_metric([A, A, B, B], kind="discrete")
    assert not constant.feasible
    assert "each of the 4 samples alone would allow 0.9" in constant.reason
    found = contraction_metric([A, A, B, B], kind="discrete", time_varying=True, objective="gain")
    assert found.feasible
    assert found.metric.shape == (5, 2, 2)
    assert found.time_varying
    Theta = found.metric.numpy()
    for t, M in enumerate([A, A, B, B]):
        slack = found.rate**2 * Theta[t] - M.T @ Theta[t + 1] @ M
        assert np.linalg.eigvalsh(slack)[0] >= -1e-13
    values = np.linalg.eigvalsh(Theta)
    assert values.min() >= 1 - 1e-12
    assert values.max() <= found.condition * (1 + 1e-12)
    product = B @ B @ A @ A
    assert np.linalg.norm(product, 2) <= found.condition**0.5 * found.rate**4 * (1 + 1e-9)
    e = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(v @ M @ v).sqrt() for v, M in zip(e, found.metric, strict=True)])
    torch.testing.assert_close(found.norm(e), expected)
    torch.testing.assert_close(found.norm(e[3], 3), expected[3])


def test_time_varying_in_continuous_time_bounds_the_transition():
    A, B = np.array([[-0.1, 2.0], [0.0, -0.7]]), np.array([[-0.7, 0.0], [2.0, -0.1]])
    matrices, h = [A, B, A, B], [0.1, 0.2, 0.1, 0.3]
    found = contraction_metric(matrices, time_varying=True, condition=30.0, interval=h)
    assert found.feasible
    assert found.condition <= 30
    # inside an interval the metric is the linear interpolation, and the norm must fall there too
    e = torch.tensor([0.3, 1.0], dtype=F64)
    last = found.norm(e, 0)
    for t, (M, width) in enumerate(zip(matrices, h, strict=True)):
        for k in range(1, 11):
            e = torch.linalg.matrix_exp(torch.from_numpy(M) * width / 10) @ e
            Theta = (1 - k / 10) * found.metric[t] + k / 10 * found.metric[t + 1]
            now = (e @ Theta @ e).sqrt()
            assert now <= last * np.exp(-found.rate * width / 10) * (1 + 1e-9)
            last = now


def test_unstable_samples_are_named():
    found = contraction_metric([-np.eye(2), np.diag([-1.0, 0.25])])
    assert not found.feasible
    assert found.reason == "sample 1 has spectral abscissa 0.25: no constant metric contracts it"
    assert found.rate == pytest.approx(-0.25)
    assert found.solves == 0
    with pytest.raises(ValueError, match="there is no contraction metric: sample 1 has"):
        found.norm(torch.ones(2))
    marginal = contraction_metric([np.eye(2)], kind="discrete")
    assert not marginal.feasible
    assert "spectral radius 1:" in marginal.reason


@pytest.mark.parametrize("what", ["raises", "lies", "nan", "indefinite"])
def test_a_bad_solver_gives_no_false_certificate(monkeypatch, what):
    """Whatever the solver returns, what is claimed is true of the Θ that is returned."""

    def solve(self, goal, q, condition):
        self.solves += 1
        if what == "raises":
            self.failure = "Clarabel failed: out of order"
            return None
        return [
            {"lies": np.diag([1.0, 40.0]), "nan": np.full((2, 2), np.nan), "indefinite": np.diag([1.0, -1.0])}[what]
        ]

    monkeypatch.setattr(Programs, "_solve", solve)
    for objective in ("rate", "gain"):
        if what == "nan":
            continue
        found = contraction_metric([SHEAR], condition=100.0, objective=objective)
        if found.feasible:
            Theta = found.metric.numpy()
            S = SHEAR.T @ Theta + Theta @ SHEAR + 2 * found.rate * Theta
            assert np.linalg.eigvalsh(S)[-1] <= 1e-12
        else:
            assert found.metric is None
        if what == "raises":
            assert not found.feasible
            assert "out of order" in found.reason


def test_a_given_metric_is_certified_or_refused():
    good = certified_metric([SPIRAL], np.array([[2.0, 0.5], [0.5, 2.0]]))
    assert good.rate == pytest.approx(0.25, abs=1e-12)
    assert good.condition == pytest.approx(5 / 3)
    assert torch.linalg.eigvalsh(good.metric)[0] == pytest.approx(1)
    assert "does not contract" in certified_metric([SPIRAL], np.diag([1.0, 9.0])).reason
    assert "positive definite" in certified_metric([SPIRAL], np.diag([1.0, -1.0])).reason
    with pytest.raises(ValueError, match="metric has shape"):
        certified_metric([SPIRAL], np.eye(3))


def test_dtype_and_scale():
    single = contraction_metric(torch.tensor(SPIRAL, dtype=torch.float32)[None], condition=1.5)
    assert single.metric.dtype == F64
    assert single.rate == pytest.approx(0.19897, abs=1e-4)
    for factor in (1e-6, 1e6):  # the unit of time
        assert contraction_metric([factor * SPIRAL], condition=1.5).rate == pytest.approx(0.19897 * factor, rel=1e-3)


@pytest.mark.parametrize(
    ("matrices", "options", "error", "text"),
    [
        ([], {}, ValueError, "matrices is empty"),
        ("A", {}, TypeError, "matrices must be a sequence"),
        ([np.eye(2), np.eye(3)], {}, ValueError, r"matrices\[1\] has shape \(3, 3\)"),
        ([np.ones((2, 3))], {}, ValueError, r"matrices\[0\] has shape \(2, 3\)"),
        ([np.full((2, 2), np.nan)], {}, ValueError, r"matrices\[0\] holds NaN"),
        ([np.eye(2)], {"kind": "discreet"}, ValueError, "did you mean 'discrete'"),
        ([np.eye(2)], {"objective": "gian"}, ValueError, "did you mean 'gain'"),
        ([np.eye(2)], {"condition": 0.5}, ValueError, "condition must be a finite number >= 1"),
        ([np.eye(2)], {"max_states": 1}, ValueError, "max_states"),
        ([np.eye(2)], {"tolerance": 0.0}, ValueError, "tolerance"),
        ([np.eye(2)], {"time_varying": True, "interval": 1.0}, ValueError, "give condition, or objective='gain'"),
        ([np.eye(2)], {"time_varying": True, "condition": 2.0}, ValueError, "needs interval"),
        ([np.eye(2)], {"interval": 1.0}, ValueError, "interval is for time-varying"),
        ([np.eye(2)], {"time_varying": True, "condition": 2.0, "interval": [1.0, 1.0]}, ValueError, "one per sample"),
        (
            [np.eye(3)],
            {"time_varying": True, "condition": 2.0, "interval": 1.0, "max_states": 2},
            ValueError,
            "up to max_states = 2",
        ),
    ],
)
def test_refusals(matrices, options, error, text):
    with pytest.raises(error, match=text):
        contraction_metric(matrices, **options)


def test_no_solver_is_loaded_before_it_is_needed():
    program = (
        "import sys, torch, stability.contraction.metric as c\n"
        "import stability.contraction.composition, stability.contraction.optimal_mass\n"
        "c.contraction_metric([-torch.eye(2)])\n"
        "sys.exit('cvxpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
