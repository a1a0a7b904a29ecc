"""Assumptions of NAIM and of minimizing movements: caught, passed, left open, and where they can be used."""

import pytest
import torch
from torch import nn

from examples import mutation_table
from optim import RLO, NaimMonitor, SquaredEnergy, minimizing_movements
from optim.movements.energy import ConvexEnergy
from optim.naim_lyapunov import descent_margin
from stability import check_assumptions, movement_assumptions, naim_assumptions
from stability.assumptions import CATALOGUE, SYSTEM_CONTROLS, SYSTEMS, AssumptionViolated
from stability.assumptions.controls import linear, network, samples
from stability.assumptions.systems import convex_energy
from stability.testing import each_assumption
from tests.reference import F64

PAGE = mutation_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("control", SYSTEM_CONTROLS, ids=lambda control: control.key)
def test_what_violates_is_caught_and_what_is_just_inside_passes(control):
    caught, passed = control.verdict(control.violating), control.verdict(control.inside)
    assert (caught.verdict, passed.verdict) == ("violated", "holds")
    assert caught.margin < 0 <= passed.margin
    assert mutation_table.row(control, caught, passed) in PAGE


def test_every_assumption_has_a_control_and_a_line_in_the_page():
    assert [control.key for control in SYSTEM_CONTROLS] == list(SYSTEMS)
    assert not set(SYSTEMS) & set(CATALOGUE)
    for key, spec in SYSTEMS.items():
        assert f"| `{key}` | {spec.quantity} |" in PAGE


def watched(steps=6, lr=0.1, eta=0.5, note=True, smooth=lambda w: 0.5 * w.square().sum(), **options):
    w = nn.Parameter(torch.ones(3, dtype=F64))
    opt = RLO([w], lr, eta=eta, memory="gradient", direction="identity", **options)
    naim = NaimMonitor(opt)
    for _ in range(steps):
        opt.zero_grad()
        h = smooth(w)
        if note:
            naim.note_loss(h)
        h.backward()
        opt.step()
    return naim.record()


def verdicts(report):
    return {key: report[key].verdict for key in report.keys}


def test_a_run_of_gradient_descent_with_velocity_holds_all_three():
    report = naim_assumptions(watched(), smoothness=1.0)
    assert verdicts(report) == {"strict_descent": "holds", "residual_recursion": "holds", "dissipation": "holds"}
    assert report["strict_descent"].value == descent_margin(0.1, 0.5, 1.0)
    assert report["residual_recursion"].value < 1e-14
    assert report.raise_if_violated(undecided=True) is not None
    with pytest.raises(AssumptionViolated, match=r"strict descent .* is violated: ½ − a − 2a²q²"):
        naim_assumptions(watched(), smoothness=5.0).raise_if_violated()
    edge = descent_margin(0.25, 1.0, 2.0)
    assert edge == 0
    assert naim_assumptions(watched(lr=0.25, eta=1.0), smoothness=2.0)["strict_descent"].verdict == "violated"


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({}, "strict_descent", "no smoothness"),
        ({"eta": lambda t: 1 / (t + 2)}, "strict_descent", "eta is not one known number"),
        ({"eta": lambda t: 1 / (t + 2)}, "dissipation", "eta is not one known number"),
        ({"note": False}, "dissipation", "call note_loss"),
        ({"steps": 1}, "dissipation", "two steps in a row"),
        ({"steps": 1}, "residual_recursion", "fewer than two steps"),
        ({"steps": 0}, "strict_descent", "no step was recorded"),
        ({"lr": 0.0}, "dissipation", "lr is 0"),
    ],
)
def test_what_cannot_be_said_of_a_record_is_undecided(options, key, words):
    found = naim_assumptions(watched(**options))[key]
    assert found.verdict == "undecided"
    assert words in found.reason


def test_numbers_that_are_none_are_refused():
    for bad in (-1.0, float("nan"), True):
        with pytest.raises(ValueError, match="smoothness must be a finite number >= 0"):
            naim_assumptions(watched(), smoothness=bad)
    with pytest.raises(ValueError, match="floor must be a lower bound"):
        naim_assumptions(watched(), floor=10.0)
    with pytest.raises(ValueError, match="inexactness is no assumption of theorem 3"):
        check_assumptions(network(nn.Tanh()), samples(), {"lr": 0.1}, limits={"inexactness": 1.0})


