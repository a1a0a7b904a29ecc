"""The clock of budgets in seconds."""

from collections.abc import Callable, Mapping
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


def seconds_of(config: Mapping) -> str:
    """What the seconds of a study are, by its config: "CPU", "wall", or "CPU or wall" where the device is an axis of both.

    >>> seconds_of({"device": "cuda:1"}), seconds_of({"grid": {"device": ["cpu", "cuda"]}})
    ('wall', 'CPU or wall')
    """
    devices = config.get("grid", {}).get("device") or [config.get("device", "cpu")]
    return " or ".join(sorted({"CPU" if device == "cpu" else "wall" for device in devices}))
