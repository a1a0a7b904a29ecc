"""The benchmarks time the right thing: contenders agree, tables are written. No time is asserted."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import flops, gram, growth, memory, step
from benchmarks.__main__ import main
from benchmarks.rivals import OURS, REFERENCE, RIVALS
from benchmarks.timing import Contender, Gemm, Settings, compare, interleaved, table
from benchmarks.workloads import WORKLOADS, Workload, export

FAST = Settings(rounds=2, turn=0.0, workers=False)
MLPS = ["W1", "W2", "W4"]


@pytest.fixture(autouse=True)
def _waiting_policy(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the command sets it where it is not set


def keep(monkeypatch, *names):
    """Only these torch contenders."""
    monkeypatch.setattr(gram, "RIVALS", {name: RIVALS[name] for name in names})
    monkeypatch.setattr(memory, "RIVALS", {name: RIVALS[name] for name in names})


def assert_agreeing(workload, n, dtype, names):
    outputs = WORKLOADS[workload].outputs
    with gram.contenders(workload, n, dtype, FAST) as found:
        assert set(found) == set(RIVALS)
        for name in names:
            contender = found[name]
            if contender.run is None:
                assert contender.note == "not installed", (name, contender.note)
            else:
                assert contender.run().shape == (n, outputs, n, outputs), name
                # nngeometry's convolutions pass through float32
                known = 1e-6 if name == "nngeometry" and workload in ("W3", "R") else 0
                assert contender.error <= max(known, gram.TOLERANCE[dtype]), name


@pytest.mark.parametrize("workload", MLPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_contender_computes_the_same_gram_matrix(workload, dtype, monkeypatch):
    monkeypatch.setattr(gram, "TOO_SLOW", {})
    assert_agreeing(workload, 3, dtype, RIVALS)


@pytest.mark.parametrize("workload", ["W3", pytest.param("R", marks=pytest.mark.slow)])
def test_every_contender_agrees_on_convolutions(workload):
    assert_agreeing(workload, 2, "float64", [name for name in RIVALS if (workload, name) not in gram.TOO_SLOW])


def test_whoever_can_run_a_transformer_agrees_and_the_others_say_why():
    with gram.contenders("T", 2, "float64", FAST) as found:
        for name in (OURS, REFERENCE):
            assert found[name].error <= gram.TOLERANCE["float64"], name
        for name, contender in found.items():
            assert contender.run is not None or contender.note.startswith(("fails: ", "not installed")), name


def test_a_wrong_gram_matrix_is_noticed(monkeypatch):
    keep(monkeypatch, OURS, REFERENCE, "nngeometry")
    wrong = RIVALS[REFERENCE]
    monkeypatch.setitem(gram.RIVALS, "nngeometry", lambda model, x: lambda: 1.01 * wrong(model, x)())
    rows = gram.entries(FAST, [("W4", 2, "float64")])
    assert [row.note for row in rows] == ["", "", "disagrees, not timed"]
    assert rows[2].median is None
    assert rows[2].error == pytest.approx(0.01)


def test_a_peer_that_cannot_says_why_and_ours_must_not_fail(monkeypatch):
    def fails(model, x):
        raise NotImplementedError("no such | layer\nmore")

    keep(monkeypatch, OURS, REFERENCE, "backpack")
    monkeypatch.setitem(gram.RIVALS, "backpack", fails)
    rows = gram.entries(FAST, [("W4", 2, "float64")])
    assert rows[2].note == "fails: NotImplementedError: no such / layer"
    monkeypatch.setitem(gram.RIVALS, OURS, fails)
    with pytest.raises(NotImplementedError):
        gram.entries(FAST, [("W4", 2, "float64")])


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


class Elsewhere:
    """A contender with a watch of its own."""

    def __init__(self, seconds):
        self.each, self.asked = seconds, []

    def seconds(self, calls):
        self.asked.append(calls)
        return self.each


def test_who_runs_elsewhere_holds_the_watch_and_the_slow_sit_out():
    runs = {name: Elsewhere(s) for name, s in [("fast", 0.25), ("slow", 2.0), ("glacial", 20.0)]}
    times = interleaved(runs, Settings(rounds=5, turn=1.0))
    assert {name: t.tolist() for name, t in times.items()} == {
        "fast": [0.25] * 5,
        "slow": [2.0] * 3,
        "glacial": [20.0],
    }
    assert runs["fast"].asked == [1, 1] + [4] * 5
    assert runs["slow"].asked == [1] + [1] * 3
    assert runs["glacial"].asked == [1]
    rows = compare("case", {name: Contender(run, 0.0) for name, run in runs.items()}, "fast", 1.0, Settings(5, 0.0))
    assert [row.ratio[0] for row in rows] == [1.0, 8.0, 80.0]


def test_a_first_call_that_took_very_long_is_the_measurement():
    found = {"fast": Contender(Elsewhere(0.5), 0.0), "glacial": Contender(Elsewhere(1.0), 0.0, seconds=20.0)}
    rows = compare("case", found, "fast", 1.0, Settings(5, 0.0))
    assert [row.median for row in rows] == [0.5, 20.0]
    assert rows[1].ratio[0] == 40.0
    assert found["glacial"].run.asked == []


def test_nan_is_no_agreement_and_without_a_base_there_are_no_ratios():
    found = {"a": Contender(lambda: None, float("nan")), "b": Contender(lambda: None, 0.0)}
    first, second = compare("case", found, "a", 1.0, FAST)
    assert first.note == "disagrees, not timed"
    assert second.median is not None
    assert second.ratio is None


def test_the_base_has_ratio_one():
    rows = step.entries(FAST, [("W1", 2, "float32")])
    assert {row.name: row.ratio for row in rows}[step.BASE] == (1.0, 1.0, 1.0)


def test_the_fraction_of_the_rate_of_matrix_products():
    gemm = Gemm(Elsewhere(2.0), flops=100.0, useful=30.0)
    rows = compare("case", {"a": Contender(Elsewhere(0.5), 0.0)}, "a", 1.0, Settings(2, 0.0), gemm)
    # 30 operations in .5 s are 60 a second; the products do 50.
    assert rows[0].gemm == pytest.approx(1.2)
    assert table(rows, "×").splitlines()[0].endswith("| of GEMM rate |")
    assert table(rows, "×").splitlines()[2].endswith("| 1.2 |")


def test_operations_of_an_mlp_are_the_documented_formula():
    N, C = 5, 10
    model, (x, _) = WORKLOADS["W1"].model("float64", "cpu"), WORKLOADS["W1"].batch(N, "float64", "cpu")
    hidden = sum(2 * (N * C) ** 2 * o + 2 * N**2 * d for d, o in [(64, 256), (256, 256)])
    assert flops.gram_flops(model, x) == hidden + 2 * N**2 * 256


def test_operations_of_a_convolution_take_the_cheaper_route():
    N, C = 3, 10
    model, (x, _) = WORKLOADS["W3"].model("float64", "cpu"), WORKLOADS["W3"].batch(N, "float64", "cpu")
    summed = [2 * N * C * T * o * d + 2 * (N * C) ** 2 * o * d for T, o, d in [(784, 16, 9), (196, 32, 144)]]
    assert flops.gram_flops(model, x) == sum(summed) + 2 * N**2 * 1568
    assert flops.layer_flops(N, C, 2, 100, 100) < 2 * (N * C) ** 2 * 100 * 100  # two positions: by pairs


@pytest.mark.parametrize("workload", ["R", "T"])
def test_operations_of_a_network_count_every_layer(workload):
    model, (x, _) = WORKLOADS[workload].model("float32", "cpu"), WORKLOADS[workload].batch(2, "float32", "cpu")
    before = sum(len(m._forward_hooks) for m in model.modules())
    assert 0 < flops.gram_flops(model, x) < 40 * 2 * 20**2 * sum(p.numel() for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == before


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_a_power_law_is_found(exponent):
    sizes = np.array([8, 16, 32, 64, 128, 256])
    seconds = 3e-4 * sizes**exponent
    fit = growth.fit_exponent(sizes, seconds)
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert fit.constant == pytest.approx(3e-4)
    assert fit.error == pytest.approx(0, abs=1e-12)
    # fixed costs at small sizes do not count, and noise shows in the error
    bent = np.where(sizes <= 32, 1.0, seconds)
    assert growth.fit_exponent(sizes, bent).exponent == pytest.approx(exponent, abs=1e-12)
    noisy = growth.fit_exponent(sizes, seconds * np.array([1, 1, 1, 1, 1.2, 1]))
    assert noisy.error > 0.1


def test_sizes_may_come_in_any_order():
    assert growth.fit_exponent([8, 1, 4, 2], [64.0, 9.0, 16.0, 9.0]).exponent == pytest.approx(2)


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([1], [1.0]), ([1, 2], [1.0]), ([1, 2], [0.0, 1.0]), ([0, 2], [1.0, 1.0])]
)
def test_no_exponent_from_too_little(sizes, seconds):
    with pytest.raises(ValueError, match="at least two positive sizes"):
        growth.fit_exponent(sizes, seconds)


def test_growth_leaves_out_what_would_not_fit(monkeypatch):
    monkeypatch.setattr(growth, "LARGEST_JACOBIAN", 0.0)
    found = growth.sweep("p", (1, 2), "float32", FAST)
    assert REFERENCE not in found.seconds
    assert set(found.seconds[OURS]) == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_the_command_writes_its_tables(installed, tmp_path, monkeypatch, capsys):
    keep(monkeypatch, OURS, REFERENCE, "nngeometry")
    monkeypatch.setattr(memory, "RIVALS", {OURS: RIVALS[OURS]})
    monkeypatch.setattr(gram, "QUICK", [("W4", 2, "float64")])
    monkeypatch.setattr(step, "QUICK", [("W1", 2, "float32")])
    monkeypatch.setattr(memory, "QUICK", [("W4", 2, "float32")])
    if installed:
        pytest.importorskip("nngeometry")
    else:
        monkeypatch.setitem(sys.modules, "nngeometry.gram", None)
    assert main(["gram", "memory", "growth", "step", "--quick", "--rounds", "1", "--out", str(tmp_path / "new")]) == 0
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()}
    assert set(pages) == {f"{q}-cpu-quick.md" for q in ("gram", "memory", "growth", "step")} | {"growth-cpu-quick.svg"}
    text = pages["gram-cpu-quick.md"]
    assert f"torch {torch.__version__}" in text
    assert "W4: 64-256-256-1 tanh, digits" in text
    assert ("not installed" in text) != installed
    assert "| demanded |" in text
    assert "| W4, n = 2, float32 | layer factors |" in pages["memory-cpu-quick.md"]
    assert not any("Unfinished" in text for text in pages.values())
    assert "](growth-cpu-quick.svg)" in pages["growth-cpu-quick.md"]
    assert pages["growth-cpu-quick.svg"].startswith("<?xml")
    assert "| W1, B = 2, float32 | Woodbury |" in pages["step-cpu-quick.md"]
    assert str(tmp_path) in capsys.readouterr().out


def test_what_was_timed_before_an_interruption_is_kept(tmp_path, monkeypatch):
    found = step.contenders

    def interrupted(workload, *rest):
        if workload == "W2":
            raise KeyboardInterrupt
        return found(workload, *rest)

    monkeypatch.setattr(step, "contenders", interrupted)
    monkeypatch.setattr(step, "QUICK", [("W1", 2, "float32"), ("W2", 2, "float32")])
    with pytest.raises(KeyboardInterrupt):
        main(["step", "--quick", "--rounds", "1", "--out", str(tmp_path)])
    text = (tmp_path / "step-cpu-quick.md").read_text(encoding="utf-8")
    assert "Unfinished: 1 of 2 cases." in text
    assert "| W1, B = 2, float32 | Woodbury |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown question 'speed'; write one of gram, "),
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
        if first[0].is_floating_point():
            assert np.allclose(first[0].flatten(1).norm(dim=1), np.sqrt(8))
        models = [workload.model("float64", "cpu") for _ in range(2)]
        assert all(map(torch.equal, *(m.state_dict().values() for m in models)))


def test_building_a_workload_leaves_the_global_random_state_alone():
    state = torch.random.get_rng_state()
    for workload in WORKLOADS.values():
        workload.model("float32", "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_case_travels_whole(tmp_path):
    workload = Workload((4, 3, 2), "tanh", "random")
    with np.load(export(workload, 5, "float32", tmp_path / "case.npz")) as stored:
        names = ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert set(stored.files) == {"x", *(f"parameters/{name}" for name in names)}
        assert stored["x"].dtype == np.float32
        assert json.dumps(stored["parameters/0.weight"].shape) == "[3, 4]"
