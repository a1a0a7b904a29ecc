"""Interleaved timing: A B C A B C …, medians, and ratios taken within a round, so that a slow minute meets all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter

import numpy as np
import torch

MOST_CALLS = 1000


@dataclass(frozen=True)
class Settings:
    """``rounds`` of one turn each; a turn repeats its call until about ``turn`` seconds, to resolve short calls."""

    rounds: int = 15
    turn: float = 0.05
    device: str = "cpu"

    def synchronize(self) -> None:
        """Wait for the device: its kernels run behind the host's clock."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Contender:
    """``run`` is what is timed; ``error`` how far its result is from the reference, measured beforehand.

    ``run`` is None for a peer that is not installed.
    """

    run: Callable[[], object] | None
    error: float = float("nan")


@dataclass(frozen=True)
class Entry:
    """One row of a table. ``ratio`` is (median, 25 %, 75 %) of time / time of the base in the same round."""

    case: str
    name: str
    error: float = float("nan")
    median: float | None = None  # seconds per call
    ratio: tuple[float, float, float] | None = None
    note: str = ""


def interleaved(runs: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, np.ndarray]:
    """Seconds per call, [rounds], of every contender. The first two calls of each (caches, plans) do not count.

    >>> times = interleaved({"a": lambda: None, "b": lambda: None}, Settings(rounds=3, turn=0.0))
    >>> {name: t.shape for name, t in times.items()}
    {'a': (3,), 'b': (3,)}
    """
    calls = {}
    for name, run in runs.items():
        _seconds(run, 1, settings)
        calls[name] = min(MOST_CALLS, max(1, ceil(settings.turn / _seconds(run, 1, settings))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, calls[name], settings))
    return {name: np.array(t) for name, t in times.items()}


def _seconds(run: Callable[[], object], calls: int, settings: Settings) -> float:
    settings.synchronize()
    start = perf_counter()
    for _ in range(calls):
        run()
    settings.synchronize()
    return (perf_counter() - start) / calls


def spread(times: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of one round each.

    >>> spread(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 2.0]))
    (2.0, 2.0, 2.5)
    """
    middle, low, high = np.percentile(times / base, [50, 25, 75])
    return float(middle), float(low), float(high)


def compare(
    case: str, contenders: Mapping[str, Contender], base: str, tolerance: float, settings: Settings
) -> list[Entry]:
    """Time the contenders whose result agrees (error ≤ tolerance; NaN does not), in ratio to ``base``.

    The others get a row that says why they were not timed.

    >>> def work(): return sum(range(100))
    >>> found = {"a": Contender(work, 0.0), "b": Contender(work, 1.0), "c": Contender(None)}
    >>> rows = compare("sum", found, "a", 0.1, Settings(2, 0.0))
    >>> [(row.name, row.note) for row in rows]
    [('a', ''), ('b', 'disagrees, not timed'), ('c', 'not installed')]
    """
    sound = {name: c.run for name, c in contenders.items() if c.run is not None and c.error <= tolerance}
    times = interleaved(sound, settings)
    entries = []
    for name, contender in contenders.items():
        if name in times:
            ratio = spread(times[name], times[base]) if base in times else None
            entries.append(Entry(case, name, contender.error, float(np.median(times[name])), ratio))
        else:
            note = "not installed" if contender.run is None else "disagrees, not timed"
            entries.append(Entry(case, name, contender.error, note=note))
    return entries


def table(entries: Sequence[Entry], ratio_heading: str) -> str:
    """A Markdown table.

    >>> print(table([Entry("W1", "peer", 1e-15, 0.5, (2.0, 1.9, 2.25))], "× ours"))
    | case | | error | median, ms | × ours | quartiles |
    |---|---|--:|--:|--:|--:|
    | W1 | peer | 1.0e-15 | 500.00 | 2.00 | 1.90 – 2.25 |
    """
    lines = [f"| case | | error | median, ms | {ratio_heading} | quartiles |", "|---|---|--:|--:|--:|--:|"]
    for e in entries:
        error = "–" if np.isnan(e.error) else f"{e.error:.1e}"
        median = e.note if e.median is None else f"{e.median * 1e3:.2f}"
        ratio, quartiles = (
            ("–", "–") if e.ratio is None else (f"{e.ratio[0]:.2f}", f"{e.ratio[1]:.2f} – {e.ratio[2]:.2f}")
        )
        lines.append(f"| {e.case} | {e.name} | {error} | {median} | {ratio} | {quartiles} |")
    return "\n".join(lines)
