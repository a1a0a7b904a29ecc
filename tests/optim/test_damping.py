"""Damping: fixed, scheduled, the rules of a trust region; predicted decreases against the dense Gauss–Newton matrix."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel import layer_factors
from nt_kernel.factors import join_factors
from nt_kernel.mass import RowColumnMass
from nt_kernel.metric.output_metric import resolve_output_metric
from optim import Woodbury
from optim.options.damping import LevenbergMarquardt, damping_at, decrease_ratio, predicted_decrease
from tests.nt_kernel.cases import F64, mlp
from tests.optim.problems import closure_of, problem
from tests.reference import Dense, definite_metric, distance, singular_metric, trainable

MASSES = {
    "number": 0.3,
    "list": [0.1, 0.2, 0.3],
    "tensor": {"0.weight": torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.5},
    "rows and columns": {
        "0.weight": RowColumnMass(torch.linspace(1, 2, 5, dtype=F64), torch.linspace(1, 3, 3, dtype=F64))
    },
}


def step(model, x, loss, opt):
    closure_of(model, opt, x, loss)()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    opt.step()
    return {n: before[n] - p for n, p in trainable(model).items()}


def times(mass, factor):
    if isinstance(mass, dict):
        known = {n: times(m, factor) for n, m in mass.items()}
        return {"0.bias": factor, "2": factor, "4": factor} | known
    if isinstance(mass, list):
        return [m * factor for m in mass]
    return RowColumnMass(mass.row, mass.column * factor) if isinstance(mass, RowColumnMass) else mass * factor


@pytest.mark.parametrize("mass", MASSES)
def test_damping_multiplies_every_mass(mass):
    model, x, loss = problem()
    other = copy.deepcopy(model)
    found = step(model, x, loss, Woodbury(model, 0.1, mass=MASSES[mass], damping=3.0))
    expected = step(other, x, loss, Woodbury(other, 0.1, mass=times(MASSES[mass], 3.0)))
    assert distance(found, expected) < 1e-14


def test_a_schedule_is_read_before_every_step_and_resumes():
    model, x, loss = problem()
    schedule = lambda t: 4.0 / (1 + t)  # noqa: E731
    opt = Woodbury(model, 0.1, mass=0.3, damping=schedule)
    other, second = None, None
    for t in range(5):
        dense = Dense(model, x, mass=0.3 * schedule(t))
        found = step(model, x, loss, opt)
        solved = dense.solve({n: p.grad for n, p in model.named_parameters()})
        assert distance(found, {n: 0.1 * d for n, d in solved.items()}) < 1e-12
        assert opt.damping_now == schedule(t)
        if second is not None:
            assert distance(step(other, x, loss, second), found) == 0
        if t == 2:
            other = copy.deepcopy(model)
            second = Woodbury(other, 0.1, mass=0.3, damping=schedule)
            second.load_state_dict(opt.state_dict())


def test_steps_that_were_none_do_not_count():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, damping=lambda t: 1.0 + t)
    opt.step()
    sum(p.sum() for p in model.parameters()).backward()
    with pytest.raises(ValueError, match="no forward pass"):
        opt.step()
    step(model, x, loss, opt)
    assert opt.damping_now == 1.0


BAD = [
    (0.0, ValueError, r"damping must be positive and finite, got 0\.0"),
    (-1, ValueError, "got -1"),
    (math.nan, ValueError, "got nan"),
    (math.inf, ValueError, "got inf"),
    ("much", TypeError, "damping must be a positive number, a function of the step or LevenbergMarquardt.*got 'much'"),
    (None, TypeError, "got None"),
    (True, TypeError, "got True"),
    (lambda t: 0.0, ValueError, r"got 0\.0 at step 0"),
    (lambda t: "x", TypeError, "at step 0 it is 'x'"),
]


@pytest.mark.parametrize(("damping", "error", "message"), BAD)
def test_bad_damping(damping, error, message):
    with pytest.raises(error, match=message):
        Woodbury(mlp(3, 2), damping=damping)


def test_a_schedule_that_goes_wrong_later_names_its_step():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, damping=lambda t: 1.0 if t < 1 else -2.0)
    step(model, x, loss, opt)
    before = {n: p.clone() for n, p in trainable(model).items()}
    with pytest.raises(ValueError, match=r"damping must be positive and finite, got -2\.0 at step 1"):
        step(model, x, loss, opt)
    assert all(torch.equal(p, before[n]) for n, p in trainable(model).items())
    assert damping_at(torch.tensor(0.5), 0) == 0.5


BAD_TRUST = [
    ({"rule": "nilsen"}, ValueError, "unknown rule of LevenbergMarquardt 'nilsen'.*did you mean 'nielsen'"),
    ({"start": 0.0}, ValueError, r"0 < least <= start <= most < ∞, got .*start=0\.0"),
    ({"start": "x"}, TypeError, "start of LevenbergMarquardt must be a number, got 'x'"),
    ({"most": math.inf}, ValueError, "most=inf"),
    ({"least": 2.0}, ValueError, r"least=2\.0"),
    ({"accept": 0.25}, ValueError, r"accept of LevenbergMarquardt must be in \[0, 1/4\), got 0\.25"),
    ({"factor": 1.0}, ValueError, r"above 1 and finite, got 1\.0"),
    ({"trials": 0}, ValueError, "int of at least 1, got 0"),
    ({"trials": 2.0}, ValueError, r"got 2\.0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_TRUST)
def test_bad_trust_regions(options, error, message):
    with pytest.raises(error, match=message):
        LevenbergMarquardt(**options)


@given(st.floats(1e-6, 1e6), st.sampled_from([2.0, 4.0, 64.0]), st.floats(-3, 3) | st.just(-math.inf))
def test_nielsens_rule(damping, growth, ratio):
    """Algorithm 3.16 of Madsen, Nielsen & Tingleff (2004), written out; ratios above 1 count as 1."""
    trust = LevenbergMarquardt()
    if ratio > 0:
        expected = damping * max(1 / 3, 1 - (2 * min(ratio, 1.0) - 1) ** 3), 2.0
    else:
        expected = damping * growth, 2 * growth
    assert trust.adjusted(damping, growth, ratio) == pytest.approx(expected)
    assert trust.accepts(ratio) == (ratio > 0)


@given(st.floats(1e-6, 1e6), st.floats(-3, 3) | st.just(-math.inf))
def test_marquardts_rule(damping, ratio):
    trust = LevenbergMarquardt(rule="marquardt", factor=4.0)
    factor = 4.0 if ratio < 0.25 else 0.25 if ratio > 0.75 else 1.0
    assert trust.adjusted(damping, 2.0, ratio) == pytest.approx((damping * factor, 2.0))


def test_damping_stays_between_its_ends():
    trust = LevenbergMarquardt(least=0.5, most=2.0)
    assert trust.adjusted(0.6, 2.0, 1.0)[0] == 0.5
    assert trust.adjusted(1.5, 8.0, -1.0)[0] == 2.0


def test_ratios():
    assert decrease_ratio(0.25, 0.5, 1e-9) == 0.5
    assert decrease_ratio(-0.25, 0.5, 1e-9) == -0.5
    for actual in (math.nan, math.inf, -math.inf):
        assert decrease_ratio(actual, 0.5, 1e-9) == -math.inf
    assert decrease_ratio(1.0, -0.5, 1e-9) == -math.inf  # no decrease was foretold
    assert decrease_ratio(1.0, math.nan, 1e-9) == -math.inf
    assert decrease_ratio(0.0, -1e-12, 1e-9) == decrease_ratio(0.0, 1e-12, 1e-9) == 1.0
    assert decrease_ratio(-1e-10, 1e-12, 1e-9) == -math.inf


@pytest.mark.parametrize("metric", ["identity", "cross_entropy", definite_metric, singular_metric])
@pytest.mark.parametrize("blocks", ["layer", "network"])
@pytest.mark.parametrize("missing", [(), ("2.weight",), ("0.weight", "0.bias")])
def test_predicted_decrease_is_the_dense_quadratic_model(metric, blocks, missing):
    model, x, loss = problem()
    loss(model(x)).backward()
    draw = torch.Generator().manual_seed(1)
    move = {n: torch.randn(p.shape, generator=draw, dtype=F64) for n, p in trainable(model).items()}
    move = {n: u for n, u in move.items() if n not in missing}
    g = {n: p.grad for n, p in model.named_parameters()}
    y, factors = layer_factors(model, x)
    L = resolve_output_metric(metric).factor(y)
    if blocks == "network":
        factors = {"network": join_factors(factors)}
    dense = Dense(model, x, output_metric=metric, blocks="network")
    J = dense.J["network"]
    C = J.T @ dense.M @ J / len(x)
    flat = torch.cat([move.get(n, torch.zeros_like(p)).flatten() for n, p in trainable(model).items()])
    slope = torch.cat([t.flatten() for t in g.values()]) @ flat
    found = predicted_decrease(factors.values(), L, g, move, len(x))
    assert found == pytest.approx((-slope - flat @ C @ flat / 2).item(), rel=1e-12)


def test_nothing_moves_nothing_decreases():
    _, factors = layer_factors(mlp(3, 2), torch.ones(2, 3))
    assert predicted_decrease(factors.values(), None, {}, {}, 2) == 0.0
