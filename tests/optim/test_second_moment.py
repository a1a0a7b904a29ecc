"""The running second-moment mass: Adam without a metric, dense diagonals with one, and what is kept of it."""

import copy

import pytest
import torch

from optim import Woodbury
from optim.options.second_moment import SecondMomentMass
from tests.nt_kernel.cases import F64
from tests.optim.problems import problem
from tests.reference import Dense, distance, trainable


def step(model, x, loss, opt):
    opt.zero_grad()
    loss(model(x)).backward()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    opt.step()
    return {n: before[n] - p for n, p in trainable(model).items()}


@pytest.mark.parametrize(("beta2", "eps", "scale"), [(0.999, 1e-8, 1.0), (0.9, 1e-3, 2.0), (0.0, 0.1, 0.5)])
def test_without_a_metric_it_is_adam_without_first_moment(beta2, eps, scale):
    model, x, loss = problem()
    other = copy.deepcopy(model)
    ours = Woodbury(model, 0.01, mass=SecondMomentMass(beta2, eps, scale), scale="none", check_step=False)
    theirs = torch.optim.Adam(other.parameters(), lr=0.01 / scale, betas=(0.0, beta2), eps=eps)
    for _ in range(8):
        found, expected = step(model, x, loss, ours), step(other, x, loss, theirs)
        assert distance(found, expected) < 1e-13
    counts = {held["step"] for held in ours.state.values()}
    assert counts == {8}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("options", [{}, {"scale": "sum"}, {"blocks": "network"}, {"solver": "cg"}, {"damping": 3.0}])
def test_with_a_metric_it_is_a_dense_diagonal(options):
    """G = D_t + c·JᵀJ with D_t from the gradients so far, this step's included."""
    model, x, loss = problem()
    opt = Woodbury(model, 0.05, mass=SecondMomentMass(0.7, 0.05, 1.5), check_step=False, **options)
    v = {n: torch.zeros_like(p) for n, p in trainable(model).items()}
    damping = options.get("damping", 1.0)
    dense_options = {key: value for key, value in options.items() if key in ("scale", "blocks")}
    for t in range(1, 5):
        model.zero_grad()
        loss(model(x)).backward()
        g = {n: p.grad.clone() for n, p in model.named_parameters()}
        v = {n: 0.7 * v[n] + 0.3 * g[n] ** 2 for n in v}
        D = {n: damping * 1.5 * ((v[n] / (1 - 0.7**t)).sqrt() + 0.05) for n in v}
        dense = Dense(model, x, **dense_options)
        for block, names in dense.blocks.items():
            dense.G[block] += torch.diag(torch.cat([(D[n] - 1).flatten() for n in names]))
        expected = {n: 0.05 * d for n, d in dense.solve(g).items()}
        assert distance(step(model, x, loss, opt), expected) < 1e-11


def test_gradients_as_they_stand_count():
    model, x, loss = problem()
    opt = Woodbury(model, 0.01, mass=SecondMomentMass(), scale="none")
    loss(model(x)).backward()
    for p in model.parameters():
        p.grad.mul_(100)
    opt.step()
    torch.testing.assert_close(
        opt.state[model[0].weight]["exp_avg_sq"], 1e-3 * model[0].weight.grad ** 2, rtol=1e-12, atol=0
    )


def test_it_resumes_bit_for_bit():
    model, x, loss = problem()
    make = lambda m: Woodbury(m, 0.05, mass=SecondMomentMass(0.9), momentum=0.5, check_step=False)  # noqa: E731
    opt = make(model)
    for _ in range(3):
        step(model, x, loss, opt)
    other = copy.deepcopy(model)
    second = make(other)
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        a, b = step(model, x, loss, opt), step(other, x, loss, second)
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_of_one_group_only():
    model, x, loss = problem()
    opt = Woodbury(
        model, 0.05, mass=0.5, check_step=False, groups=[{"layers": ["2"], "mass": SecondMomentMass(0.5, 0.1)}]
    )
    everywhere, nowhere = copy.deepcopy(model), copy.deepcopy(model)
    found = step(model, x, loss, opt)
    with_it = step(everywhere, x, loss, Woodbury(everywhere, 0.05, mass=SecondMomentMass(0.5, 0.1), check_step=False))
    without = step(nowhere, x, loss, Woodbury(nowhere, 0.05, mass=0.5, check_step=False))
    assert all(torch.equal(found[n], (with_it if n[0] == "2" else without)[n]) for n in found)
    assert {id(p) for p in opt.state} == {id(p) for p in model[2].parameters()}


