"""A contender by the CPU seconds of this process: what a shared machine's other users take is not in them."""

from collections.abc import Callable
from dataclasses import dataclass
from time import process_time


@dataclass(frozen=True)
class OnCpu:
    """``run`` with the watch in hand (a ``Remote`` of :mod:`benchmarks.timing`).

    >>> OnCpu(lambda: None).seconds(3) >= 0
    True
    """

    run: Callable[[], object]

    def seconds(self, calls: int) -> float:
        start = process_time()
        for _ in range(calls):
            self.run()
        return (process_time() - start) / calls
