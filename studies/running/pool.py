"""A pool of processes on this machine that outlives its workers: one that dies is replaced, its item given out again."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from types import ModuleType

from studies.running.engines import (
    ATTEMPTS,
    Item,
    OnLost,
    Result,
    WorkerLost,
    call_in_child,
    child_variables,
    environment,
    raise_lost,
)

READY, DONE, RAISED = "ready", "done", "raised"


class _Worker:
    """A process and the two-way pipe to it; ``item`` is what it works on."""

    def __init__(self, task: Callable, threads: int):
        context = multiprocessing.get_context(
            "spawn"
        )  # a forked child inherits torch's thread pools in an unusable state
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, task, threads))
        self.item, self.ready = None, False
        with environment(child_variables(threads)), _without_main():  # the child takes these over
            self.process.start()
        theirs.close()  # so that the end of the child closes the pipe

    def give(self, item) -> None:
        self.item = item
        self.pipe.send((item,))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def process_pool(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    threads: int = 1,
    attempts: int = ATTEMPTS,
    on_lost: OnLost = raise_lost,
) -> Iterator[tuple[Item, Result]]:
    """``task`` of every item in ``workers`` processes, spawned as there is work for them.

    ``task`` must be importable by name, not from the main script. Where a process dies ``attempts`` times over the same
    item, ``on_lost`` says what is given in its place; it raises WorkerLost if nothing else was asked for. A process that
    dies before it is ready (it cannot import the task) ends the pool at once.
    """
    waiting, again, lost, nothing = iter(items), [], Counter(), object()
    crew: list[_Worker] = []

    def supply() -> None:
        """Give every idle worker an item, and start those that there is work for."""
        while len(idle := [worker for worker in crew if worker.item is None]) or len(crew) < workers:
            item = again.pop() if again else next(waiting, nothing)
            if item is nothing:
                return
            worker = idle[0] if idle else _Worker(task, threads)
            if not idle:
                crew.append(worker)
            try:
                worker.give(item)
            except OSError:  # it died while it had nothing to do
                crew.remove(worker)
                worker.end()
                again.append(item)

    try:
        supply()
        while busy := {worker.pipe: worker for worker in crew if worker.item is not None}:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]
                try:
                    what, value = pipe.recv()
                except (EOFError, OSError):
                    item = worker.item
                    crew.remove(worker)
                    worker.process.join(5)
                    worker.end()
                    error = _lost(worker)
                    if not worker.ready and (worker.process.exitcode or 0) >= 0:
                        raise error from None  # it could not start, and no other one will
                    lost[item] += 1
                    if lost[item] < attempts:
                        again.append(item)
                        supply()
                    else:
                        supply()
                        yield item, on_lost(item, error)
                    continue
                if what == READY:
                    worker.ready = True
                elif what == RAISED:
                    raise value
                else:
                    item, worker.item = worker.item, None
                    supply()  # before the result is given, and stored: nobody waits for the disk
                    yield item, value
    finally:
        for worker in crew:  # idle ones too: they hold nothing, and would take their time to leave
            worker.process.kill()
        for worker in crew:
            worker.end()


def _lost(worker: _Worker) -> WorkerLost:
    code = worker.process.exitcode
    by = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    return WorkerLost(
        f"a worker process died ({by}; most often killed by the system for want of memory: try fewer workers)"
    )


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


def _serve(pipe: connection.Connection, task: Callable, threads: int) -> None:
    """The life of a worker: item after item until the pipe closes.

    Ctrl-C is left to the parent, whose end is the worker's too: a parent that is killed must not leave children computing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    pipe.send((READY, None))
    while True:
        try:
            (item,) = pipe.recv()
        except EOFError:
            return
        try:
            answer = (DONE, call_in_child(task, item, threads))
        except Exception as error:
            answer = (RAISED, error)
        pipe.send(answer)
