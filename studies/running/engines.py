"""Where points are computed: in this process, in a pool of processes, or on a Ray cluster. All give the same bits.

An engine is a generator of ``(item, task(item))`` in the order of completion. Closing it early stops the work at once. A
worker that dies in the middle of an item is replaced and the item given out again, ``attempts`` times in all.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
ATTEMPTS = 3


class WorkerLost(RuntimeError):
    """A worker died without an exception: killed by the system, or it could not start."""


class PointsFailed(RuntimeError):
    """Points failed that are nobody's input error: their tracebacks are in the folder's failed/, the rest is finished."""


# What comes in the place of a result where the workers of an item died ``attempts`` times.
OnLost = Callable[[Item, WorkerLost], Result]


def raise_lost(item: Item, error: WorkerLost) -> Result:
    raise error


def run_tasks(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    engine: str = "auto",
    workers: int = 1,
    threads: int = 1,
    gpus: float = 0.0,
    cluster: str = "",
    on_lost: OnLost = raise_lost,
) -> Iterator[tuple[Item, Result]]:
    """``task`` of every item; ``threads`` of arithmetic for each.

    ``engine``: "in-process", "pool", "ray", or "auto": a pool for more than one worker. Items are drawn from the iterable as
    they are given out. ``gpus`` (a share of one is allowed) and ``cluster``, an address, are Ray's.

    >>> sorted(run_tasks(abs, [-2, 3]))
    [(-2, 2), (3, 3)]
    """
    if engine == "ray":
        from studies.running.ray_engine import ray_tasks

        return ray_tasks(task, items, workers=workers, threads=threads, gpus=gpus, cluster=cluster, on_lost=on_lost)
    if engine == "pool" or (engine == "auto" and workers > 1):
        from studies.running.pool import process_pool

        return process_pool(task, items, workers=workers, threads=threads, on_lost=on_lost)
    return in_process(task, items, threads=threads)


def in_process(
    task: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    for item in items:
        yield item, call(task, item, threads)


def call(task: Callable[[Item], Result], item: Item, threads: int) -> Result:
    with thread_limit(threads):
        return task(item)


def call_in_child(task: Callable[[Item], Result], item: Item, threads: int) -> Result:
    """:func:`call` in a process that was started with :func:`child_variables`: libraries that it has yet to load take their
    number of threads from there, and a task that needs none of them does not wait for them."""
    return call(task, item, threads) if "torch" in sys.modules else task(item)


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


def child_variables(threads: int) -> dict[str, str]:
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
