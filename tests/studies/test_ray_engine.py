"""The Ray engine: the same bits as in this process, and a killed worker. Skipped where Ray is not installed."""

import json

import pandas as pd
import pytest

from studies import Study, run_study
from studies.running.engines import PointsFailed
from tests.studies.test_many_processes import light

SMALL = ["n=6", "mass=1,0.1", "seeds=1", "replacements=1", "width=8", "steps=3", "workers=2"]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    yield ray
    ray.shutdown()


def test_without_ray_the_engine_says_what_to_install(tmp_path, monkeypatch):
    import builtins

    found = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition(".")[0] == "ray":
            raise ImportError("no ray")
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install 'contraction-stability\[ray\]'"):
        run_study(light(tmp_path, "engine=ray"), tmp_path / "out", progress=False)


def test_ray_gives_the_bits_of_one_process(cluster, tmp_path):
    here = run_study(Study.from_toml("digits", [*SMALL, "engine=in-process"]), tmp_path / "here", progress=False)
    there = run_study(Study.from_toml("digits", [*SMALL, "engine=ray"]), tmp_path / "ray", progress=False)
    pd.testing.assert_frame_equal(here.summary, there.summary, check_exact=True)
    pd.testing.assert_frame_equal(here.trajectories, there.trajectories, check_exact=True)


def test_a_killed_ray_worker_is_replaced_and_the_third_death_recorded(cluster, tmp_path):
    expected = run_study(light(tmp_path), tmp_path / "expected", progress=False)
    (tmp_path / "deaths").write_text("one\ntwo")
    study = light(tmp_path, "engine=ray", "workers=2", f"deaths={tmp_path / 'deaths'}")
    found = run_study(study, tmp_path / "two", progress=False)
    pd.testing.assert_frame_equal(found.summary, expected.summary, check_exact=True)
    assert not (tmp_path / "deaths").read_text()  # both deaths happened
    (tmp_path / "deaths").write_text("\n".join("x" * 3))
    study = light(tmp_path, "engine=ray", "workers=1", f"deaths={tmp_path / 'deaths'}", "power=3")
    with pytest.raises(PointsFailed, match="1 of 20 points failed, 3 times"):
        run_study(study, tmp_path / "three", progress=False)
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "three/failed").iterdir()]
    assert record["kind"] == "worker"
