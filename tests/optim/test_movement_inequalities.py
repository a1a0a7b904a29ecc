"""Every inequality of a minimizing movement, on convex quadratics drawn at random and sequences as inexact as they please."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.movements.energy import QuadraticEnergy
from optim.movements.proximal import certificate, proximal_point
from optim.movements.result import INEQUALITIES
from optim.movements.space import norm
from optim.movements.tracking import Trajectory, ball_radius, tracking_columns
from optim.steps.recursion import scalar_recursion
from tests.reference import F64


def quadratic(seed, N, C, rank, scale):
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(N, rank, generator=draw, dtype=F64) * scale
    A = root @ root.mT
    b = A @ torch.randn(N, C, generator=draw, dtype=F64)  # in the range of A: there is a minimum
    least = torch.linalg.pinv(A) @ b
    energy = QuadraticEnergy(A, b)
    return energy, least, draw


def sequence(energy, least, draw, tau, size, K):
    """u^k inexact by random amounts up to ``size``, some of them aimed along the present error: the worst direction."""
    u = [torch.randn(least.shape, generator=draw, dtype=F64) * 3]
    exact, proximal = [u[0]], []
    for k in range(K):
        proximal.append(proximal_point(energy, u[-1], tau))
        exact.append(proximal_point(energy, exact[-1], tau))
        aim = proximal[-1] - exact[-1] if k % 2 else torch.randn(least.shape, generator=draw, dtype=F64)
        push = size * torch.rand((), generator=draw, dtype=F64) * aim / norm(aim).clamp_min(1e-300)
        u.append(proximal[-1] + push)
    drop = energy.value(u[0]) - energy.value(least)
    known = least if energy.convexity else None
    return Trajectory(
        torch.stack(u), torch.stack(proximal), torch.stack(exact), float(drop), tau, energy.convexity, known
    )


def holds(seed, N, C, rank, scale, tau, size, K):
    energy, least, draw = quadratic(seed, N, C, min(rank, N), scale)
    run = sequence(energy, least, draw, tau, size, K)
    columns = tracking_columns(run)
    pairs = zip(run.outputs[1:], run.outputs, strict=False)
    columns["delta_certificate"] = torch.tensor([certificate(energy, v, c, tau) for v, c in pairs], dtype=F64)
    room = 1e-12 * (1 + run.outputs.abs().max().item()) * (1 + 1 / (tau * (energy.convexity + 1 / tau)))
    for left, right in INEQUALITIES:
        a, b = columns[left], columns[right]
        if left == "distance" and not energy.convexity:
            assert a.isnan().all()
            continue
        assert (a <= b * (1 + 1e-9) + room).all(), (left, right)
    if energy.convexity:  # the ball: what is left of the start has shrunk by q^K
        start = norm(run.outputs[0] - least) * run.rate**K
        assert columns["distance"][-1] <= (columns["ball"][-1] + start) * (1 + 1e-9) + room
    # and the recursion is the sum that it stands for
    q, d = run.rate, columns["delta"]
    sums = torch.stack([sum(q ** (k - 1 - j) * d[j] for j in range(k)) for k in range(1, K + 1)])
    torch.testing.assert_close(columns["tracking_bound"], sums, rtol=1e-12, atol=0)


DRAWS = {
    "seed": st.integers(0, 10**6),
    "N": st.integers(1, 6),
    "C": st.integers(1, 3),
    "rank": st.integers(1, 6),
    "scale": st.floats(0.05, 3.0),
    "tau": st.floats(-3, 2).map(lambda e: 10**e),
    "size": st.floats(-6, 1).map(lambda e: 10**e),
    "K": st.integers(1, 9),
}


@settings(max_examples=40)
@given(**DRAWS)
def test_the_inequalities_hold(**drawn):
    holds(**drawn)


@pytest.mark.slow
@settings(max_examples=500, derandomize=False)
@given(**DRAWS)
def test_the_inequalities_hold_on_five_hundred(**drawn):
    holds(**drawn)


def worst(lam, tau, delta, K, start=1.0):
    """One eigen-direction, every error δ pushed the same way: the equality case. A = λ."""
    energy = QuadraticEnergy(torch.tensor([[lam]], dtype=F64), torch.zeros(1, 1, dtype=F64))
    u, exact, proximal = [torch.full((1, 1), start, dtype=F64)], [torch.full((1, 1), start, dtype=F64)], []
    for _ in range(K):
        proximal.append(proximal_point(energy, u[-1], tau))
        exact.append(proximal_point(energy, exact[-1], tau))
        u.append(proximal[-1] + delta)
    run = Trajectory(
        *map(torch.stack, (u, proximal, exact)), lam * start**2 / 2, tau, lam, torch.zeros(1, 1, dtype=F64)
    )
    return tracking_columns(run)


@pytest.mark.parametrize(("lam", "tau", "delta"), [(2.0, 0.5, 0.1), (0.3, 1.0, 1e-3)])
def test_tracking_distance_and_the_ball_are_sharp(lam, tau, delta):
    """No constant could be smaller: on one eigen-direction all of them are equalities."""
    c = worst(lam, tau, delta, 200)
    for left, right in (
        ("tracking", "tracking_bound"),
        ("tracking_bound", "uniform_bound"),
        ("distance", "distance_bound"),
    ):
        torch.testing.assert_close(c[left], c[right], rtol=1e-9, atol=1e-13)
    assert c["distance"][-1].item() == pytest.approx(ball_radius(delta, tau, lam), rel=1e-9)
    assert c["ball"][-1].item() == pytest.approx(ball_radius(delta, tau, lam), rel=1e-12)


def test_the_budget_is_sharp_for_one_long_step():
    """E = ½su², τ = 1, one step from 1: the path is s/(1 + s), B₁ = √(s/(2 + s)); both tend to 1 as s grows."""
    for s in (1e-3, 0.1, 1.0, 10.0, 1e8):
        c = worst(s, 1.0, 0.0, 1)
        assert c["exact_path"][0].item() == pytest.approx(s / (1 + s), rel=1e-12)
        assert c["budget"][0].item() == pytest.approx(math.sqrt(s / (2 + s)), rel=1e-12)
        assert c["budget_b0"][0].item() == pytest.approx(math.sqrt(s), rel=1e-12)
    assert c["exact_path"][0] > (1 - 1e-6) * c["budget"][0]


def test_the_budget_needs_its_error_terms():
    """Without Σε_k the path bound is false: the errors themselves are walked back by the later steps."""
    c = worst(5.0, 1.0, 1.0, 30, start=0.0)
    assert (c["path"] <= c["path_bound"] * (1 + 1e-12)).all()
    assert c["path"][-1] > c["budget"][-1] + 1e-3


def test_the_recursion_is_the_bound_of_any_contraction():
    e = [torch.tensor([1.0, -2.0], dtype=F64)]
    rates, pushes = [0.5, 1.2, 0.0, 0.9], []
    for t, rate in enumerate(rates):
        push = torch.randn(2, generator=torch.Generator().manual_seed(t), dtype=F64)
        e.append(rate * e[-1] + push)
        pushes.append(push.norm())
    E = scalar_recursion(e[0].norm(), rates, pushes)
    assert len(E) == 5
    assert all(E[t] >= e[t].norm() - 1e-12 for t in range(5))
    assert E[1].item() == pytest.approx((0.5 * e[0].norm() + pushes[0]).item(), rel=1e-14)
    with pytest.raises(ValueError, match="argument"):
        scalar_recursion(1.0, [0.5], [])


def test_the_columns_of_three_steps_by_hand():
    """E = ½u², τ = 1, q = ½; u: 1, .6, .4, .1; ū: 1, .5, .25, .125."""
    u, exact = (torch.tensor(v, dtype=F64).reshape(4, 1, 1) for v in ([1, 0.6, 0.4, 0.1], [1, 0.5, 0.25, 0.125]))
    found = tracking_columns(Trajectory(u, u[:3] / 2, exact, 0.5, 1.0, 1.0, torch.zeros(1, 1, dtype=F64)))
    errors = [0.0, 0.1, 0.15, 0.175]  # ε⁺ = ε/2 + δ
    expected = {
        "delta": [0.1, 0.1, 0.1],
        "tracking": [0.1, 0.15, 0.025],
        "tracking_bound": errors[1:],
        "uniform_bound": [0.1, 0.15, 0.175],
        "distance_bound": [0.5 + 0.1, 0.25 + 0.15, 0.125 + 0.175],
        "ball": [0.2] * 3,
        "path": [0.4, 0.6, 0.9],
        "exact_path": [0.5, 0.75, 0.875],
        "budget": [(k / 3) ** 0.5 for k in (1, 2, 3)],
        "budget_b0": [k**0.5 for k in (1, 2, 3)],
        # Σδ and the errors before each step: ε_0, ε_0 + ε_1, ε_0 + ε_1 + ε_2
        "path_bound": [(1 / 3) ** 0.5 + 0.1, (2 / 3) ** 0.5 + 0.3, 1.0 + 0.55],
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values, dtype=F64), rtol=0, atol=1e-12, msg=name)