@pytest.mark.parametrize(
    ("key", "function"), [("dissipation", "naim_assumptions"), ("convex energy", "movement_assumptions")]
)
def test_where_theorem_3_is_checked_they_are_refused(key, function):
    from stability.regression.fixture import Options

    for refusing in (
        lambda: check_assumptions(network(nn.Tanh()), samples(), {"lr": 0.1}, skip=[key]),
        lambda: each_assumption(only=[key]),
        lambda: each_assumption(skip=[key]),
        lambda: Options.of({"skip": [key]}),
    ):
        with pytest.raises(ValueError, match=f"is no assumption of theorem 3; {function} measures it"):
            refusing()
    assert Options.of({"allow": [key]}).allow  # the fixture requires reports of theirs too


def test_what_is_no_record_no_run_and_no_floor_is_named():
    with pytest.raises(TypeError, match="floor must be a number, a lower bound of h; got 'x'"):
        naim_assumptions(watched(), floor="x")
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="floor must be finite"):
            naim_assumptions(watched(), floor=bad)
    with pytest.raises(TypeError, match="record must be a NaimRecord"):
        naim_assumptions("record")
    run, energy, model, _ = movement()
    with pytest.raises(TypeError, match="run must be of type MovementRun, got dict"):
        movement_assumptions({}, energy)
    with pytest.raises(TypeError, match="energy must be of type Energy, got Linear"):
        movement_assumptions(run, model)
    with pytest.raises(TypeError, match="model must be of type Module, got Tensor"):
        movement_assumptions(run, energy, torch.ones(1))
    with pytest.raises(ValueError, match="model was given without x"):
        movement_assumptions(run, energy, model)


def movement(**options):
    energy = SquaredEnergy(torch.ones(1, 1))
    model, x = linear(1), torch.ones(1, 1, dtype=F64)
    run = minimizing_movements(model, x, energy, tau=1.0, steps=3, delta=1e-6, **options)
    return run, energy, model, x


def test_a_movement_of_a_linear_model_holds_everything():
    report = movement_assumptions(*movement(keep_parameters=True))
    assert verdicts(report) == dict.fromkeys(
        ("convex_energy", "inexactness", "local_nondegeneracy", "interior_localisation"), "holds"
    )
    assert report["convex_energy"].value == 1.0
    assert report["inexactness"].value <= 1e-6 == report["inexactness"].threshold
    assert report["inexactness"].margin == 1e-6 - report["inexactness"].value
    assert "verdict" in report.to_frame()


def test_what_cannot_be_said_of_a_movement_is_undecided():
    run, energy, model, x = movement()
    for report, words in (
        (movement_assumptions(run, energy, model, x), "did not keep its parameters"),
        (movement_assumptions(run, energy), "no model was given"),
    ):
        for key in ("local_nondegeneracy", "interior_localisation"):
            assert (report[key].verdict, words in report[key].reason) == ("undecided", True)


def test_convexity_is_asked_at_every_point_and_the_worst_is_named():
    E = ConvexEnergy(lambda u: u.pow(4).sum(1) - 0.5 * u.square().sum(1), convexity=1.0, name="quartic")
    points = torch.tensor([[[1.0]], [[0.1]], [[2.0]]], dtype=F64)  # E'' = 12u² − 1
    found = convex_energy(E, points)
    assert (found.verdict, found.step, round(found.value, 9), round(found.margin, 9)) == ("violated", 1, -0.88, -1.88)
    assert convex_energy(E, points[::2]).verdict == "holds"
    rough = ConvexEnergy(lambda u: u.abs().pow(1.5).sum(1))  # E'' = ∞ at 0
    assert convex_energy(rough, torch.zeros(1, 1, 1, dtype=F64)).verdict == "undecided"


def test_the_fixture_of_pytest_takes_these_reports(tmp_path):
    from stability.regression.fixture import AssumptionCheck, Options

    check = AssumptionCheck("test", tmp_path / "baselines.toml", Options(baseline=False))
    report = movement_assumptions(*movement(keep_parameters=True))
    assert check.require(report) is report
    bad = naim_assumptions(watched(), smoothness=5.0)
    with pytest.raises(AssumptionViolated, match="strict descent"):
        check.require(bad)
    assert check.require(bad, allow=["strict_descent"]) is bad
