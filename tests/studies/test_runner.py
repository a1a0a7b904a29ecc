import json
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pandas as pd
import pytest

import stability
from nt_kernel.errors import NumericalError
from optim import StepTooLargeError
from studies import Study, load_results, run_study
from studies.kinds.twins import run_point, work
from studies.results.frames import PAIR, TABLES
from studies.running.engines import PointsFailed, WorkerLost
from studies.running.runner import worker_count
from tests.studies.fake_twins import fake_train_twins

SMALL = ["n=6,12", "mass=1,0.1", "seeds=2", "replacements=2", "width=8", "steps=3", "workers=1"]


def study(*overrides):
    return Study.from_toml("digits", [*SMALL, *overrides])


@pytest.fixture
def fake(monkeypatch):
    """Train nothing; the value counts the trainings."""
    calls = []

    def train(model, x, *arguments, **options):
        calls.append((len(x), options))
        return fake_train_twins(model, x, *arguments, **options)

    monkeypatch.setattr(stability, "train_twins", train, raising=False)
    monkeypatch.setattr(stability, "Replacement", SimpleNamespace, raising=False)
    return calls


def fail_at(monkeypatch, number, error, times=1):
    """The ``number``-th training raises ``error``, and so do the next ``times`` − 1."""
    train, calls = stability.train_twins, []

    def failing(*arguments, **options):
        calls.append(1)
        if number <= len(calls) < number + times:
            raise error
        return train(*arguments, **options)

    monkeypatch.setattr(stability, "train_twins", failing, raising=False)


def test_the_tables_of_a_point(fake):
    s = study()
    tables = run_point(s, s.points()[0])
    assert set(tables) == set(TABLES)
    assert list(tables["summary"].columns[:6]) == PAIR
    assert len(tables["summary"]) == 2
    assert len(tables["trajectories"]) == 2 * 4
    assert tables["trajectories"]["time"].max() == pytest.approx(0.3)
    assert len(tables["spectra"]) == 4 * 7
    assert list(tables["spectra"]["eigenvalue"][:8]) == [0, 1, 2, 3, 4, 5, 6, 0]
    run_row = tables["assumptions"].query("replaced == -1")
    assert list(run_row["replacement"]) == [-1]
    pairs = tables["assumptions"].query("replaced >= 0")
    assert [tuple(p) for p in pairs[PAIR].to_numpy()] == [tuple(p) for p in tables["summary"][PAIR].to_numpy()]
    assert not any(table.isna().any().any() for name, table in tables.items() if name != "assumptions")


def test_what_the_study_says_reaches_the_training(fake):
    s = study("optimizer=sgd", "lr=0.2", "output_metric=squared", "mass=0.5")
    run_point(s, s.points()[0])
    ((n, options),) = fake
    assert (n, options["lr"], options["mass"], options["scale"]) == (6, 0.2, 0.5, "none")
    assert (options["output_metric"], options["steps"], options["loss"]) == ("squared", 3, "squared")
    assert options["held_out"].shape == (200, 64)


def test_one_sample_with_several_replacements_keeps_its_rows_apart(fake):
    s = study("n=1", "replacements=3")
    tables = run_point(s, s.points()[0])
    assert not tables["summary"].duplicated(PAIR).any()
    pairs = tables["assumptions"].query("replaced >= 0")
    assert sorted(pairs["replacement"]) == sorted(tables["summary"]["replacement"])


def test_a_number_that_is_none_is_a_numerical_failure(fake, monkeypatch):
    def train(*arguments, **options):
        result = fake_train_twins(*arguments, **options)
        result.pairs[0]["xi"] = float("nan")
        return result

    monkeypatch.setattr(stability, "train_twins", train)
    with pytest.raises(NumericalError, match="not a number in xi"):
        run_point(study(), study().points()[0])


def test_a_study_runs_once_and_continues_where_it_was(fake, tmp_path):
    results = run_study(study(), tmp_path, progress=False)
    assert len(fake) == 8
    assert len(results.summary) == 16
    assert not results.summary.duplicated(PAIR).any()
    pd.testing.assert_frame_equal(load_results(tmp_path).summary, results.summary)
    again = run_study(study("workers=2"), tmp_path, progress=False)
    assert len(fake) == 8
    pd.testing.assert_frame_equal(again.summary, results.summary)
    (tmp_path / "points" / study().points()[0].key / "point.json").unlink()
    run_study(study(), tmp_path, progress=False)
    assert len(fake) == 9
    record = json.loads((tmp_path / "points" / study().points()[0].key / "point.json").read_text())
    assert record["seconds"] >= 0


def test_the_smallest_points_try_the_step_and_then_long_ones_come_first(fake, tmp_path):
    run_study(study("n=8,6,12", "seeds=1"), tmp_path, progress=False)
    assert [n for n, _ in fake] == [6] * 2 + [12] * 2 + [8] * 2
    digits = Study.from_toml("digits")
    assert work(digits, digits.points()[-1]) > work(digits, digits.points()[0])


