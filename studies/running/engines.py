"""Where points are computed: in this process, or in a pool of them. Both give the same bits.

An engine is a generator of ``(item, task(item))`` in the order of completion. Closing it early stops the work at once.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerLost(RuntimeError):
    """A worker process died without an exception: killed by the system, or it could not start."""


def run_tasks(
    task: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 1, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    """``task`` of every item, in this process for one worker, else in a pool; ``threads`` of arithmetic in each.

    >>> sorted(run_tasks(abs, [-2, 3]))
    [(-2, 2), (3, 3)]
    """
    if min(workers, len(items)) > 1:
        return process_pool(task, items, workers=min(workers, len(items)), threads=threads)
    return in_process(task, items, threads=threads)


def in_process(
    task: Callable[[Item], Result], items: Sequence[Item], *, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    for item in items:
        yield item, _call(task, item, threads)


def process_pool(
    task: Callable[[Item], Result], items: Sequence[Item], *, workers: int, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Spawned, not forked: a forked child inherits torch's thread pools in an unusable state.

    ``task`` must be importable by name, not from the main script. Raises WorkerLost when a process dies.
    """
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    completed = False
    try:
        with (
            environment(_child_variables(threads)),
            _without_main(),
        ):  # children start during submit and take these over
            waiting = {pool.submit(_call, task, item, threads): item for item in items}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
        completed = True
    except BrokenProcessPool as error:
        raise WorkerLost(
            "a worker process died (most often killed by the system for want of memory: try fewer workers)"
        ) from error
    finally:
        if not completed:  # what is still being computed is of no use to anybody
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Spawned children run the parent's script again to find names in it. Ours need none, and a script without
    ``if __name__ == "__main__":``, or one read from stdin, would fail there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a parent that is killed must not leave children computing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(task: Callable[[Item], Result], item: Item, threads: int) -> Result:
    with thread_limit(threads):
        return task(item)


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Run torch and the BLAS below numpy and scipy on this many threads, then as before: the count decides the bits."""
    import scipy.linalg  # noqa: F401  its BLAS has to be loaded to be limited
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    with threadpool_limits(threads):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _child_variables(threads: int) -> dict[str, str]:
    counts = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], str(threads))
    # PASSIVE: waiting threads sleep. Spinning ones stall each other for milliseconds when cores are shared.
    # MALLOC_: glibc hands every freed matrix of some MB back to the system and has it faulted in again at the next
    # step, a fifth of the time of a point at n = 48. With these (32 MiB, 1 GiB) it keeps them.
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    return counts | {"OMP_WAIT_POLICY": "PASSIVE"} | keep


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the children started inside; the parent's are put back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