def test_a_parameter_without_gradient_keeps_its_average():
    model, x, loss = problem()
    opt = Woodbury(model, 0.05, mass=SecondMomentMass(0.9), check_step=False)
    step(model, x, loss, opt)
    kept = copy.deepcopy(opt.state[model[2].weight])
    loss(model(x)).backward()
    model[2].weight.grad = None
    opt.step()
    held = opt.state[model[2].weight]
    assert torch.equal(held["exp_avg_sq"], kept["exp_avg_sq"])
    assert (held["step"], opt.state[model[2].bias]["step"]) == (1, 2)


def test_a_parameter_that_never_had_a_gradient_weighs_epsilon():
    model, x, loss = problem()
    opt = Woodbury(model, 0.05, mass=SecondMomentMass(0.0, 0.1, 2.0), check_step=False)
    loss(model(x)).backward()
    g = {n: p.grad.clone() for n, p in model.named_parameters()} | {"2.weight": torch.zeros_like(model[2].weight)}
    model[2].weight.grad = None
    dense = Dense(model, x)
    D = {n: 2 * (t.abs() + 0.1) for n, t in g.items()}
    for block, names in dense.blocks.items():
        dense.G[block] += torch.diag(torch.cat([(D[n] - 1).flatten() for n in names]))
    expected, before = dense.solve(g), {n: p.clone() for n, p in trainable(model).items()}
    opt.step()
    for n, p in trainable(model).items():
        wanted = torch.zeros_like(p) if n == "2.weight" else 0.05 * expected[n]
        torch.testing.assert_close(before[n] - p, wanted, rtol=0, atol=1e-12)
    assert not opt.state.get(model[2].weight)


def test_a_step_that_fails_leaves_the_averages():
    model, x, loss = problem()
    opt = Woodbury(model, 0.05, mass=SecondMomentMass())
    step(model, x, loss, opt)
    kept = copy.deepcopy(opt.state_dict()["state"])
    opt.param_groups[0]["lr"] = 1e6
    with pytest.raises(ValueError, match="is too large"):
        step(model, x, loss, opt)
    found = opt.state_dict()["state"]
    assert all(
        torch.equal(found[i]["exp_avg_sq"], held["exp_avg_sq"]) and found[i]["step"] == 1 for i, held in kept.items()
    )


def test_the_average_follows_the_type_of_its_parameter():
    model, x, loss = problem()
    single = copy.deepcopy(model).float()
    opt = Woodbury(single, 0.05, mass=SecondMomentMass(), check_step=False)
    step(single, x.float(), lambda y: loss(y.double()), opt)
    assert all(held["exp_avg_sq"].dtype == torch.float32 for held in opt.state.values())
    single.double()
    step(single, x, loss, opt)
    assert all(held["exp_avg_sq"].dtype == F64 for held in opt.state.values())


BAD = [
    ({"beta2": 1.0}, ValueError, r"beta2 of a SecondMomentMass must be in \[0, 1\), got 1\.0"),
    ({"beta2": float("nan")}, ValueError, "got nan"),
    ({"beta2": "x"}, TypeError, "beta2 of a SecondMomentMass must be a number, got 'x'"),
    ({"eps": 0.0}, ValueError, r"eps of a SecondMomentMass must be positive and finite, got 0\.0"),
    ({"scale": float("inf")}, ValueError, "scale of a SecondMomentMass must be positive and finite, got inf"),
    ({"scale": True}, TypeError, "got True"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        SecondMomentMass(**options)