def test_an_interrupt_loses_no_finished_point(fake, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=r"3 of 8 points .* kept .*; the same command continues"):
            run_study(study(), tmp_path, progress=False)
    assert len(load_results(tmp_path).summary) == 6
    assert len(run_study(study(), tmp_path, progress=False).summary) == 16
    assert len(fake) == 3 + 5


def test_a_numerical_failure_of_one_point_lets_the_others_finish(fake, monkeypatch, tmp_path):
    fail_at(monkeypatch, 2, NumericalError("inner system is not positive definite", where="step 3", value=-1e-3))
    with pytest.raises(NumericalError, match=r"1 of 8 points failed, the first at n=6, .* step 3: .*7 of 8 points"):
        run_study(study(), tmp_path, progress=False)
    assert len(load_results(tmp_path).summary) == 14


def refuse_steps(monkeypatch, limits):
    """A point does not bear its step where ``limits(n, mass)`` is a number."""
    train, tried = stability.train_twins, []

    def refusing(model, x, *arguments, **options):
        tried.append((len(x), options["mass"]))
        if limit := limits(*tried[-1]):
            raise StepTooLargeError(options["lr"], limit, "step 0")
        return train(model, x, *arguments, **options)

    monkeypatch.setattr(stability, "train_twins", refusing)
    return tried


def test_points_that_do_not_bear_the_step_let_the_others_finish(fake, monkeypatch, tmp_path):
    refuse_steps(monkeypatch, lambda n, mass: 0.16 / n if mass < 1 else None)
    with pytest.raises(ValueError, match="too large") as failure:
        run_study(study(), tmp_path, progress=False)
    assert str(failure.value) == (
        "lr = 0.1 is too large at 4 of 8 points, the first n=6, width=8, mass=0.1, seed=0: step 0 needs lr < 2/λ_max = "
        "0.02667, the strictest of them lr < 0.01333; write lr = 0.01 or less; 4 of 8 points are finished and kept in "
        f"{tmp_path}, `stability report {tmp_path}` draws them"
    )
    assert set(load_results(tmp_path).summary["mass"]) == {1.0}


def test_a_study_of_which_no_small_point_bears_the_step_ends_at_once(fake, monkeypatch, tmp_path):
    tried = refuse_steps(monkeypatch, lambda n, mass: 0.09)
    with pytest.raises(
        ValueError, match=r"at 4 of 8 points, .*; 4 points were not tried; 0 of 8 points .* kept in \S+$"
    ):
        run_study(study(), tmp_path, progress=False)
    assert len(tried) == 4
    assert not list(tmp_path.glob("*.parquet"))
    monkeypatch.setattr(stability, "train_twins", fake_train_twins)
    assert len(run_study(study("lr=0.05"), tmp_path, progress=False).summary) == 16  # the folder is not spoilt


def test_a_failed_step_outranks_a_numerical_failure_and_both_are_said(fake, monkeypatch, tmp_path):
    fail_at(monkeypatch, 6, NumericalError("not positive definite"))
    refuse_steps(monkeypatch, lambda n, mass: 0.05 if (n, mass) == (6, 1) else None)
    with pytest.raises(
        ValueError, match=r"too large at 2 of 8 points, .*; 1 of 8 points failed, the first at n=12, .* 5 of 8"
    ):
        run_study(study(), tmp_path, progress=False)


def test_other_bad_input_of_one_point_names_it_and_lets_the_others_finish(fake, monkeypatch, tmp_path):
    fail_at(monkeypatch, 2, ValueError("targets should be [6, 10]"))
    with pytest.raises(ValueError, match=r"1 of 8 points failed, .* n=6, width=8, mass=1, seed=1: targets should be"):
        run_study(study(), tmp_path, progress=False)
    assert len(load_results(tmp_path).summary) == 14


def test_input_that_no_small_point_can_do_with_ends_the_study_at_once(fake, monkeypatch, tmp_path):
    fail_at(monkeypatch, 1, ValueError("targets should be [6, 10]"), times=99)
    with pytest.raises(ValueError, match=r"4 of 8 points failed, .* targets should be .*; 4 points were not tried"):
        run_study(study(), tmp_path, progress=False)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 TB")])
def test_too_little_memory_is_said(error, fake, monkeypatch, tmp_path):
    fail_at(monkeypatch, 1, error, times=3)
    with pytest.raises(ValueError, match=r"n=6, .*: not enough memory on cpu; write a smaller n or width"):
        run_study(study(), tmp_path, progress=False)


