"""Points on a Ray cluster: many machines, and GPUs by the task. Needs the extra ``ray``; nothing here is imported without.

The driver alone writes results. Every machine needs this package, and what the study names (a model, a data file), under
the same names; the driver's module search path is handed to the workers, which is all that one machine needs.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from studies.running.engines import (
    ATTEMPTS,
    Item,
    OnLost,
    Result,
    WorkerLost,
    call_in_child,
    child_variables,
    raise_lost,
)


def ray_tasks(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int = 0,
    threads: int = 1,
    gpus: float = 0.0,
    cluster: str = "",
    attempts: int = ATTEMPTS,
    on_lost: OnLost = raise_lost,
) -> Iterator[tuple[Item, Result]]:
    """``task`` of every item as a Ray task of ``threads`` CPUs and ``gpus`` GPUs.

    cluster: the address of a running cluster ("auto": the one of this machine); "" starts one here with ``workers`` ×
        ``threads`` CPUs and ends it after. workers: tasks in flight; 0: as many as the cluster has room for.

    Raises ValueError where Ray is not installed, WorkerLost as :func:`studies.running.pool.process_pool` does.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    variables = child_variables(threads) | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    surroundings = {"env_vars": variables}
    if ours:
        place = {"address": cluster} if cluster else {"num_cpus": max(workers, 1) * threads, "include_dashboard": False}
        try:
            ray.init(**place, log_to_driver=False, logging_level="ERROR", runtime_env=surroundings)
        except ConnectionError as error:
            raise ValueError(
                f'cluster = {cluster}: no Ray cluster answers there; write cluster="" to start one'
            ) from error
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(call_in_child)
    if not ours:  # a session of the caller's own, whose workers know nothing of the study
        remote = remote.options(runtime_env=surroundings)
    waiting, lost, flying = iter(items), Counter(), {}
    room = workers or max(int(ray.cluster_resources().get("CPU", 1) // threads), 1)

    def supply() -> None:
        while len(flying) < room and (item := next(waiting, None)) is not None:
            flying[remote.remote(task, item, threads)] = item

    try:
        supply()
        while flying:
            (ready, *_), _ = ray.wait(list(flying), num_returns=1)
            item = flying.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (
                ray.exceptions.WorkerCrashedError,
                ray.exceptions.NodeDiedError,
                ray.exceptions.OutOfMemoryError,
            ) as error:
                lost[item] += 1
                if lost[item] < attempts:
                    flying[remote.remote(task, item, threads)] = item
                    continue
                result = on_lost(item, WorkerLost(f"a Ray worker died: {str(error).splitlines()[0]}"))
            supply()  # before the result is given, and stored: nobody waits for the disk
            yield item, result
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _ray():
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ValueError(
            "engine = ray needs Ray: pip install 'contraction-stability[ray]', or write engine=pool"
        ) from error
    return ray
