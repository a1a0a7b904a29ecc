"""The action principle against dense matrices: its terms, its balance, its inequality, and who is on it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nt_kernel.metric.model_metric import ModelMetric
from optim import Woodbury
from optim.flow import metric_flow
from optim.steps.risk import risk_at
from stability.action import action_terms
from stability.action_record import record_action
from tests.nt_kernel.cases import F64, mlp
from tests.reference import Dense, definite_metric, singular_metric, trainable

OPTIONS = {
    "default": {},
    "small mass": {"mass": 1e-2},
    "sum": {"scale": "sum", "mass": 0.3},
    "none": {"scale": "none", "mass": 2.0},
    "softmax": {"output_metric": "cross_entropy", "mass": 0.1},
    "definite": {"output_metric": definite_metric, "mass": 0.1},
    "singular": {"output_metric": singular_metric, "mass": 0.1},
    "network": {"blocks": "network", "mass": 0.1},
}


def problem(seed=0, n=5, *, widths=(3, 5, 2)):
    """(model, x, loss of the samples) in float64, smooth."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = mlp(*widths).to(F64)
    x = torch.randn(n, widths[0], generator=draw, dtype=F64)
    a = torch.randn(n, widths[-1], generator=draw, dtype=F64)
    return model, x, lambda y: 0.5 * (y - a).square().sum(1)


def gradient(model, x, loss):
    h = loss(model(x)).mean()
    return h.item(), dict(zip(trainable(model), torch.autograd.grad(h, list(model.parameters())), strict=True))


def dense_terms(model, x, loss, velocity, **options):
    """(T, V, ∇hᵀθ̇, mismatch) with G as matrices, block after block."""
    dense = Dense(model, x, **options)
    _, g = gradient(model, x, loss)
    flat = lambda u, names: torch.cat([u[n].flatten() for n in names])  # noqa: E731
    T = V = power = mismatch = 0.0
    for b, names in dense.blocks.items():
        G, u, p = dense.G[b], flat(velocity, names), flat(g, names)
        v = torch.linalg.solve(G, p)
        T, V, power = T + u @ G @ u / 2, V + p @ v / 2, power + p @ u
        mismatch = mismatch + (u + v) @ G @ (u + v) / 2
    return [t.item() for t in (T, V, power, mismatch)]


def drawn(model, seed, size=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(p.shape, generator=draw, dtype=F64) for n, p in trainable(model).items()}


def terms_of(model, x, loss, velocity, params=None, **options):
    _, r = risk_at(model, params, x, loss)
    return action_terms(ModelMetric(model, x, params=params, **options), velocity, r)


def optimizer(name, model, lr, **options):
    made = {
        "woodbury": lambda: Woodbury(model, lr=lr, check_step=False, **options),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=lr),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=lr),
    }
    return made[name]()


def train(model, x, loss, opt, steps, **options):
    with record_action(model, x, loss, optimizer=opt, **options) as action:
        for _ in range(steps):
            opt.zero_grad()
            loss(model(x)).mean().backward()
            opt.step()
    return action


@pytest.mark.parametrize("name", OPTIONS)
def test_terms_are_the_dense_ones(name):
    model, x, loss = problem()
    velocity, options = drawn(model, 3), OPTIONS[name]
    found = terms_of(model, x, loss, velocity, **options)
    T, V, power, mismatch = dense_terms(model, x, loss, velocity, **options)
    near = lambda value: pytest.approx(value, rel=1e-10)  # noqa: E731
    assert found.kinetic.item() == near(T)
    assert found.potential.item() == near(V)
    assert found.power.item() == near(power)
    assert found.mismatch.item() == near(mismatch)
    assert found.misdirection.item() == near(2 * (T * V) ** 0.5 + power)
    assert found.hamiltonian.item() == near(T - V)
    momentum = ModelMetric(model, x, **options).apply(velocity)  # ½πᵀG⁻¹π of the momentum π = Gθ̇
    dual = Dense(model, x, **options).solve(momentum)
    assert sum((momentum[n] * dual[n]).sum() for n in dual).item() / 2 == near(T)


