"""What a user adds: a rung of the ladder, an assumption, the step rule of an optimizer of one's own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stability import ClosedLoop, Replacement, Rung, StepRule, certify, check_assumptions, record
from stability.assumptions import CATALOGUE, Seen, Spec, add_assumption, remove_assumption
from stability.recording.rung import THEORY_FREE, Cost

x = torch.eye(3, dtype=torch.float64)
a = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)


class PerLayer(torch.optim.Optimizer):
    """θ ← θ − lr·g/d with a number d for each parameter; ``said`` is what it says of its step."""

    def __init__(self, params, lr, weights, said=None):
        super().__init__(params, {"lr": lr})
        self.weights, self.said = weights, said

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p, weight in zip(group["params"], self.weights, strict=True):
                p -= group["lr"] * p.grad / weight

    def step_rule(self, held):
        if self.said is not None:
            return self.said
        masses = {h.name: weight for h, weight in zip(held, self.weights, strict=True)}
        return StepRule("PerLayer", held[0].group["lr"], exact=True), masses


def trained(targets, start=0.0, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), steps=12):
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(start)
    opt = optimizer(model.parameters())
    with record(model, x, opt, targets=targets) as run:
        for _ in range(steps):
            opt.zero_grad()
            (0.5 * (model(x) - targets).square().sum(1).mean()).backward()
            opt.step()
    return run


def residuals(run_S, run_twin, found):
    values = torch.stack(
        [(run_S.outputs(t) - run_S.targets).norm() + (run_twin.outputs(t) - run_S.targets).norm() for t in found.times]
    )
    return Rung(
        "residuals", "l2", values.max().item(), found.measured["l2"], THEORY_FREE, ("none",), "‖r‖ + ‖y' − a‖",
        cost=Cost(7.0, 8), series=values,
    )  # fmt: skip


def test_a_rung_of_ones_own_is_one_of_the_certificate():
    runs = trained(a), trained(a * torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64))
    found, plain = certify(*runs, further=[residuals]), certify(*runs)
    assert found["residuals"].ratio >= 1
    assert list(found.rungs) == [*plain.rungs, "residuals"]
    assert found.to_frame().loc["residuals", "kind"] == THEORY_FREE
    assert "residuals" in str(found)
    assert found.cost.seconds > 7


def test_a_later_rung_sees_those_before_it():
    runs = trained(a), trained(-a)

    def tighter(S, twin, found):
        return replace(found["residuals"], name="half", value=found["residuals"].value / 2)

    found = certify(*runs, further=[residuals, tighter])
    assert found["half"].value == found["residuals"].value / 2


def test_what_is_no_rung_is_refused():
    runs = trained(a), trained(-a)
    with pytest.raises(TypeError, match="must return a Rung, got float"):
        certify(*runs, further=[lambda *_: 1.0])
    with pytest.raises(ValueError, match="there is a rung 'T5' already"):
        certify(*runs, further=[lambda S, twin, found: found["T5"]])
    for wrong in (residuals, "residuals", None, [1.0]):
        with pytest.raises(TypeError, match="further must be a list of functions, got "):
            certify(*runs, further=wrong)


def test_an_optimizer_that_says_its_rule_is_followed_exactly():
    """Two runs on the same data from different starts: w_t = 0, so that T5 is the divergence itself; with a wrong rule not."""

    def made(ps):
        return PerLayer(ps, 0.3, (2.0, 0.5))

    exact = certify(trained(a, 0.0, made), trained(a, 1.0, made))
    assert exact.exact
    assert exact["T5_l2"].ratio == pytest.approx(1, abs=1e-9)
    assert torch.allclose(exact["T5_l2"].series[-1], exact.errors[-1].norm(), rtol=1e-8)

    def silent(ps):
        return PerLayer(ps, 0.3, (2.0, 0.5), (StepRule("PerLayer", known=False, note="A_t = I"), {}))

    assert certify(trained(a, 0.0, silent), trained(a, 1.0, silent))["T5_l2"].ratio > 1.05


def test_a_wrong_rule_costs_tightness_and_not_validity():
    def wrong(ps):
        return PerLayer(ps, 0.3, (2.0, 0.5), (StepRule("PerLayer", 3.0, exact=True), {"weight": 0.2, "bias": 4.0}))

    found = certify(trained(a, 0.0, wrong), trained(a, 1.0, wrong))
    assert found["T5"].ratio >= 1
    assert (found["T5_l2"].series >= found.errors.flatten(1).norm(dim=1) * (1 - 1e-9)).all()


def test_a_rule_must_be_one():
    with pytest.raises(TypeError, match=r"PerLayer.step_rule must return \(StepRule, masses"):
        trained(a, optimizer=lambda ps: PerLayer(ps, 0.3, (2.0, 0.5), "nothing"))


def test_an_error_in_a_rule_of_ones_own_comes_through():
    class Broken(PerLayer):
        def step_rule(self, held):
            return {}["oops"]

    with pytest.raises(KeyError, match="oops"):
        trained(a, optimizer=lambda ps: Broken(ps, 0.3, (2.0, 0.5)), steps=1)


def test_the_rule_reaches_the_closed_loop():
    run = trained(a, optimizer=lambda ps: PerLayer(ps, 0.3, (2.0, 0.5)), steps=1)
    (A,) = ClosedLoop(run).matrices()
    wanted = torch.eye(3) - 0.3 / 3 * (torch.eye(3) / 2 + torch.ones(3, 3) / 0.5)
    assert torch.allclose(A, wanted.double())


@pytest.fixture
def light():
    spec = Spec("light", "light weights", "max|θ|", "–", 1.0, True, "No weight is large at θ₀.")
    seen = []

    @add_assumption(spec)
    def measure(given: Seen):
        seen.append(given)
        return max(p.abs().max().item() for p in given.model.parameters()), {"layer": "", "step": 0}

    yield seen
    remove_assumption("light")


def model_at(value: float) -> nn.Module:
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(value)
    return model


OPTIONS = {"optimizer": {"lr": 0.01, "scale": "none"}, "steps": 5}


def test_an_assumption_of_ones_own_is_measured_limited_and_reported(light):
    report = check_assumptions(model_at(0.5), (x, a), **OPTIONS)
    assert report["light"].verdict == "holds"
    assert (report["light"].value, report["light"].margin, report["light"].step) == (0.5, 0.5, 0)
    assert report.keys == tuple(CATALOGUE)
    assert light[0].twins.pairs
    assert light[0].lr == 0.01
    tighter = check_assumptions(model_at(0.5), (x, a), **OPTIONS, limits={"light": 0.4})
    assert tighter["light"].verdict == "violated"
    assert "max|θ|" in str(tighter.to_frame().set_index("key").loc["light", "quantity"])
    assert "light" not in check_assumptions(model_at(0.5), (x, a), **OPTIONS, skip=["light"]).keys


def test_it_sees_no_twins_under_another_loss(light):
    check_assumptions(model_at(0.5), (x, a), **OPTIONS, loss="huber")
    assert light[-1].twins is None


def test_what_it_writes_into_does_not_reach_the_caller(light):
    mine, targets = x.clone(), a.clone()
    spec = Spec("writes", "writes", "q", "–", 1.0, True, "m")
    add_assumption(spec)(lambda seen: (seen.x.zero_().sum() + seen.targets.zero_().sum()).item())
    try:
        twins = [Replacement(0, torch.ones(3).double(), torch.ones(1).double())]
        check_assumptions(model_at(0.5), (mine, targets), **OPTIONS, replacements=twins)
    finally:
        remove_assumption("writes")
    assert torch.equal(mine, x)
    assert torch.equal(targets, a)


def test_what_it_returns_is_checked():
    spec = Spec("odd", "odd", "q", "–", 1.0, True, "m")
    for returned, words in ((None, "must return a number"), ((1.0, {"where": 3}), "the place of assumption odd has")):
        add_assumption(spec)(lambda seen, returned=returned: returned)
        try:
            with pytest.raises(TypeError, match=words):
                check_assumptions(model_at(0.5), (x, a), **OPTIONS)
        finally:
            remove_assumption("odd")
    add_assumption(replace(spec, below=False))(lambda seen: math.nan)
    try:
        assert check_assumptions(model_at(0.5), (x, a), **OPTIONS)["odd"].verdict == "undecided"
    finally:
        remove_assumption("odd")


def test_keys_and_names_are_taken_once():
    with pytest.raises(ValueError, match="already"):
        add_assumption(CATALOGUE["positive_rate"])
    spec = Spec("mine", "mine", "q", "–", 1.0, True, "m")
    for changed in ({"key": "dissipation"}, {"name": "local non-degeneracy"}, {"name": "dissipation"}):
        with pytest.raises(ValueError, match="already"):
            add_assumption(replace(spec, **changed))
    for bad in (math.nan, math.inf, -1.0, "1"):
        with pytest.raises(ValueError, match="the limit of mine must be a finite number >= 0"):
            add_assumption(replace(spec, limit=bad))
    with pytest.raises(ValueError, match="'positive_rate' was not added"):
        remove_assumption("positive_rate")
    with pytest.raises(TypeError, match="takes a Spec, got str"):
        add_assumption("light")
