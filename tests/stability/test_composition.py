"""Composed metrics: 300 random pairs of parts against the certified check of the whole system and simulated trajectories."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability.contraction.composition import cascade, coupling_gain, feedback, parallel
from stability.contraction.metric import certified_metric, contraction_metric

F64 = torch.float64


def part(draw, kind, size):
    """A random contracting system and its metric (Lyapunov's of a random normal form, so that χ > 1)."""
    T = np.eye(size) + 0.4 * draw.standard_normal((size, size)) / np.sqrt(size)
    S = draw.standard_normal((size, size))
    if kind == "continuous":
        A = np.diag(-draw.uniform(0.2, 2.0, size)) + 0.5 * (S - S.T)
    else:
        A = np.diag(draw.uniform(0.1, 0.9, size)) @ np.linalg.qr(S)[0]
    A = np.linalg.solve(T, A @ T)
    found = certified_metric([A], T.T @ T, kind=kind)
    assert found.feasible
    return torch.from_numpy(A), found


def check(found, A, draw):
    """The claim: I ⪯ Θ ⪯ χI, the inequality at the claimed rate, and trajectories inside the bound that follows."""
    Theta = found.metric
    values = torch.linalg.eigvalsh(Theta)
    assert values[0] >= 1 - 1e-12
    assert values[-1] <= found.condition * (1 + 1e-12)
    whole = certified_metric([A], Theta, kind=found.kind)
    assert whole.feasible
    slack = 1e-9 * max(1.0, abs(found.rate)) + 1e-14 * found.condition
    if found.kind == "continuous":
        assert whole.rate >= found.rate - slack
        assert found.gain == pytest.approx(math.sqrt(found.condition) / found.rate)
    else:
        assert whole.rate <= found.rate + slack
        assert found.gain == pytest.approx(math.sqrt(found.condition) / (1 - found.rate))
    e = torch.from_numpy(draw.standard_normal(len(A)))
    start, h = found.norm(e), 0.3
    M = torch.linalg.matrix_exp(A * h) if found.kind == "continuous" else A
    factor = math.exp(-found.rate * h) if found.kind == "continuous" else found.rate
    for t in range(1, 9):
        e = M @ e
        assert found.norm(e) <= start * factor**t * (1 + 1e-8) + 1e-200
        assert e.norm() <= found.norm(e) * (1 + 1e-12)
    # the gain, under a disturbance held along the worst direction of the moment
    w = torch.from_numpy(draw.standard_normal(len(A)))
    w = w / w.norm()
    if found.kind == "continuous":
        steady = -torch.linalg.solve(A, w)
    else:
        steady = torch.linalg.solve(torch.eye(len(A), dtype=F64) - A, w)
    assert steady.norm() <= found.gain * (1 + 1e-9)
    return whole


def check_one(seed, kind, sizes, coupling, share):
    draw = np.random.default_rng(seed)
    (A1, first), (A2, second) = (part(draw, kind, size) for size in sizes)
    B12 = torch.from_numpy(draw.standard_normal(sizes)) * coupling
    B21 = torch.from_numpy(draw.standard_normal(sizes[::-1]))
    zero = torch.zeros(sizes, dtype=F64)

    apart = parallel(first, second)
    check(apart, torch.block_diag(A1, A2), draw)
    slower = min if kind == "continuous" else max
    assert apart.rate == slower(first.rate, second.rate)

    below = torch.cat([torch.cat([A1, zero], 1), torch.cat([B21, A2], 1)])
    chosen = cascade(first, second, B21)
    check(chosen, below, draw)
    best = slower(first.rate, second.rate)
    rate = share * best if kind == "continuous" else best + share * (1 - best)
    given_rate = cascade(first, second, B21, rate=rate)
    check(given_rate, below, draw)
    assert given_rate.rate == rate
    assert chosen.gain <= given_rate.gain * (1 + 1e-3)

    loop = torch.cat([torch.cat([A1, B12], 1), torch.cat([B21, A2], 1)])
    closed = feedback(first, second, B12, B21)
    g12, g21 = coupling_gain(first, second, B12), coupling_gain(second, first, B21)
    room = first.rate * second.rate if kind == "continuous" else (1 - first.rate) * (1 - second.rate)
    if closed.feasible:
        assert g12 * g21 < room
        check(closed, loop, draw)
    else:
        assert g12 * g21 >= room * (1 - 1e-9)
        assert "small-gain condition fails" in closed.reason
        assert closed.metric is None


SYSTEMS = {
    "seed": st.integers(0, 10**6),
    "kind": st.sampled_from(["continuous", "discrete"]),
    "sizes": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "coupling": st.sampled_from([0.0, 0.01, 0.3, 3.0, 100.0]),
    "share": st.floats(0.05, 0.95),
}


@given(**SYSTEMS)
@settings(max_examples=30, deadline=None)
def test_compositions_hold(**drawn):
    check_one(**drawn)


@pytest.mark.slow
@given(**SYSTEMS)
@settings(max_examples=300, deadline=None)
def test_compositions_hold_at_length(**drawn):
    check_one(**drawn)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_worst_cases_attain_the_formulas(kind):
    """Scalar parts and positive couplings: Θ and the rate of the formula are then optimal, not only valid."""
    a, b, g12, g21 = (1.0, 2.0, 0.5, 0.8) if kind == "continuous" else (0.3, 0.5, 0.2, 0.7)
    sign = -1 if kind == "continuous" else 1
    first, second = (contraction_metric([[[sign * v]]], kind=kind) for v in (a, b))
    closed = feedback(first, second, [[g12]], [[g21]])
    loop = np.array([[sign * a, g12], [g21, sign * b]])
    top = np.linalg.eigvals(loop).real.max()
    assert closed.rate == pytest.approx(sign * top, abs=1e-9)
    assert certified_metric([loop], closed.metric, kind=kind).rate == pytest.approx(sign * top, abs=1e-9)
    # just beyond the small-gain condition the loop is unstable
    edge = a * b / g21 if kind == "continuous" else (1 - a) * (1 - b) / g21
    assert feedback(first, second, [[edge * (1 - 1e-6)]], [[g21]]).feasible
    beyond = feedback(first, second, [[edge * (1 + 1e-6)]], [[g21]])
    assert not beyond.feasible
    assert "g₁₂g₂₁" in beyond.reason
    assert beyond.reason.endswith(f"= {edge * g21:.6g}")
    # the cascade's inequality is an equality at its ε
    rate = 0.6 if kind == "continuous" else 0.8
    series = cascade(first, second, [[5.0]], rate=rate)
    chain = np.array([[sign * a, 0.0], [5.0, sign * b]])
    assert certified_metric([chain], series.metric, kind=kind).rate == pytest.approx(rate, abs=1e-9)


def test_cascade_takes_no_more_condition_than_it_needs():
    """ε ≤ 1: a weak coupling leaves χ = 1, where ε = 2√((λ₁ − λ)(λ₂ − λ))/b alone would give 1000²."""
    one = contraction_metric([-torch.eye(1)])
    weak = cascade(one, one, [[1e-3]], rate=0.5)
    assert weak.condition == 1
    strong = cascade(one, one, [[10.0]], rate=0.5)
    assert strong.condition == pytest.approx((10 / (2 * 0.5)) ** 2)


def test_zero_couplings_make_cascades_and_parallels():
    draw = np.random.default_rng(0)
    (A1, first), (A2, second) = part(draw, "continuous", 2), part(draw, "continuous", 3)
    B, none = torch.ones(2, 3, dtype=F64), torch.zeros(3, 2, dtype=F64)
    up = feedback(first, second, B, none)  # part 2 drives part 1
    check(up, torch.cat([torch.cat([A1, B], 1), torch.cat([none, A2], 1)]), draw)
    down = feedback(first, second, B * 0, none + 1)
    check(down, torch.cat([torch.cat([A1, B * 0], 1), torch.cat([none + 1, A2], 1)]), draw)
    apart = feedback(first, second, B * 0, none)
    assert apart.rate == parallel(first, second).rate
    assert "is beyond" in cascade(first, second, none, rate=apart.rate * 2).reason


def test_gains_over_samples_and_in_the_metrics():
    draw = np.random.default_rng(1)
    (_, first), (_, second) = part(draw, "discrete", 2), part(draw, "discrete", 3)
    samples = torch.from_numpy(draw.standard_normal((4, 2, 3)))
    roots = []
    for m in (first.metric, second.metric):
        values, vectors = torch.linalg.eigh(m)
        roots.append((vectors * values.sqrt()) @ vectors.mT)
    expected = max(torch.linalg.matrix_norm(roots[0] @ B @ torch.linalg.inv(roots[1]), 2) for B in samples)
    assert coupling_gain(first, second, samples) == pytest.approx(expected.item())
    assert coupling_gain(first, second, samples) >= expected


def test_what_cannot_be_composed_says_so():
    good, bad = contraction_metric([-torch.eye(2)]), contraction_metric([torch.eye(2)])
    assert "the second part has no contraction metric: sample 0" in parallel(good, bad).reason
    assert not cascade(bad, good, torch.eye(2)).feasible
    too_fast = cascade(good, good, torch.eye(2), rate=1.0)
    assert not too_fast.feasible
    assert "rate 1 must be below" in too_fast.reason
    with pytest.raises(ValueError, match="one part is continuous, the other discrete"):
        parallel(good, contraction_metric([torch.eye(2) / 2], kind="discrete"))
    with pytest.raises(ValueError, match="the coupling must be finite"):
        cascade(good, good, torch.ones(3, 2))
    varying = contraction_metric([torch.eye(2) / 2], kind="discrete", time_varying=True, condition=2.0)
    with pytest.raises(ValueError, match="varies in time"):
        parallel(varying, varying)


def test_compositions_compose():
    one = contraction_metric([-torch.eye(1)])
    pair = cascade(one, one, [[0.5]])
    four = feedback(pair, pair, 0.05 * torch.eye(2), 0.05 * torch.eye(2))
    A = torch.tensor([[-1.0, 0.0], [0.5, -1.0]], dtype=F64)
    couple = 0.05 * torch.eye(2, dtype=F64)
    check(four, torch.cat([torch.cat([A, couple], 1), torch.cat([couple, A], 1)]), np.random.default_rng(0))