@pytest.mark.parametrize("name", ["sgd", "adam", "woodbury", "momentum"])
def test_a_record_is_what_a_dense_loop_finds(name):
    options = {"mass": 0.2, "output_metric": definite_metric}
    twin, x, loss = problem()
    opt, expected = optimizer(name, twin, 0.05), []
    for _ in range(4):
        start, h = deepcopy(twin), gradient(twin, x, loss)[0]
        opt.zero_grad()
        loss(twin(x)).mean().backward()
        opt.step()
        velocity = {n: (p - start.get_parameter(n)).detach() / 0.05 for n, p in twin.named_parameters()}
        expected.append([h, *dense_terms(start, x, loss, velocity, **options)])  # G at the start of the step
    model, x, loss = problem()
    opt = optimizer(name, model, 0.05)
    action = train(model, x, loss, opt, 4, **options)
    found = torch.stack([action.steps[k] for k in ("h", "kinetic", "potential", "power", "mismatch")], 1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-12)
    T, V, power, mismatch = torch.tensor(expected, dtype=F64)[:, 1:].T
    h = torch.tensor([*(row[0] for row in expected), gradient(twin, x, loss)[0]], dtype=F64)
    torch.testing.assert_close(action.h, h, rtol=1e-12, atol=0)
    assert action.action == pytest.approx(0.05 * (T + V).sum().item(), rel=1e-9)
    assert action.length == pytest.approx(0.05 * (4 * T * V).sqrt().sum().item(), rel=1e-9)
    assert action.defect == pytest.approx(0.05 * mismatch.sum().item(), rel=1e-7, abs=1e-12)
    assert action.action_gap == pytest.approx(action.action - abs(h[0] - h[-1]).item(), rel=1e-9)
    assert action.scale_free_gap == pytest.approx(action.length - abs(h[0] - h[-1]).item(), rel=1e-9)
    assert action.descent == pytest.approx((h[0] - h[-1]).item(), rel=1e-12)
    torch.testing.assert_close(action.steps["curvature"], h.diff() - 0.05 * power, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(action.steps["alignment"], -power / (4 * T * V).sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.7])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_metric_step_is_on_the_principle_at_any_lr(name, lr):
    """Hamiltonian and defect vanish to rounding, of θ in Δθ/lr above all, and the alignment is 1."""
    model, x, loss = problem()
    options = OPTIONS[name]
    stiffness = Dense(model, x, **options).stiffness()
    action = train(model, x, loss, optimizer("woodbury", model, lr, **options), 4, **options)
    rounding = 1e-13 * max(1, 0.1 / lr) * max(stiffness, Dense(model, x, **options).stiffness())
    assert action.steps["hamiltonian_relative"].abs().max() <= rounding
    assert (action.steps["defect"] <= rounding**2 * action.steps["action"]).all()
    assert (action.steps["alignment"] - 1).abs().max() <= 1e-13
    assert (action.steps["speed"] <= rounding**2 * action.steps["action"]).all()


def test_gradient_descent_is_the_metric_step_of_mass_one():
    model, x, loss = problem()
    action = train(model, x, loss, optimizer("sgd", model, 0.1), 4, scale="none")
    assert action.steps["hamiltonian_relative"].abs().max() <= 1e-13
    assert action.defect <= 1e-25


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_others_are_off_it(name):
    model, x, loss = problem()
    action = train(model, x, loss, optimizer(name, model, 0.02), 5, mass=0.1)
    assert (action.steps["defect"] > 1e-6 * action.steps["action"]).all()
    assert (action.steps["alignment"] < 1 - 1e-4).all()


def test_the_hamiltonian_tests_the_speed_alone():
    """A velocity turned about −G⁻¹∇h keeps its G-norm: T = V, and the defect says what the Hamiltonian does not."""
    model, x, loss = problem()
    _, r = risk_at(model, None, x, loss)
    metric = ModelMetric(model, x)
    v, u = metric.direction(r), drawn(model, 1)
    share = (metric.root(u) @ metric.root(v)) / metric.squared_norm(v)
    across = {n: u[n] - share * v[n] for n in u}
    scale = (metric.squared_norm(v) / metric.squared_norm(across)).sqrt()
    turned = {n: -0.6 * v[n] + 0.8 * scale * across[n] for n in v}
    terms = action_terms(metric, turned, r)
    assert terms.hamiltonian.abs().item() <= 1e-12 * terms.kinetic.item()
    assert terms.mismatch.item() == pytest.approx(0.8 * terms.potential.item(), rel=1e-9)  # ½(0.4² + 0.8²)/½ of 2V/2


@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 3), name=st.sampled_from(sorted(OPTIONS)))
def test_what_holds_for_every_step(seed, size, name):
    """S ≥ Σ‖Δθ‖_G‖∇h‖_{G⁻¹} ≥ |Σ∇hᵀΔθ|, and the balance, for steps of no optimizer at all."""
    model, x, loss = problem(seed % 7)
    with record_action(model, x, loss, **OPTIONS[name]) as action:
        for k, lr in enumerate((0.1, 2.0, 0.5)):
            with torch.no_grad():
                for n, move in drawn(model, seed + k, size).items():
                    model.get_parameter(n).add_(move)
            action.mark(lr)
    steps, slack = action.steps, 1e-9 * action.action
    torch.testing.assert_close(steps["action"], steps["length"] + steps["speed"], rtol=1e-9, atol=0)
    torch.testing.assert_close(steps["defect"], steps["lr"] * steps["mismatch"], rtol=1e-9, atol=slack)
    rest = steps["speed"] + steps["direction"] + steps["curvature"]
    torch.testing.assert_close(steps["action"], steps["h"] - steps["h_next"] + rest, rtol=1e-9, atol=slack)
    assert min(steps[k].min().item() for k in ("speed", "direction", "defect", "kinetic", "potential")) >= 0
    linear = abs((steps["lr"] * steps["power"]).sum().item())
    assert action.action >= action.length - slack >= linear - 2 * slack


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "woodbury"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_on_convex_risks_the_discrete_gaps_have_a_sign(loss, name):
    """h convex in θ (a model linear in θ): curvature ≥ 0, so S ≥ length ≥ h(start) − h(end)."""
    torch.manual_seed(0)
    model, x, labels = nn.Linear(3, 2).to(F64), torch.randn(6, 3, dtype=F64), torch.tensor([0, 1, 1, 0, 1, 0])
    risk = (
        (lambda y: 0.5 * (y - F.one_hot(labels)).square().sum(1))
        if loss == "squared"
        else (lambda y: F.cross_entropy(y, labels, reduction="none"))
    )
    for lr in (0.01, 0.3):
        action = train(model, x, risk, optimizer(name, model, lr), 8, mass=0.5)
        assert (action.steps["curvature"] >= -1e-15).all()
        assert action.action + 1e-14 >= action.length >= action.descent - 1e-14
        if action.descent > 0:
            assert action.action_gap >= action.scale_free_gap >= -1e-14


