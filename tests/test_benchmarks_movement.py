"""Benchmarks of movements and of RLO: contenders do what they say, and a wrong one is noticed."""

import pytest
import torch

from benchmarks import movement, rlo
from benchmarks.timing import Settings

FAST = Settings(rounds=2, turn=0.0)


def test_gauss_newton_contenders_solve_their_equations(tmp_path):
    found = movement.contenders("W1", 4, "float64", "cpu")
    assert all(c.error <= movement.TOLERANCE["float64"] for c in found.values())
    (page,) = movement.report(FAST, [("W1", 4, "float32")], tmp_path / "x")
    assert page.count("| W1, B = 4, float32 |") == 4
    assert "disagrees" not in page


def test_a_wrong_damping_is_noticed():
    model = movement.WORKLOADS["W1"].model("float64", "cpu")
    x, targets = movement.WORKLOADS["W1"].batch(4, "float64", "cpu")
    assert movement.move_error(model, x, targets, 0.5, movement.GaussNewton(damping=0.5)) < 1e-12
    assert movement.move_error(model, x, targets, 0.5, movement.GaussNewton(damping=0.55)) > 1e-3


def test_every_trust_region_iteration_starts_from_the_same_parameters(monkeypatch):
    model = movement.WORKLOADS["W1"].model("float64", "cpu")
    x, targets = movement.WORKLOADS["W1"].batch(4, "float64", "cpu")
    seen, made = [], movement.deepcopy
    monkeypatch.setattr(movement, "deepcopy", lambda m: seen.append(made(m)) or seen[-1])
    iteration = movement.first_trust_region_iteration(model, x, targets, movement.LevenbergMarquardt(start=1e-3))
    tried = iteration()
    once = [p.detach().clone() for p in seen[0].parameters()]
    assert iteration() == tried
    assert not torch.equal(once[0], next(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, seen[0].parameters(), strict=True))


def test_the_row_of_the_trust_region_counts_its_moves():
    model = movement.WORKLOADS["W1"].model("float64", "cpu")
    x, targets = movement.WORKLOADS["W1"].batch(16, "float64", "cpu")
    tried = {}
    for start in (1e-3, 0.1, 1.0):  # ε, 2ε, 8ε, 64ε, 1024ε: a move is taken from .2 on, not at .1
        trust = movement.LevenbergMarquardt(start=start)
        tried[start] = movement.first_trust_region_iteration(model, x, 300 * targets, trust)()
    assert tried == {1e-3: 5, 0.1: 2, 1.0: 1}


@pytest.mark.parametrize("name", rlo.RULES)
def test_rlo_contenders_are_their_definitions(name):
    assert rlo.contender(name, 8, "cpu").error <= rlo.TOLERANCE


def test_a_wrong_rule_is_noticed(monkeypatch):
    monkeypatch.setitem(rlo.RULES, rlo.BASE, lambda params: torch.optim.Adam(params, 1.1 * rlo.LR))
    assert rlo.contender(rlo.BASE, 8, "cpu").error > 0.05
