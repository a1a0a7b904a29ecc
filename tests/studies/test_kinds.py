"""Kinds of study: the registry, and a kind of one's own through every command."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from studies import Study, load_results, run_study
from studies.cli import main
from studies.definition.config import ConfigError
from studies.definition.kinds import KINDS, Kind, kind_of
from studies.results.compare import compare_results

OWN = 'kind = "tests.studies.light_kind:LIGHT"\ntitle = "Light"\n[grid]\nsize = [1, 3]\nseeds = 2\n[quick]\nseeds = 1\n'


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent.parent.parent)])
    (tmp_path / "light.toml").write_text(OWN)
    return tmp_path / "light.toml"


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_one(name):
    kind = kind_of(name)
    assert isinstance(kind, Kind)
    assert kind.name == name
    assert next(iter(kind.tables)) == "summary"
    assert issubclass(kind.config, Study)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("twin", "did you mean twins?"), ("no.module:KIND", "cannot be imported"), ("math:pi", "is a float; expected a")],
)
def test_a_kind_that_is_none(kind, words, tmp_path):
    (tmp_path / "study.toml").write_text(f'kind = "{kind}"\n[grid]\nn = 6\n')
    with pytest.raises(ConfigError, match="kind = ") as failure:
        Study.from_toml(tmp_path / "study.toml")
    assert words in str(failure.value)


def test_a_kind_of_ones_own_runs_is_drawn_resumed_and_compared(own, capsys):
    assert main(["run", "light.toml", "--out", "one"]) == 0
    frames = load_results("one")
    assert list(frames.summary.columns) == ["size", "seed", "draw", "value"]
    assert list(frames.summary["size"]) == [1] * 6 + [3] * 6
    page = Path("one/report.html").read_text(encoding="utf-8")
    assert f"The mean is {frames.summary['value'].mean():.3f}." in page
    assert "<script" not in page
    assert main(["run", "light.toml", "grid.power=2.0,3.0", "--out", "two", "--quick"]) == 0
    assert load_results("two").summary["power"].nunique() == 2
    point = Study.from_toml("light.toml").points()[0]
    record = json.loads(Path(f"one/points/{point.key}/point.json").read_text())
    assert record["host"]
    assert record["commit"]
    Path(f"one/points/{point.key}/point.json").unlink()
    assert main(["resume", "one", "workers=1"]) == 0
    pd.testing.assert_frame_equal(load_results("one").summary, frames.summary)
    capsys.readouterr()
    assert main(["resume", "one", "power=3"]) == 2
    assert "power is 2.0 there, 3.0 here" in capsys.readouterr().err
    assert main(["run", "light.toml", "power=2.5", "--out", "three"]) == 0
    capsys.readouterr()
    assert main(["compare", "one", "three"]) == 0
    shown = capsys.readouterr().out
    assert "power  2.0   2.5" in shown
    assert "12 rows in both, 0 only in one" in shown
    found = compare_results("one", "three")
    row = found.numbers.set_index("column").loc["value"]
    ratios = load_results("three").summary["value"] / frames.summary["value"]
    assert row["right/left"] == pytest.approx(ratios.median())
    assert not found.equal
    assert compare_results("one", "one").equal


def test_a_finished_study_needs_no_engine(own, capsys, monkeypatch):
    assert main(["run", "light.toml", "workers=1", "--out", "one"]) == 0

    def absent(*_, **__):
        raise ValueError("no such engine here")

    monkeypatch.setattr("studies.running.engines.run_tasks", absent)
    assert main(["resume", "one", "engine=ray"]) == 0
    next(Path("one/points").iterdir()).joinpath("point.json").unlink()
    assert main(["resume", "one", "engine=ray"]) == 2


def test_running_what_is_no_study_says_what_one_is(tmp_path):
    words = r"run_study takes a studies\.Study, got str 'digits'; .*: Study\.from_toml\(\"digits\"\)"
    with pytest.raises(TypeError, match=words):
        run_study("digits", tmp_path)


def test_wrong_input_of_the_new_commands_is_one_line(own, capsys):
    assert main(["resume", "nowhere"]) == 2
    assert "is not a results folder" in capsys.readouterr().err
    assert main(["compare", "nowhere", "elsewhere"]) == 2
    assert "no summary.parquet" in capsys.readouterr().err


def test_a_plan_names_points_time_and_memory(own, capsys):
    assert main(["plan", "light.toml", "wait=0.2", "workers=1"]) == 0
    shown = capsys.readouterr().out
    assert "4 points, 1 at a time" in shown
    assert "iB" in shown
    total = shown.splitlines()[-1]
    assert "of memory at a time" in total
    seconds = float(total.split("about ")[1].split(" s")[0])
    assert 0.8 <= seconds <= 4  # four points of 0.2 s and what a busy machine adds
    assert not Path("results").exists()  # nothing is written


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_a_plan_tells_starting_from_stepping(own, monkeypatch, steps):
    """First run of a process 5 s, a point 0.5 s + 0.25 s a step, on a clock that nothing else moves."""
    from studies.running import plan as planning
    from tests.studies.light_kind import LIGHT

    clock, runs = [0.0], []

    def run_point(study, point):
        runs.append(study.steps)
        clock[0] += (5.0 if len(runs) == 1 else 0.0) + 0.5 + 0.25 * study.steps

    class Stepping(type(Study.from_toml("light.toml"))):
        steps: int = 100

        @property
        def kind_object(self):
            return dataclasses.replace(LIGHT, run_point=run_point)

    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])
    study = Stepping.model_validate(Study.from_toml("light.toml").model_dump() | {"steps": steps})
    found = planning.measure(study, study.points()[0])
    assert (found.start, found.seconds) == pytest.approx((5.0, 0.5 + 0.25 * steps))
    assert all(0 < count <= max(steps // 10, 3) for count in runs)  # never more than a tenth of the study's


def test_a_study_with_an_axis_of_steps_is_calibrated_by_whole_points():
    """Such a point says itself how many steps it has: a tenth of them cannot be asked for."""
    from studies.running.plan import measure

    runs = []
    kind = SimpleNamespace(run_point=lambda study, point: runs.append(study.steps))
    study = SimpleNamespace(steps=100, axes=lambda: {"steps": [50, 100]}, kind_object=kind)
    assert measure(study, None).start == 0
    assert runs == [100]


def test_own_study_from_python(own):
    study = Study.from_toml("light.toml", ["size=2", "seeds=1"])
    frames = run_study(study, "python", progress=False)
    assert frames.summary["value"].mean() == pytest.approx(4, abs=2)
