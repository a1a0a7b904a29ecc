"""Interleaved timing: A B C A B C …, medians, and ratios taken within a round, so that a slow minute meets all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

MOST_CALLS = 1000


@dataclass(frozen=True)
class Settings:
    """``rounds`` of one turn each; a turn repeats its call until about ``turn`` seconds, to resolve short calls.

    A contender whose call takes more than ``patience`` seconds sits out after 3 rounds, beyond ten times that its first
    call is its only one.
    ``workers``: whether peers in other environments take part.
    """

    rounds: int = 15
    turn: float = 0.05
    device: str = "cpu"
    patience: float = 1.0
    workers: bool = True

    def synchronize(self) -> None:
        """Wait for the device: its kernels run behind the host's clock."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


class Remote(Protocol):
    """A contender that runs elsewhere and holds the watch itself."""

    def seconds(self, calls: int) -> float:
        """Seconds per call, over ``calls`` calls in a row."""


Run = Callable[[], object] | Remote


@dataclass(frozen=True)
class Contender:
    """``run`` is what is timed; ``error`` how far its result is from the reference, measured beforehand.

    ``run`` is None for a peer that cannot take part; ``note`` says why. ``seconds``: how long that first call took.
    """

    run: Run | None
    error: float = float("nan")
    note: str = "not installed"
    seconds: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One row of a table. ``ratio`` is (median, 25 %, 75 %) of time / time of the base in the same round."""

    case: str
    name: str
    error: float = float("nan")
    median: float | None = None  # seconds per call
    ratio: tuple[float, float, float] | None = None
    note: str = ""
    gemm: float | None = None  # fraction of the matrix product rate


def interleaved(runs: Mapping[str, Run], settings: Settings) -> dict[str, np.ndarray]:
    """Seconds per call, [rounds] or fewer, of every contender. The first two calls of each (caches, plans) do not count,
    of one that is slow the first.

    >>> times = interleaved({"a": lambda: None, "b": lambda: None}, Settings(rounds=3, turn=0.0))
    >>> {name: t.shape for name, t in times.items()}
    {'a': (3,), 'b': (3,)}
    """
    calls, rounds = {}, {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        first = _seconds(run, 1, settings)
        second = first if first > settings.patience else _seconds(run, 1, settings)
        calls[name] = min(MOST_CALLS, max(1, ceil(settings.turn / second)))
        rounds[name] = _rounds(second, settings)
        if not rounds[name]:
            times[name].append(first)
    for i in range(settings.rounds):
        for name, run in runs.items():
            if i < rounds[name]:
                times[name].append(_seconds(run, calls[name], settings))
    return {name: np.array(t) for name, t in times.items()}


def _rounds(seconds: float, settings: Settings) -> int:
    if seconds <= settings.patience:
        return settings.rounds
    return min(settings.rounds, 3) if seconds <= 10 * settings.patience else 0


def _seconds(run: Run, calls: int, settings: Settings) -> float:
    if not callable(run):
        return run.seconds(calls)
    settings.synchronize()
    start = perf_counter()
    for _ in range(calls):
        run()
    settings.synchronize()
    return (perf_counter() - start) / calls


def spread(times: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of one round each, over the first rounds, in which both took part.

    >>> spread(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 2.0]))
    (2.0, 2.0, 2.5)
    """
    middle, low, high = np.percentile(times[: len(base)] / base[: len(times)], [50, 25, 75])
    return float(middle), float(low), float(high)


def compare(
    case: str,
    contenders: Mapping[str, Contender],
    base: str,
    tolerance: float,
    settings: Settings,
    gemm: "Gemm | None" = None,
) -> list[Entry]:
    """Time the contenders whose result agrees (error ≤ tolerance; NaN does not), in ratio to ``base``.

    The others get a row that says why they were not timed. With ``gemm``, every row has its fraction of that rate.

    >>> def work(): return sum(range(100))
    >>> found = {"a": Contender(work, 0.0), "b": Contender(work, 1.0), "c": Contender(None)}
    >>> rows = compare("sum", found, "a", 0.1, Settings(2, 0.0))
    >>> [(row.name, row.note) for row in rows]
    [('a', ''), ('b', 'disagrees, not timed'), ('c', 'not installed')]
    """
    sound = {name: c for name, c in contenders.items() if c.run is not None and c.error <= tolerance}
    once = {name: np.array([c.seconds]) for name, c in sound.items() if c.seconds > 10 * settings.patience}
    runs: dict[str, Run] = {name: c.run for name, c in sound.items() if name not in once}
    times = {**interleaved({**runs, **({_GEMM: gemm.run} if gemm else {})}, settings), **once}
    entries = []
    for name, contender in contenders.items():
        if name in times:
            ratio = spread(times[name], times[base]) if base in times else None
            fraction = gemm.useful / gemm.flops * spread(times[_GEMM], times[name])[0] if gemm else None
            entries.append(Entry(case, name, contender.error, float(np.median(times[name])), ratio, gemm=fraction))
        else:
            note = contender.note if contender.run is None else "disagrees, not timed"
            entries.append(Entry(case, name, contender.error, note=note))
    return entries


_GEMM = "matrix products"


@dataclass(frozen=True)
class Gemm:
    """The yardstick: ``run`` does ``flops`` operations in plain matrix products; the task needs ``useful`` of them."""

    run: Callable[[], object]
    flops: float
    useful: float


def table(entries: Sequence[Entry], ratio_heading: str) -> str:
    """A Markdown table; a column of the fraction of the matrix product rate where an entry has one.

    >>> print(table([Entry("W1", "peer", 1e-15, 0.5, (2.0, 1.9, 2.25))], "× ours"))
    | case | | error | median, ms | × ours | quartiles |
    |---|---|--:|--:|--:|--:|
    | W1 | peer | 1.0e-15 | 500.00 | 2.00 | 1.90 – 2.25 |
    """
    with_gemm = any(e.gemm is not None for e in entries)
    lines = [
        f"| case | | error | median, ms | {ratio_heading} | quartiles |" + " of GEMM rate |" * with_gemm,
        "|---|---|--:|--:|--:|--:|" + "--:|" * with_gemm,
    ]
    for e in entries:
        error = "–" if np.isnan(e.error) else f"{e.error:.1e}"
        median = e.note if e.median is None else f"{e.median * 1e3:.2f}"
        ratio, quartiles = (
            ("–", "–") if e.ratio is None else (f"{e.ratio[0]:.2f}", f"{e.ratio[1]:.2f} – {e.ratio[2]:.2f}")
        )
        fraction = "–" if e.gemm is None else f"{e.gemm:.2g}"
        lines.append(
            f"| {e.case} | {e.name} | {error} | {median} | {ratio} | {quartiles} |" + f" {fraction} |" * with_gemm
        )
    return "\n".join(lines)
