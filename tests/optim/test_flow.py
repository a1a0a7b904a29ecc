"""Continuous time against closed forms, and Euler's method against continuous time."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from nt_kernel import NumericalError
from optim import Woodbury, gradient_flow, woodbury_step
from optim.flow import METHODS, metric_flow, solve_flow
from tests.nt_kernel.cases import F64, mlp
from tests.reference import Dense, definite_metric, run, trainable
from tests.thinned import thinned

MODELS = {"identity": "identity", "definite": lambda y: 2 * torch.eye(2, dtype=F64).expand(*y.shape, 2)}


def velocity(model, x, a, **options):
    """θ̇ = −G⁻¹∇h for K stacked networks: the unit step of the pure function."""
    gradient = lambda y: (y - a) / a.shape[-2]  # noqa: E731

    def v(params):
        stepped = woodbury_step(model, params, x, gradient, lr=1.0, **options)
        return {n: stepped[n] - p for n, p in params.items()}

    return v


@pytest.mark.parametrize("metric", MODELS)
@pytest.mark.parametrize("scale", ["mean", "sum", "none"])
def test_a_linear_model_decays_as_the_matrix_exponential(scale, metric):
    """For a model linear in θ, G and H are constants of the motion: y(t) − a = exp(−Ht)(y(0) − a)."""
    torch.manual_seed(0)
    K, options = 2, {"scale": scale, "mass": 0.3, "output_metric": MODELS[metric]}
    model, x = nn.Linear(3, 2).to(F64), torch.randn(K, 4, 3, dtype=F64)
    params = {n: torch.stack([p.detach() * (k + 1) for k in range(K)]) for n, p in model.named_parameters()}
    a = torch.randn(K, 4, 2, dtype=F64)
    times = [0.0, 0.3, 1.0, 4.0]
    path = gradient_flow(velocity(model, x, a, **options), params, times)
    assert len(path) == len(times)
    for k in range(K):
        H = Dense(model, x[k], **options).H()
        start = (run(model, {n: p[k] for n, p in params.items()}, x[k]) - a[k]).flatten()
        for t, at in zip(times, path, strict=True):
            found = (run(model, {n: p[k] for n, p in at.items()}, x[k]) - a[k]).flatten()
            torch.testing.assert_close(found, torch.linalg.matrix_exp(-t * H) @ start, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "options", thinned([{"output_metric": definite_metric}, {}, {"scale": "none"}, {"mass": 0.05}], 3)
)
def test_euler_converges_to_the_flow_at_first_order(options):
    torch.manual_seed(0)
    model, x, a = mlp(3, 5, 2).to(F64), torch.randn(1, 4, 3, dtype=F64), torch.randn(1, 4, 2, dtype=F64)
    start = {n: p.detach()[None] for n, p in model.named_parameters()}
    end = gradient_flow(velocity(model, x, a, **options), start, [0.0, 1.0])[-1]
    counts, errors = [32, 64, 128], []
    for count in counts:
        params = start
        for _ in range(count):
            params = woodbury_step(model, params, x, lambda y: (y - a) / 4, lr=1 / count, **options)
        errors.append(sum((params[n] - end[n]).square().sum() for n in end).sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)
    # Richardson: two Euler runs, extrapolated, are much closer than either.
    assert errors[-1] > 1e-5


def test_the_rotation():
    """ẋ = ωy, ẏ = −ωx, over three turns; parameters of two shapes, in the order they were given."""
    turn = lambda p: {"b": -2 * p["a"][0], "a": 2 * p["b"][None]}  # noqa: E731
    start = {"b": torch.tensor([0.0], dtype=F64), "a": torch.tensor([[1.0]], dtype=F64)}
    times = np.linspace(0, 3 * np.pi, 5)
    for t, at in zip(times, gradient_flow(turn, start, times), strict=True):
        assert list(at) == ["b", "a"]
        assert at["a"].shape == (1, 1)
        assert at["a"].item() == pytest.approx(np.cos(2 * t), abs=1e-8)
        assert at["b"].item() == pytest.approx(-np.sin(2 * t), abs=1e-8)


def test_dtype_comes_back_and_the_start_is_untouched():
    start = {"w": torch.ones(2, dtype=torch.float32)}
    path = gradient_flow(lambda p: {"w": -p["w"]}, start, [0.0, 1.0], rtol=1e-6, atol=1e-8)
    assert path[-1]["w"].dtype == torch.float32
    assert torch.equal(path[0]["w"], torch.ones(2))
    assert torch.equal(start["w"], torch.ones(2))


def test_a_solution_that_escapes_is_a_numerical_error():
    with pytest.raises(NumericalError, match="gradient flow: the flow could not be integrated"):
        gradient_flow(lambda p: {"w": p["w"] ** 2}, {"w": torch.ones(1, dtype=F64)}, [0.0, 2.0])


def smooth_problem(seed=0, widths=(3, 5, 2), n=4):
    """(model, x, a, loss of the samples), float64."""
    torch.manual_seed(seed)
    model, x = mlp(*widths).to(F64), torch.randn(n, widths[0], dtype=F64)
    a = torch.randn(n, widths[-1], dtype=F64)
    return model, x, a, lambda y: 0.5 * (y - a).square().sum(1)


FLOWS = {
    "default": {},
    "none": {"scale": "none", "mass": 0.5},
    "small mass": {"mass": 0.05},
    "definite": {"output_metric": definite_metric},
    "network": {"blocks": "network", "mass": 0.3},
    "mean-jacobian": {"scale": "mean-jacobian", "mass": 0.3},
}


@pytest.mark.parametrize("name", thinned(FLOWS, 3))
def test_woodbury_steps_converge_to_the_metric_flow_at_first_order(name):
    model, x, _, loss = smooth_problem()
    start = {n: p.clone() for n, p in trainable(model).items()}
    flow = metric_flow(model, None, x, loss, [0.0, 0.5, 1.0], **FLOWS[name])
    counts, errors = [16, 32, 64], []
    for count in counts:
        model.load_state_dict(start)
        opt = Woodbury(model, lr=1 / count, check_step=False, **FLOWS[name])
        for _ in range(count):
            opt.zero_grad()
            loss(model(x)).mean().backward()
            opt.step()
        errors.append(sum((p - flow.path[-1][n]).square().sum() for n, p in trainable(model).items()).sqrt().item())
        opt.close()
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.1 <= slope <= -0.9
    assert errors[-1] > 1e-5


@pytest.mark.parametrize(("metric", "method"), thinned(itertools.product(MODELS, METHODS), 5))
def test_every_method_finds_the_matrix_exponential(metric, method):
    torch.manual_seed(0)
    options = {"mass": 0.3, "output_metric": MODELS[metric]}
    model, x, a = nn.Sequential(nn.Tanh(), nn.Linear(3, 2)).to(F64), torch.randn(4, 3, dtype=F64), torch.randn(4, 2)
    H, r = Dense(model, x, **options).H(), (model(x) - a).detach().flatten()
    times = [0.0, 0.4, 2.0]
    tolerance = 1e-6 if method in ("RK23", "BDF", "Radau") else 1e-9
    flow = metric_flow(
        model, None, x, lambda y: 0.5 * (y - a).square().sum(1), times, method=method, rtol=tolerance, atol=tolerance,
        **options,
    )  # fmt: skip
    for t, params, h in zip(times, flow.path, flow.h, strict=True):
        expected = torch.linalg.matrix_exp(-t * H) @ r
        torch.testing.assert_close((run(model, params, x) - a).flatten(), expected, rtol=0, atol=300 * tolerance)
        assert h.item() == pytest.approx(expected.square().sum().item() / 8, abs=300 * tolerance)
    assert flow.method == method
    assert flow.evaluations > flow.steps > 0
    assert (flow.jacobians > 0) == (method in ("BDF", "Radau")) or method == "LSODA"


@pytest.mark.parametrize("name", thinned(FLOWS, 3))
def test_the_risk_falls_at_the_rate_of_the_squared_gradient(name):
    """dh/dt = −∇hᵀG⁻¹∇h by central differences of h along the path, and against the dense number."""
    model, x, _, loss = smooth_problem()
    step = 1e-4
    times = [0.0, 0.3 - step, 0.3, 0.3 + step, 0.9 - step, 0.9, 0.9 + step]
    flow = metric_flow(model, None, x, loss, times, rtol=1e-11, atol=1e-13, **FLOWS[name])
    for k in (2, 5):
        slope = (flow.h[k + 1] - flow.h[k - 1]) / (2 * step)
        assert slope.item() == pytest.approx(-flow.dissipation[k].item(), rel=1e-6)
    torch.testing.assert_close(flow.action, flow.h[0] - flow.h, rtol=0, atol=1e-10)
    assert (flow.h.diff() < 0).all()
    if name != "mean-jacobian":
        model.load_state_dict(flow.path[2])
        grads = dict(
            zip(trainable(model), torch.autograd.grad(loss(model(x)).mean(), [*model.parameters()]), strict=True)
        )
        natural = Dense(model, x, **FLOWS[name]).solve(grads)
        dense = sum((grads[n] * natural[n]).sum() for n in grads).item()
        assert flow.dissipation[2].item() == pytest.approx(dense, rel=1e-10)


def test_it_starts_where_it_is_told_and_moves_no_model():
    model, x, _, loss = smooth_problem()
    before, other = trainable(model), {n: p + 0.1 for n, p in trainable(model).items()}
    kept = {n: p.clone() for n, p in before.items()}
    flow = metric_flow(model, other, x, loss, [1.0, 1.5])
    assert all(torch.equal(flow.path[0][n], other[n]) for n in other)
    assert list(flow.path[1]) == list(before)
    assert all(torch.equal(p, kept[n]) for n, p in trainable(model).items())
    assert flow.times == [1.0, 1.5]
    assert flow.action[0] == 0
    moved = metric_flow(model, other, x, loss, [0.0, 0.5])  # the flow does not know what time it is
    for n, p in moved.path[1].items():
        torch.testing.assert_close(p, flow.path[1][n], rtol=1e-7, atol=1e-9)


def test_an_implicit_method_needs_fewer_steps_on_a_stiff_flow():
    """Rates 1 and 1000: explicit steps are held down by the fast one long after it is over."""
    rates = torch.tensor([1.0, 1e3], dtype=F64)
    decay = lambda p: {"w": -rates * p["w"]}  # noqa: E731
    start = {"w": torch.ones(2, dtype=F64)}
    found = {m: solve_flow(decay, start, [0.0, 1.0], method=m, rtol=1e-5, atol=1e-8) for m in METHODS}
    for solution in found.values():
        assert solution.path[-1]["w"][0].item() == pytest.approx(np.exp(-1), rel=1e-4)
        assert solution.path[-1]["w"][1].abs().item() < 1e-5
    for implicit in ("LSODA", "Radau", "BDF"):
        assert found[implicit].steps < found["RK45"].steps / 2
        assert found[implicit].jacobians >= 1
    assert found["DOP853"].jacobians == found["RK45"].jacobians == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_is_counted_as_it_is(method):
    calls = []

    def decay(p):
        calls.append(1)
        return {"w": -p["w"]}

    found = solve_flow(decay, {"w": torch.ones(3, dtype=F64)}, [0.0, 0.5, 2.0], method=method, rtol=1e-5, atol=1e-8)
    assert len(calls) == found.evaluations
    reference = solve_ivp(lambda _, y: -y, (0, 2), np.ones(3), method=method, rtol=1e-5, atol=1e-8)
    assert found.steps == len(reference.t) - 1
    assert found.evaluations >= reference.nfev


def test_many_times_within_one_step_are_all_there():
    times = np.linspace(0, 1, 200)
    found = solve_flow(lambda p: {"w": -p["w"]}, {"w": torch.ones(1, dtype=F64)}, times)
    assert found.steps < 60
    values = [state["w"].item() for state in found.path]
    np.testing.assert_allclose(values, np.exp(-times), rtol=1e-7)


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ([0.0], {}, "two or more finite numbers in ascending order"),
        ([1.0, 0.0], {}, "two or more finite numbers in ascending order"),
        ([0.0, 0.5, 0.5], {}, "two or more finite numbers in ascending order"),
        ([0.0, np.inf], {}, "two or more finite numbers in ascending order"),
        ([0.0, 1.0], {"method": "RK46"}, "unknown method 'RK46'.*did you mean 'RK45'"),
        ([0.0, 1.0], {"rtol": 0}, "rtol must be positive and finite, got 0"),
        ([0.0, 1.0], {"atol": -1e-9}, "atol must be positive and finite, got -1e-09"),
    ],
)
def test_bad_arguments(times, options, message):
    with pytest.raises(ValueError, match=message):
        solve_flow(lambda p: p, {"w": torch.ones(1, dtype=F64)}, times, **options)


def test_float32_has_no_nine_digits():
    model, x, a = mlp(3, 4, 2), torch.randn(4, 3), torch.randn(4, 2)
    loss = lambda y: 0.5 * (y - a).square().sum(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"parameter '0.weight' is float32.*write model.double\(\), or rtol=1e-5"):
        metric_flow(model, None, x, loss, [0.0, 1.0])
    flow = metric_flow(model, None, x, loss, [0.0, 1.0], rtol=1e-5, atol=1e-7)
    assert flow.path[1]["0.weight"].dtype == torch.float32
    assert flow.action[-1].item() == pytest.approx((flow.h[0] - flow.h[-1]).item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_velocity_that_is_not_finite_stops_the_solver(method):
    start = {"w": torch.ones(1, dtype=F64)}
    with pytest.raises(NumericalError, match="gradient flow: the velocity is not finite at the start"):
        solve_flow(lambda p: {"w": p["w"] * torch.nan}, start, [0.0, 1.0], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_nor_does_one_that_ceases_to_be(method):
    start = {"w": torch.ones(1, dtype=F64)}
    with pytest.raises(NumericalError, match=r"gradient flow: the (flow could not|velocity is not)"):
        solve_flow(lambda p: {"w": torch.where(p["w"] < 0.5, torch.nan, -p["w"])}, start, [0.0, 2.0], method=method)


def test_errors_of_the_velocity_are_its_own():
    def broken(p):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        solve_flow(broken, {"w": torch.ones(1, dtype=F64)}, [0.0, 1.0], method="BDF")
