"""The routes through the parameters, held against twins whose every quantity is exact: ridge regression, one weight, SGD."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stability import Replacement
from stability.assumptions import smooth_activations
from stability.risk_constants import ParameterConstants, parameter_constants
from stability.routes import (
    bousquet_elisseeff,
    convex_route,
    kozachkov_route,
    nonconvex_route,
    parameter_routes,
    smooth_route,
    strongly_convex_route,
)
from tests.reference import run as outputs_at
from tests.reference import trainable
from tests.stability.dense import F64, small_problem, twin_data

SLACK = 1 + 1e-9
LINEAR = ParameterConstants(
    20, (0.1,) * 30, lipschitz=3.0, smoothness=2.0, curvature=0.5, everywhere=True, both_runs=True
)


def descend(model, x, a, *, steps, lr, decay=0.0, mass=1.0):
    """θ ← θ − (lr/mass)(∇h + decay·θ), by autograd: all steps (params, lr), and the end."""
    params, path = trainable(model), []
    for _ in range(steps):
        path.append((params, lr))
        free = {n: p.clone().requires_grad_() for n, p in params.items()}
        risk = (outputs_at(model, free, x) - a).square().sum() / (2 * len(x))
        grads = torch.autograd.grad(risk, list(free.values()))
        params = {n: p - lr / mass * (g + decay * p) for (n, p), g in zip(params.items(), grads, strict=True)}
    return [*path, (params, lr)]


def distance(one, two, mass=1.0):
    return (mass * sum((one[n] - two[n]).square().sum() for n in one)).sqrt().item()


def losses(model, params, x, a):
    return (outputs_at(model, params, x) - a).square().sum(1) / 2


def study(model, x, a, z, *, steps, lr, decay=0.0, mass=1.0):
    """(constants over both runs, measured distance, measured ε over S and z') of one pair of twins."""
    x2, a2 = twin_data(x, a, z)
    one = descend(model, x, a, steps=steps, lr=lr, decay=decay, mass=mass)
    two = descend(model, x2, a2, steps=steps, lr=lr, decay=decay, mass=mass)
    c = parameter_constants(
        model, x, a, z.x[None], z.target[None], one, twins=[two], weight_decay=decay, mass=mass, curvature_every=3
    )
    points, aims = torch.cat([x, z.x[None]]), torch.cat([a, z.target[None]])
    apart = (losses(model, one[-1][0], points, aims) - losses(model, two[-1][0], points, aims)).abs().max().item()
    c = replace(c, lrs=c.lrs[:-1])  # at the last checkpoint no step is taken
    return c, distance(one[-1][0], two[-1][0], mass), apart


@given(
    seed=st.integers(0, 1000), n=st.integers(1, 6), p=st.integers(1, 2), decay=st.sampled_from([0.0, 0.1, 2.0]),
    mass=st.sampled_from([0.2, 1.0, 5.0]), share=st.sampled_from([0.1, 0.5, 0.95]), steps=st.sampled_from([1, 5, 20]),
)  # fmt: skip
@settings(max_examples=15)
def test_on_ridge_regression_every_applicable_route_holds(seed, n, p, decay, mass, share, steps):
    _, x, a, (z,), _ = small_problem(seed, n=n, p=p, twins=1)
    model = nn.Linear(3, p, bias=False).to(F64)
    top = (torch.linalg.eigvalsh(x.T @ x / n)[-1].item() + decay) / mass
    c, moved, apart = study(model, x, a, z, steps=steps, lr=share / top, decay=decay, mass=mass)
    assert c.smoothness == pytest.approx(top, rel=1e-6)
    found = parameter_routes(c, loss_bound=100.0)
    applicable = [route for route in found if route.applicable]
    assert not any(route.conditional for route in applicable)  # all constants are exact here
    assert {"convex (Hardt–Recht–Singer)", "smooth, no convexity"} <= {route.route for route in applicable}
    assert strongly_convex_route(c).applicable or (decay == 0 and c.curvature < 1e-8 * top)
    for route in applicable:
        assert moved <= route.distance * SLACK + 1e-12
        assert apart <= route.value * SLACK + 1e-12
    assert smooth_route(c).value * SLACK >= convex_route(c).value


def one_weight(n, decay, steps, lr):
    """n samples, all inputs zero but the replaced one, which is tiny and pulls with gradient −1 on S and +1 on S'."""
    tiny = 1e-4
    model = nn.Linear(1, 1, bias=False).to(F64)
    with torch.no_grad():
        model.weight.zero_()
    x, a = torch.zeros(n, 1, dtype=F64), torch.zeros(n, 1, dtype=F64)
    x[0], a[0] = tiny, 1 / tiny
    return study(model, x, a, Replacement(0, x[0], -a[0]), steps=steps, lr=lr, decay=decay)


def test_no_constant_can_be_spared():
    """Twins that are pulled apart with the full 2L_θ/n all the time attain the convex and the strongly convex distance."""
    c, moved, apart = one_weight(n=7, decay=0.0, steps=20, lr=0.3)
    assert c.lipschitz == pytest.approx(1.0)
    assert moved == pytest.approx(convex_route(c).distance, rel=1e-6)
    assert apart == pytest.approx(convex_route(c).value, rel=1e-6)
    c, moved, apart = one_weight(n=7, decay=0.5, steps=200, lr=0.3)
    for route in (strongly_convex_route(c), kozachkov_route(c)):
        assert moved == pytest.approx(route.distance, rel=1e-6)
        assert apart == pytest.approx(route.value, rel=1e-6)


def test_the_smooth_route_is_its_recursion_and_no_constant_can_be_spared():
    c = replace(LINEAR, lrs=(0.3, 0.1, 0.2), curvature=-4.0, everywhere=False)
    delta = 0.0
    for lr in c.lrs:
        delta = (1 + lr * 4.0) * delta + 2 * lr * c.lipschitz / c.n
    assert smooth_route(c).distance == pytest.approx(delta)
    assert smooth_route(c).value == pytest.approx(delta * c.lipschitz)
    flat = replace(LINEAR, smoothness=0.0, curvature=0.0)
    assert smooth_route(flat).distance == pytest.approx(convex_route(flat).distance)
    assert smooth_route(replace(LINEAR, lrs=(1.0,) * 5000, smoothness=10.0)).value == math.inf


@pytest.mark.parametrize("decay", [0.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_on_a_network_the_routes_are_conditional_or_refused(seed, decay):
    model, x, a, (z,), _ = small_problem(seed, n=4, width=4, twins=1)
    c, moved, apart = study(model, x, a, z, steps=12, lr=0.05, decay=decay)
    assert smooth_route(c).conditional
    for route in parameter_routes(c, loss_bound=10.0):
        if route.applicable:
            assert moved <= route.distance
            assert apart <= route.value
        else:
            assert math.isnan(route.value)
            assert math.isnan(route.distance)
    expected = c.curvature > 0
    assert strongly_convex_route(c).applicable == kozachkov_route(c).applicable == expected
    assert expected == (decay > 0)
    if not expected:
        assert "λ_min of the Hessian comes down to" in kozachkov_route(c).reason


def test_condition_number_and_mass_enter_as_stated():
    assert kozachkov_route(LINEAR, condition=9.0).value == pytest.approx(3 * kozachkov_route(LINEAR).value)
    _, x, a, (z,), _ = small_problem(5, twins=1)
    model = nn.Linear(3, 2, bias=False).to(F64)
    light, _, _ = study(model, x, a, z, steps=10, lr=0.05, decay=0.5)
    heavy, _, _ = study(model, x, a, z, steps=10, lr=0.2, decay=0.5, mass=4.0)  # the same runs
    for route in (convex_route, strongly_convex_route, kozachkov_route, smooth_route):
        assert route(heavy).value == pytest.approx(route(light).value)
        assert route(heavy).distance == pytest.approx(2 * route(light).distance)  # ‖D^½ ·‖


def sgd(seed, n, lrs, decay):
    """Means of δ and of the loss difference over 4000 index streams: one weight, least squares, one sample per step."""
    rng = np.random.default_rng(seed)
    x, a = rng.uniform(-1, 1, n + 1), rng.uniform(-1, 1, n + 1)  # sample n is z', k = 0
    w, v = np.zeros(4000), np.zeros(4000)
    largest = 0.0
    for lr in lrs:
        i = rng.integers(n, size=w.shape)
        j = np.where(i == 0, n, i)
        largest = max(largest, *(np.abs(x * (u[:, None] * x - a)).max() for u in (w, v)))
        w, v = w - lr * (x[i] * (w * x[i] - a[i]) + decay * w), v - lr * (x[j] * (v * x[j] - a[j]) + decay * v)
    largest = max(largest, *(np.abs(x * (u[:, None] * x - a)).max() for u in (w, v)))
    gap = np.abs((w[:, None] * x - a) ** 2 - (v[:, None] * x - a) ** 2) / 2
    c = ParameterConstants(
        n, tuple(lrs), largest, (x**2).max() + decay, (x**2).min() + decay, True, True, sampling="one sample"
    )
    return c, np.abs(w - v).mean(), gap.mean(0).max()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_one_sample_per_step_in_expectation(seed, decay):
    lrs = [0.8 / (t + 1) for t in range(25)]
    c, moved, apart = sgd(seed, 8, lrs, decay)
    routes = [convex_route(c), strongly_convex_route(c), nonconvex_route(c, loss_bound=4.0)]
    for route in routes:
        assert route.applicable, route.reason
        assert "in expectation" in route.what
        assert apart <= route.value * SLACK
        if route is not routes[2]:
            assert moved <= route.distance * SLACK
    for route in (smooth_route(c), kozachkov_route(c)):
        assert not route.applicable
        assert "full batch" in route.reason


def test_the_nonconvex_theorem_is_the_papers_and_scales_with_the_loss():
    c = replace(LINEAR, lrs=(0.5, 0.25, 0.1), curvature=-7.0, sampling="one sample", everywhere=False)
    beta, a, L, n, T = 7.0, 0.5, 3.0, 20, 3
    paper = (1 + 1 / (beta * a)) / (n - 1) * (2 * a * L**2) ** (1 / (beta * a + 1)) * T ** (beta * a / (beta * a + 1))
    assert nonconvex_route(c, loss_bound=1.0).value == pytest.approx(paper)
    s = 5.0  # ℓ → sℓ with steps lr/s is the same run
    scaled = replace(c, lrs=tuple(lr / s for lr in c.lrs), lipschitz=s * L, smoothness=s * 2.0, curvature=-s * 7.0)
    assert nonconvex_route(scaled, loss_bound=s).value == pytest.approx(s * paper)
    assert nonconvex_route(c, loss_bound=1.0).vacuous == ("" if paper < 1 else "not below the range M = 1 of the loss")
    slow = replace(c, lrs=(0.1, 0.1, 0.1))  # a = max t·lr_t = 0.3
    beta_a = 7.0 * 0.3
    expected = (1 + 1 / beta_a) / 19 * (2 * 0.3 * 9) ** (1 / (beta_a + 1)) * 3 ** (beta_a / (beta_a + 1))
    assert nonconvex_route(slow, loss_bound=1.0).value == pytest.approx(expected)


ALL = [convex_route, strongly_convex_route, kozachkov_route, smooth_route, lambda c: nonconvex_route(c, loss_bound=1.0)]


def test_what_is_violated_makes_a_route_not_applicable_and_is_named():
    moving = replace(LINEAR, constant_metric=False)
    for ask in ALL:
        route = ask(moving)
        assert not route.applicable
        assert "one constant metric: G = D + c·JᵀMJ moves" in route.reason
        assert math.isnan(route.value)
        assert route.to_dict()["status"] == "not applicable"
    kinked = replace(LINEAR, smooth=smooth_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    assert all("only piecewise smooth" in ask(kinked).reason for ask in ALL)
    assert "convex: λ_min of the Hessian comes down to -0.1" in convex_route(replace(LINEAR, curvature=-0.1)).reason
    assert convex_route(replace(LINEAR, curvature=-1e-12)).applicable  # rounding of a zero
    for flat in (0.0, -1e-12, 1e-12):
        assert not strongly_convex_route(replace(LINEAR, curvature=flat)).applicable
        assert not kozachkov_route(replace(LINEAR, curvature=flat)).applicable
    assert "every step sees all of S" in nonconvex_route(LINEAR, loss_bound=1.0).reason
    rising = replace(LINEAR, lrs=(0.1, 0.2), sampling="one sample")
    assert "steps do not grow" in nonconvex_route(rising, loss_bound=1.0).reason
    # β = 2, γ = ½: convex bears lr ≤ 1, the contraction lr ≤ 0.8
    for lr, convex, contracting in ((0.79, True, True), (0.81, True, False), (1.01, False, False)):
        stepped = replace(LINEAR, lrs=(lr, 0.1))
        assert convex_route(stepped).applicable == convex
        assert strongly_convex_route(stepped).applicable == contracting
        assert kozachkov_route(stepped).applicable == contracting
        assert smooth_route(stepped).applicable


def test_what_is_undecided_leaves_a_conditional_value():
    for ask in ALL[:4]:
        assert not ask(LINEAR).conditional
        assert ask(LINEAR).reason == ""
        assert ask(LINEAR).to_dict()["status"] == "applicable"
        for c in (replace(LINEAR, both_runs=False), replace(LINEAR, everywhere=False)):
            route = ask(c)
            assert route.conditional
            assert route.value == ask(LINEAR).value
            assert "Lipschitz in θ" in route.reason
            assert route.to_dict()["status"] == "conditional"


def test_bousquet_elisseeff_is_their_theorem_at_twice_the_leave_one_out_stability():
    for eps, n, M, delta in ((0.01, 50, 1.0, 0.05), (0.2, 7, 3.0, 0.5)):
        beta = eps / 2  # replacing is removing twice
        theorem = 2 * beta + (4 * n * beta + M) * math.sqrt(math.log(1 / delta) / (2 * n))
        found = bousquet_elisseeff(eps, n, M, delta=delta, proved=True)
        assert found.value == pytest.approx(theorem)
        assert found.applicable
        assert not found.conditional
        assert bool(found.vacuous) == (theorem >= M)
    measured = bousquet_elisseeff(0.01, 50, 1.0)
    assert measured.conditional
    assert "lower estimate" in measured.reason
    assert "lower estimate" in measured.kind


def test_bousquet_elisseeff_holds_with_its_probability():
    """The mean as a predictor of points in [0, 1] under ℓ = (w − z)²: ε = 2/n proved, M = 1, S drawn 2000 times."""
    rng = np.random.default_rng(0)
    n, p = 40, 0.3
    S = (rng.random((2000, n)) < p).astype(float)
    w = S.mean(1)
    gap = p * (1 - w) ** 2 + (1 - p) * w**2 - ((w[:, None] - S) ** 2).mean(1)
    for delta in (0.5, 0.05):
        bound = bousquet_elisseeff(2 / n, n, 1.0, delta=delta, proved=True).value
        assert (gap > bound).mean() <= delta
    moved = np.abs((w[:, None] - 1 / n - S) ** 2 - (w[:, None] - S) ** 2).max()
    assert moved <= 2 / n


def test_bad_input():
    for bad in ((-0.1, 5, 1.0), (0.1, 0, 1.0), (0.1, 5, 0.0), (math.nan, 5, 1.0)):
        with pytest.raises(ValueError, match="expected ε >= 0"):
            bousquet_elisseeff(*bad)
    with pytest.raises(ValueError, match="expected ε >= 0"):
        bousquet_elisseeff(0.1, 5, 1.0, delta=0.0)
    with pytest.raises(ValueError, match="condition number"):
        kozachkov_route(LINEAR, condition=0.5)
    with pytest.raises(ValueError, match="loss_bound"):
        nonconvex_route(LINEAR, loss_bound=0.0)
