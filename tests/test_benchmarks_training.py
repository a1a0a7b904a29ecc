"""The training benchmark trains what it says: data split once, rates chosen by validation loss, every contestant learns."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import main
from benchmarks.contestants import CONTESTANTS, Contestant, usual
from benchmarks.tasks import TASKS
from nt_kernel import NumericalError
from tests.thinned import thinned

SGD = usual(lambda model, _, lr: torch.optim.SGD(model.parameters(), lr))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_split_once_and_its_network_fits(name):
    task, again = TASKS[name](), TASKS[name]()
    rows = [{tuple(x.flatten().tolist()) for x in part.x} for part in (task.training, task.validation, task.test)]
    shared = [a & b for a, b in ((rows[0], rows[1]), (rows[0], rows[2]), (rows[1], rows[2]))]
    assert max(map(len, shared)) <= 1  # two of the digits' images are equal
    assert torch.equal(task.test.x, again.test.x)
    y = task.model(3)(task.validation.x)
    assert task.loss_of(y, task.validation.targets).item() > 0.1
    assert torch.equal(y, task.model(3)(task.validation.x))
    assert not torch.equal(y, task.model(4)(task.validation.x))


def test_losses_and_errors_are_those_of_the_page():
    digits, diabetes = TASKS["digits"](), TASKS["diabetes"]()
    y = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert digits.error_of(y, torch.tensor([0, 0])) == 0.5
    assert digits.loss_of(y, torch.tensor([0, 1])).item() == pytest.approx(
        (np.log1p(np.exp(-2)) + np.log1p(np.exp(-3))) / 2
    )
    values = torch.tensor([[1.0], [-1.0]])
    assert diabetes.loss_of(torch.tensor([[0.0], [1.0]]), values).item() == pytest.approx((1 + 4) / 4)
    assert diabetes.training.targets.mean().item() == pytest.approx(0, abs=1e-6)
    assert diabetes.training.targets.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_mini_batches_go_through_the_data_before_they_repeat():
    task = TASKS["diabetes"]()
    rows = len(task.training.x)
    batches = task.batches(5, 20)
    assert batches.shape == (20, 64)
    assert sorted(batches.flatten()[:rows]) == list(range(rows))
    assert (batches == task.batches(5, 20)).all()
    assert (batches[:10] == task.batches(5, 10)).all()
    assert (batches != task.batches(6, 20)).any()


@pytest.mark.parametrize(("name", "task"), thinned(itertools.product(CONTESTANTS, ["digits", "images", "diabetes"]), 5))
def test_every_contestant_learns_at_a_rate_of_its_list(task, name):
    problem, contestant = TASKS[task](), CONTESTANTS[name]
    if name == "K-FAC":
        pytest.importorskip("curvlinops")
    assert len(contestant.rates) == 7
    curves = [training.train(problem, contestant, contestant.rates[k], 0, 20) for k in (2, 3, 4)]
    assert min(curve.loss[-1] / curve.loss[0] for curve in curves if np.isfinite(curve.loss[-1])) < 0.97
    assert all(curve.steps[-1] == 20 for curve in curves)
    assert all(
        curve.seconds[0] == 0 and (np.diff(curve.seconds[np.isfinite(curve.seconds)]) > 0).all() for curve in curves
    )


def test_the_rate_is_the_one_with_the_lowest_validation_loss_and_a_run_that_diverges_loses():
    task = TASKS["diabetes"]()
    rates = (1e-6, 0.1, 1e4)
    assert training.tune(task, Contestant(SGD, rates), 10) == 0.1
    assert np.isnan(training.tune(task, Contestant(SGD, (1e30,)), 10))


def test_a_failure_of_the_arithmetic_is_a_run_that_diverged():
    task = TASKS["diabetes"]()

    def build(model, task, lr):
        def step(x, targets):
            raise NumericalError("no factor", where="here")

        return step

    curve = training.train(task, Contestant(build, (1.0,)), 1.0, 0, 5)
    assert np.isfinite(curve.loss[0])
    assert np.isnan(curve.loss[1:]).all()
    assert np.isnan(curve.error)
    (result,) = training.compete(task, {"a": Contestant(build, (1.0,))}, 2, 5)
    assert result.note == "diverges at every rate"


def test_steps_and_seconds_to_a_loss_are_medians_of_the_first_time():
    steps = np.array([0, 10, 20])
    runs = [
        training.Curve(steps, np.array([0.0, 1.0, 2.0]), np.array(loss), np.array(loss), 0.0)
        for loss in ([3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [3.0, 3.0, 1.0])
    ]
    assert training.Result("a", 1.0, False, runs).reach(1.0) == (20, 2.0)
    assert training.Result("a", 1.0, False, runs[:1]).reach(1.0) == (10, 1.0)
    assert training.Result("a", 1.0, False, runs).reach(0.5) == (np.inf, np.inf)


def test_the_page_has_every_contestant_and_a_figure(tmp_path, monkeypatch):
    kept = {name: CONTESTANTS[name] for name in ("SGD, momentum .9", "AdamW")}
    kept["missing"] = Contestant(lambda *_: __import__("no_such_module"), (1.0,))
    monkeypatch.setattr(training, "CONTESTANTS", kept)
    monkeypatch.setattr(training, "QUICK", [("diabetes", 2, 5)])
    assert main(["training", "--quick", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "training-cpu-quick.md").read_text(encoding="utf-8")
    assert "| missing | not installed |" in text
    assert text.count("| AdamW |") == 1
    assert "rounds" not in text
    assert (tmp_path / "training-cpu-quick.svg").read_text(encoding="utf-8").startswith("<?xml")
