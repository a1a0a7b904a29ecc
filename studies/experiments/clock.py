"""The clock of budgets in seconds."""

from collections.abc import Callable
from time import perf_counter, process_time


def clock_of(device: str) -> Callable[[], float]:
    """On the CPU the seconds this process has computed, whatever else the machine does; on a GPU wall seconds, once all that
    was asked of the device is done.

    >>> clock_of("cpu").__name__
    'process_time'
    """
    if device == "cpu":
        return process_time

    def drained() -> float:
        import torch

        torch.cuda.synchronize(device)
        return perf_counter()

    return drained