def test_what_may_pass_is_tried_again_and_recorded_at_the_third_time(fake, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        fail_at(patch, 3, RuntimeError("a mistake of ours"), times=2)
        run_study(study(), tmp_path / "twice", progress=False)
    first = load_results(tmp_path / "twice")
    records = [json.loads(path.read_text()) for path in (tmp_path / "twice/points").glob("*/point.json")]
    assert sorted(record["attempts"] for record in records) == [1] * 7 + [3]
    fail_at(monkeypatch, 3, RuntimeError("a mistake of ours"), times=3)
    with pytest.raises(PointsFailed, match=r"1 of 8 points failed, 3 times, .*RuntimeError: a mistake of ours"):
        run_study(study(), tmp_path / "thrice", progress=False)
    assert len(load_results(tmp_path / "thrice").summary) == 14
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "thrice/failed").iterdir()]
    assert "in failing\n" in record["traceback"]
    run_study(study(), tmp_path / "thrice", progress=False)
    pd.testing.assert_frame_equal(load_results(tmp_path / "thrice").summary, first.summary)
    assert not list((tmp_path / "thrice/failed").iterdir())
    runs = [json.loads(path.read_text()) for path in (tmp_path / "thrice/runs").iterdir()]
    assert sorted((run["finished"], run["failed"]) for run in runs) == [(1, 0), (7, 1)]
    assert all(run["seconds"] > 0 and run["torch"] and run["commit"] and run["host"] for run in runs)


def test_a_lost_worker_says_what_is_kept_and_how_to_continue(monkeypatch, tmp_path):
    def lose(*_, **__):
        raise WorkerLost("a worker process died")
        yield

    monkeypatch.setattr("studies.running.engines.run_tasks", lose)
    with pytest.raises(WorkerLost, match=r"died; 0 of 8 points are finished and kept .*; the same command continues"):
        run_study(study(), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("override", "words"), [("n=2000", "1797 rows"), ("device=cuda:99", r"device=cuda:99 .* write device=cpu")]
)
def test_what_cannot_run_is_refused_before_anything_is_made(fake, override, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run_study(study(override), tmp_path / "out", progress=False)
    assert not fake
    assert not (tmp_path / "out").exists()


def test_worker_count():
    assert worker_count(study("workers=5")) == 5
    assert worker_count(study("workers=auto")) >= 1
    assert worker_count(study("workers=auto", "device=cuda")) == 1
    assert worker_count(study("workers=auto", "threads=256")) == 1


def test_progress_goes_to_stderr_and_counts_points(fake, tmp_path, capsys):
    run_study(study(), tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "8 of 8 points" in err
    assert "left" in err
    run_study(study(), tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_two_processes_give_the_bits_of_one_and_the_rows_that_theory_asks_for(tmp_path):
    small = ["seeds=1", "mass=1"]
    one = run_study(study(*small, "workers=1"), tmp_path / "one", progress=False)
    two = run_study(study(*small, "workers=2"), tmp_path / "two", progress=False)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)
    rows = one.summary
    assert not rows.drop(columns="flags").isna().any().any()
    for larger, smaller in [
        *[("T0", "T1"), ("T1", "T1c"), ("T1c", "T2"), ("T2", "T3"), ("T0", "vacuity_floor"), ("T4", "measured_l2")],
        *[("T5", "measured_sup"), ("T5_others", "measured_others"), ("path_sup", "measured_sup")],
    ]:
        assert (rows[larger] * (1 + 1e-9) >= rows[smaller]).all(), (larger, smaller)
    assert list(rows.groupby(["replaced", "replacement"])["n"].nunique()) == [2, 2]  # paired over n


@pytest.mark.parametrize(
    ("overrides", "assumption"),
    [
        (["n=12", "width=1", "hidden=1"], "positive rate"),  # n·p = 120 outputs, 85 parameters
        (["n=6", "activation=relu"], "C¹ activations"),
        (["n=1", "replacements=3"], None),
    ],
)
def test_what_theory_does_not_cover_runs_with_a_verdict(overrides, assumption):
    s = study("mass=1", "seeds=1", *overrides)
    tables = run_point(s, s.points()[0])
    verdicts = tables["assumptions"].set_index("assumption")["verdict"]
    assert assumption is None or verdicts[assumption] == "violated"
    if assumption == "positive rate":
        assert (tables["summary"][["T0", "T1", "T1c", "T2"]] == float("inf")).all().all()
        assert (tables["summary"]["xi"] == 0).all()
        assert tables["summary"]["flags"].str.contains("n·p = 120 > 85").all()
    # Every pair has the same list of verdicts, also where one sample has several twins.
    lists = tables["assumptions"].query("replaced >= 0").groupby(PAIR)["assumption"].agg(tuple)
    assert len(lists) == s.grid.replacements
    assert len(set(lists)) == 1


def test_the_interrupt_of_a_terminal_ends_a_pool_at_once_and_keeps_what_is_finished(tmp_path):
    program = f"""
        import signal, sys
        from studies import Study, run_study
        from studies.running import runner
        from tests.studies.fake_twins import slow_attempt
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what runs in the background
        runner.attempt = slow_attempt
        if __name__ == "__main__":
            try:
                run_study(Study.from_toml("digits", {[*SMALL, "workers=2"]!r}), {str(tmp_path)!r}, progress=False)
            except KeyboardInterrupt as interrupt:
                print(interrupt)
                sys.exit(130)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if any(tmp_path.glob("points/n*")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "points are finished and kept" in out
    assert 1 <= len(list(tmp_path.glob("points/n*"))) < 8