@pytest.mark.parametrize("options", [{}, {"mass": 0.05}, {"output_metric": definite_metric}])
def test_the_action_gap_of_euler_is_first_order_in_the_step(options):
    counts, gaps = [16, 32, 64], []
    for count in counts:
        model, x, loss = problem()
        action = train(model, x, loss, optimizer("woodbury", model, 1 / count, **options), count, **options)
        gaps.append(action.action_gap)
        assert action.action_gap == pytest.approx(action.total("curvature"), rel=1e-6)  # all that is left of it
    slope = np.polyfit(np.log(counts), np.log(np.abs(gaps)), 1)[0]
    assert -1.1 <= slope <= -0.9
    assert abs(gaps[-1]) > 1e-5  # above rounding: there was something to fit


def smooth_path(seed, size):
    """θ(s) = θ_0 + Σ_k c_k sin(k s + φ_k) and its derivative, by name."""
    model, x, loss = problem(seed % 5)
    waves = [(k, drawn(model, 10 * seed + k, size / k), 0.7 * seed + k) for k in (1, 2, 3)]

    def at(s):
        return {n: p + sum(c[n] * np.sin(k * s + f) for k, c, f in waves) for n, p in trainable(model).items()}

    def velocity(s):
        return {n: sum(k * c[n] * np.cos(k * s + f) for k, c, f in waves) for n in trainable(model)}

    return model, x, loss, at, velocity


@given(seed=st.integers(0, 1000), size=st.floats(1e-3, 1), name=st.sampled_from(["default", "definite", "network"]))
def test_the_continuous_inequality_along_any_path(seed, size, name):
    """∫(T + V)ds ≥ |h(1) − h(0)|, by Gauss-Legendre quadrature; the power integrates to h(1) − h(0)."""
    model, x, loss, at, velocity = smooth_path(seed, size)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    S = work = 0.0
    for s, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        terms = terms_of(model, x, loss, velocity(s), params=at(s), **OPTIONS[name])
        S += w * (terms.kinetic + terms.potential).item()
        work += w * terms.power.item()
    change = (risk_at(model, at(1.0), x, loss)[0] - risk_at(model, at(0.0), x, loss)[0]).item()
    assert work == pytest.approx(change, abs=1e-6 * S)  # the quadrature is fine enough
    assert abs(change) <= S + 1e-6 * S


@pytest.mark.parametrize("name", ["default", "none", "definite"])
def test_the_flow_has_no_action_to_spare(name):
    """Equality on θ̇ = −G⁻¹∇h: dense action of the solver's path, by Simpson's rule, and what the solver integrated."""
    model, x, loss = problem()
    times = np.linspace(0, 1.5, 17)
    flow = metric_flow(model, None, x, loss, times, **OPTIONS[name])
    torch.testing.assert_close(flow.action, flow.h[0] - flow.h, rtol=0, atol=1e-9)
    rates, copy = [], mlp(3, 5, 2).to(F64)
    for params in flow.path:
        copy.load_state_dict(params)
        _, g = gradient(copy, x, loss)
        natural = Dense(copy, x, **OPTIONS[name]).solve(g)
        T, V, _, mismatch = dense_terms(copy, x, loss, {n: -v for n, v in natural.items()}, **OPTIONS[name])
        assert mismatch <= 1e-20
        rates.append(T + V)
    simpson = np.array([1, *[4, 2] * 7, 4, 1]) * (times[1] - times[0]) / 3
    assert simpson @ rates == pytest.approx(flow.action[-1].item(), rel=1e-4)


def test_another_eta_is_another_unit_of_time():
    """S_η = Σ lr(T + η²V) ≥ η|Σ∇hᵀΔθ|, by marks of η·lr."""
    model, x, loss = problem()
    eta, lr, move = 3.0, 0.2, drawn(problem()[0], 5, 0.1)
    T, V, *_ = dense_terms(model, x, loss, {n: m / lr for n, m in move.items()})
    with record_action(model, x, loss) as action:
        for n, m in move.items():
            model.get_parameter(n).data.add_(m)
        action.mark(eta * lr)
    assert eta * action.action == pytest.approx(lr * (T + eta**2 * V), rel=1e-9)
