"""Engines and store under what happens to processes: killed workers, a killed study, two studies on one folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from studies import Study, load_results, run_study
from studies.running.engines import PointsFailed, WorkerLost
from studies.running.pool import process_pool

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = 'kind = "tests.studies.light_kind:LIGHT"\n[grid]\nsize = [1, 2, 3, 4, 5]\nseeds = 4\n'


def light(tmp_path, *overrides):
    (tmp_path / "light.toml").write_text(TEXT)
    return Study.from_toml(tmp_path / "light.toml", overrides)


def numbers(out):
    return load_results(out).summary


@pytest.fixture
def expected(tmp_path):
    return run_study(light(tmp_path, "engine=in-process"), tmp_path / "expected", progress=False).summary


def kill_once(item):
    file, number = item
    if number == 1 and not os.path.exists(file):
        Path(file).write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def kill_always(item):
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_the_item_of_a_killed_worker_is_given_out_again(tmp_path):
    items = [(str(tmp_path / "killed"), number) for number in range(4)]
    assert sorted(number for _, number in process_pool(kill_once, items, workers=2)) == [0, 1, 2, 3]
    assert (tmp_path / "killed").exists()


def test_an_item_that_kills_three_workers_is_given_up_and_the_rest_is_done():
    lost = []
    given = process_pool(kill_always, range(4), workers=2, on_lost=lambda item, error: lost.append(error))
    assert sorted(item for item, _ in given) == [0, 1, 2, 3]
    assert len(lost) == 1
    assert isinstance(lost[0], WorkerLost)
    assert "signal 9" in str(lost[0])


@pytest.mark.slow
def test_a_study_outlives_two_deaths_at_one_point_and_records_the_third(tmp_path, expected):
    (tmp_path / "deaths").write_text("one\ntwo")
    study = light(tmp_path, "workers=2", f"deaths={tmp_path / 'deaths'}")
    run_study(study, tmp_path / "two", progress=False)
    pd.testing.assert_frame_equal(numbers(tmp_path / "two"), expected, check_exact=True)
    (tmp_path / "deaths").write_text("\n".join("x" * 3))
    study = light(tmp_path, "workers=1", "engine=pool", f"deaths={tmp_path / 'deaths'}", "power=3")
    with pytest.raises(PointsFailed, match=r"1 of 20 points failed, 3 times, .*signal 9.* 19 of 20 points"):
        run_study(study, tmp_path / "three", progress=False)
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "three/failed").iterdir()]
    assert record["kind"] == "worker"
    assert record["attempts"] == 3
    assert len(numbers(tmp_path / "three")) == 19 * 3


PROGRAM = """
import sys
from studies import Study, run_study
run_study(Study.from_toml(sys.argv[1], sys.argv[3:]), sys.argv[2], progress=False)
"""


def start(tmp_path, out, *overrides):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "light.toml"), str(out), *overrides]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for_a_point(out, process):
    while process.poll() is None and not any(out.glob("points/size*/point.json")):
        time.sleep(0.02)


def test_two_processes_on_one_folder_share_the_work_and_corrupt_nothing(tmp_path, expected):
    out = tmp_path / "shared"
    both = [start(tmp_path, out, "wait=0.05", "workers=1") for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    pd.testing.assert_frame_equal(numbers(out), expected, check_exact=True)
    assert len(list((out / "points").iterdir())) == 20  # nothing half-written is left
    assert 1 <= len(list((out / "runs").iterdir())) <= 2


def test_a_study_killed_at_random_moments_continues_and_ends_with_the_same_bits(tmp_path, expected):
    out, generator = tmp_path / "killed", random.Random(0)
    light(tmp_path)
    for _ in range(3):
        process = start(tmp_path, out, "wait=0.05", "workers=1")
        wait_for_a_point(out, process)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stderr.close()
    before = len(list(out.glob("points/size*")))
    assert before >= 1
    run_study(light(tmp_path, "wait=0.05"), out, progress=False)
    pd.testing.assert_frame_equal(numbers(out), expected, check_exact=True)
