import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from studies.running.engines import WorkerLost, environment, in_process, run_tasks, thread_limit
from studies.running.pool import process_pool


def where(item):
    return item, os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY")


def somewhere(seed):
    time.sleep(0.5)  # long enough for both children to take one
    return where(seed), arithmetic(seed)


def arithmetic(seed):
    import torch

    x = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x @ x).sum(0).numpy(), np.linalg.eigvalsh((x @ x.mT).numpy())


def die_on_three(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def fail_on_three(item):
    if item == 3:
        raise ValueError("three")
    return item


def sleep_long(item):
    if item:
        time.sleep(60)
    return os.getpid()


def test_a_pool_gives_its_children_their_environment_and_the_bits_of_one_process():
    before = dict(os.environ)
    results = dict(process_pool(somewhere, range(4), workers=2, threads=1))
    assert dict(os.environ) == before
    assert sorted(results) == list(range(4))
    assert all(item == place[0] for item, (place, _) in results.items())
    assert os.getpid() not in {pid for (_, pid, _, _), _ in results.values()}
    assert {(threads, policy) for (_, _, threads, policy), _ in results.values()} == {("1", "PASSIVE")}
    here = dict(in_process(arithmetic, range(4), threads=1))
    for item, (_, there) in results.items():
        for a, b in zip(here[item], there, strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_worker_or_one_item_stays_in_this_process():
    assert [pid for _, (_, pid, _, _) in run_tasks(where, [1, 2], workers=1)] == [os.getpid()] * 2
    assert [pid for _, (_, pid, _, _) in run_tasks(where, [1], workers=1)] == [os.getpid()]
    assert list(run_tasks(where, [], workers=4)) == []


def test_a_killed_worker_is_a_clear_error_and_earlier_results_were_given():
    given = []
    with pytest.raises(WorkerLost, match="a worker process died"):
        given.extend(item for item, _ in process_pool(die_on_three, [1, 2, 3, 4], workers=1))
    assert set(given) <= {1, 2}
    assert not multiprocessing.active_children()


def test_an_error_of_the_task_reaches_the_caller():
    with pytest.raises(ValueError, match="three"):
        list(process_pool(fail_on_three, [3], workers=1))


def test_closing_early_stops_the_children_at_once():
    start = time.monotonic()
    outcomes = process_pool(sleep_long, [0, 1, 2, 3], workers=1)
    next(outcomes)
    outcomes.close()
    assert time.monotonic() - start < 45
    assert not multiprocessing.active_children()


def test_children_of_a_killed_parent_end_too():
    program = (
        "from studies.running.pool import process_pool\n"
        "from tests.studies.test_engines import sleep_long\n"
        "print(next(process_pool(sleep_long, [0, 1, 2], workers=1))[1], flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


@pytest.mark.parametrize("from_stdin", [True, False])
def test_a_script_without_a_main_guard_can_start_a_pool(from_stdin, tmp_path):
    program = "from studies.running.pool import process_pool\nprint(sorted(process_pool(abs, [-1, 2], workers=1)))\n"
    (tmp_path / "script.py").write_text(program)
    command = [sys.executable, "-" if from_stdin else tmp_path / "script.py"]
    answer = subprocess.run(command, input=program, capture_output=True, text=True)
    assert answer.stdout == "[(-1, 1), (2, 2)]\n", answer.stderr


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # an orphan that nobody reaps is not alive either
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_threads_are_limited_and_restored():
    import scipy.linalg  # noqa: F401 (a pool that would else appear inside)
    import torch
    from threadpoolctl import threadpool_info

    before = torch.get_num_threads(), threadpool_info()
    with thread_limit(3):
        assert torch.get_num_threads() == 3
        # other libraries that happen to be loaded may be built for one thread (the OpenBLAS of a cone solver is)
        ours = [
            pool for pool in threadpool_info() if any(name in pool["filepath"] for name in ("torch", "numpy", "scipy"))
        ]
        assert {pool["num_threads"] for pool in ours} == {3}
    assert (torch.get_num_threads(), threadpool_info()) == before


@pytest.mark.parametrize("change", [lambda: thread_limit(3), lambda: environment({"A_STUDY": "3", "B_STUDY": "3"})])
def test_what_was_changed_is_put_back_after_an_error_too(change, monkeypatch):
    import torch

    def state():
        return torch.get_num_threads(), dict(os.environ)

    monkeypatch.setenv("A_STUDY", "old")
    monkeypatch.delenv("B_STUDY", raising=False)
    before = state()
    context = change()
    context.__enter__()
    assert state() != before
    assert not context.__exit__(KeyError, KeyError(), None)
    assert state() == before
