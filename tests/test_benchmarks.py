"""The benchmarks time the right thing: contenders agree, tables are written. No time is asserted."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import gram, step
from benchmarks.__main__ import main
from benchmarks.timing import Contender, Settings, compare, interleaved
from benchmarks.workloads import WORKLOADS

FAST = Settings(rounds=2, turn=0.0)


@pytest.fixture(autouse=True)
def _waiting_policy(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the command sets it where it is not set


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_contender_computes_the_same_gram_matrix(workload, dtype):
    found = gram.contenders(workload, 3, dtype, "cpu")
    assert set(found) == {gram.OURS, gram.REFERENCE, "nngeometry"}
    outputs = WORKLOADS[workload].sizes[-1]
    for name, contender in found.items():
        if contender.run is not None:
            assert contender.run().shape == (3, outputs, 3, outputs), name
            assert contender.error <= gram.TOLERANCE[dtype], name


def test_nngeometry_is_one_of_them_where_it_is_installed():
    pytest.importorskip("nngeometry")
    assert gram.contenders("W4", 2, "float64", "cpu")["nngeometry"].run is not None


def test_a_wrong_gram_matrix_is_noticed(monkeypatch):
    monkeypatch.setitem(gram.CONTENDERS, "nngeometry", lambda model, x: lambda: 1.01 * gram.jacrev_gram(model, x)())
    rows = gram.entries(FAST, [("W4", 2, "float64")])
    assert [row.note for row in rows] == ["", "", "disagrees, not timed"]
    assert rows[2].median is None
    assert rows[2].error == pytest.approx(0.01)


@pytest.mark.parametrize("workload", ["W1", "W2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_optimizer_takes_the_step_that_its_metric_says(workload, dtype):
    for name, contender in step.contenders(workload, 4, dtype, "cpu").items():
        assert contender.error <= step.TOLERANCE[dtype], name


def test_the_step_of_one_optimizer_is_not_that_of_another(monkeypatch):
    monkeypatch.setitem(step.OPTIMIZERS, "Woodbury", step.OPTIMIZERS["SGD"])
    assert step.contenders("W1", 4, "float64", "cpu")["Woodbury"].error > 0.1


def test_a_timed_step_trains():
    model = WORKLOADS["W1"].model("float64", "cpu")
    x, targets = WORKLOADS["W1"].batch(8, "float64", "cpu")
    optimizer = step.OPTIMIZERS["Woodbury"](model)
    before = step.loss_of(model(x), targets).item()
    for _ in range(5):
        step.training_step(model, optimizer, x, targets)
    assert step.loss_of(model(x), targets).item() < before


def test_turns_are_interleaved():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, Settings(rounds=3, turn=0.0))
    assert "".join(order) == "aabb" + "ab" * 3
    assert all(t.shape == (3,) and (t > 0).all() for t in times.values())


def test_nan_is_no_agreement_and_without_a_base_there_are_no_ratios():
    found = {"a": Contender(lambda: None, float("nan")), "b": Contender(lambda: None, 0.0)}
    first, second = compare("case", found, "a", 1.0, FAST)
    assert first.note == "disagrees, not timed"
    assert second.median is not None
    assert second.ratio is None


def test_the_base_has_ratio_one():
    rows = step.entries(FAST, [("W1", 2, "float32")])
    assert {row.name: row.ratio for row in rows}[step.BASE] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_writes_its_tables(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gram, "QUICK", [("W4", 2, "float64")])
    monkeypatch.setattr(step, "QUICK", [("W1", 2, "float32")])
    if installed:
        pytest.importorskip("nngeometry")
    else:
        monkeypatch.setitem(sys.modules, "nngeometry.gram", None)
    assert main(["--quick", "--rounds", "1", "--out", str(tmp_path / "new")]) == 0
    text = (tmp_path / "new" / "gram-cpu-quick.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in text
    assert "W4: 64-256-256-1 tanh, digits" in text
    assert ("not installed" in text) != installed
    assert "| W1, B = 2, float32 | Woodbury |" in (tmp_path / "new" / "step-cpu-quick.md").read_text(encoding="utf-8")
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown question 'speed'; write one of gram, step"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--device", "tpu"], "--device is 'tpu'; write cpu or cuda"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_line(tmp_path, capsys):
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_workloads_are_the_same_every_time():
    for workload in WORKLOADS.values():
        first, second = (workload.batch(4, "float64", "cpu") for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert np.allclose(first[0].norm(dim=1), np.sqrt(8))
