"""``stability plan``: how many points, how long and how much memory, from a calibration on this machine, before anything runs.

Two points are run, each in a process of its own, the quickest and one of middle effort, with a tenth of the steps where the
study has steps: seconds = a + b·work·steps and bytes = c + d·size are fitted to them and carried over to the other points
by the kind's ``work`` and ``size``. A first run in each process pays for imports and caches: it is what a worker needs to
start, and counts once for all of its points. An estimate: cores that are shared, or caches that are outgrown, change it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studies.definition.config import Study
from studies.definition.points import Point
from studies.running.pool import process_pool
from studies.running.runner import check_device, worker_count

if TYPE_CHECKING:
    import pandas as pd

SHARE, LEAST = 10, 3  # the calibration's steps: a tenth, three at least


@dataclass(frozen=True)
class Measured:
    """One calibration. ``start``: what the first point of a process costs beyond ``seconds``; ``bytes``: peak memory."""

    start: float
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """``points``: a row per point with its predicted seconds and bytes; ``seconds``: of the whole study on its workers."""

    points: pd.DataFrame
    seconds: float
    bytes: float
    workers: int
    calibration_seconds: float


def measure(study: Study, point: Point) -> Measured:
    """Run the point here and look at clock and memory; in a fresh process, so that the peak is this point's.

    With steps that are the same for all points: s₁ of them twice, the first time for ``start``, then s₂ > s₁, and
    seconds = t(s₁) + (steps − s₁)·(t(s₂) − t(s₁))/(s₂ − s₁). Without: once.
    """
    import resource
    import sys

    def run(count: int) -> float:
        trial = study.model_copy(update={"steps": count}) if count else study
        start = time.perf_counter()
        study.kind_object.run_point(trial, point)
        return time.perf_counter() - start

    # an axis of steps says itself how many a point has: such points are run whole
    steps = 0 if "steps" in study.axes() else getattr(study, "steps", 0)
    if steps:
        more = min(max(steps // SHARE, LEAST), steps)
        few = max(more // 2, 1)
        first, less = run(few), run(few)
        each = max(run(more) - less, 0.0) / (more - few) if more > few else 0.0
        start, seconds = max(first - less, 0.0), less + each * (steps - few)
    else:
        start, seconds = 0.0, run(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(start, seconds, peak * (1 if sys.platform == "darwin" else 1024))


def _trial(task: tuple[Study, Point]) -> Measured:
    return measure(*task)


def plan(study: Study) -> Plan:
    """Calibrate and predict. Raises what running the study would raise before anything is computed."""
    import pandas as pd

    began = time.perf_counter()
    check_device(study)
    kind = study.kind_object
    kind.check(study)
    points = study.points()
    work = {point: float(kind.work(study, point)) for point in points}
    size = {point: float(kind.size(study, point)) for point in points}
    ordered = sorted(points, key=work.get)
    trials = list(dict.fromkeys([ordered[0], ordered[len(ordered) // 2]]))
    # one fresh process each: the largest resident size of a process never falls
    found = {
        point: next(iter(process_pool(_trial, [(study, point)], workers=1, threads=study.threads)))[1]
        for point in trials
    }
    seconds = {point: measured.seconds for point, measured in found.items()}
    peaks = {point: measured.bytes for point, measured in found.items()}
    first, last = trials[0], trials[-1]
    rate = [_line(work[first], seconds[first], work[last], seconds[last])] if first != last else []
    growth = [_line(size[first], peaks[first], size[last], peaks[last])] if first != last else []
    rows = []
    for point in points:
        a, b = rate[0] if rate else (0.0, seconds[first] / work[first])
        c, d = growth[0] if growth else (peaks[first], 0.0)
        rows.append(dict(point.values) | {"seconds": a + b * work[point], "bytes": c + max(d, 1.0) * size[point]})
    table = pd.DataFrame(rows)
    workers = max(min(worker_count(study) or 1, len(points)), 1)
    longest = float(table["seconds"].max())
    total = max(measured.start for measured in found.values()) + max(float(table["seconds"].sum()) / workers, longest)
    most = float(table["bytes"].nlargest(workers).sum())
    return Plan(table, total, most, workers, time.perf_counter() - began)


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """(a, b) of y = a + b·x through two points, neither of them negative."""
    if x1 <= x0:
        return max(y0, y1), 0.0
    slope = max((y1 - y0) / (x1 - x0), 0.0)
    intercept = y0 - slope * x0
    return (intercept, slope) if intercept >= 0 else (0.0, max(y0 / x0, y1 / x1))


def plan_text(study: Study, found: Plan) -> str:
    """The plan as a table for the terminal: a line per combination of the axes, its seeds together."""
    axes = list(study.axes())
    table = found.points.groupby(axes, sort=False).agg(
        points=("seconds", "size"), seconds=("seconds", "mean"), bytes=("bytes", "max")
    )
    lines = [f"{study.describe_size()}, {found.workers} at a time; calibrated in {found.calibration_seconds:.0f} s"]
    head = [*axes, "points", "seconds each", "memory each"]
    rows = [
        [
            *map(str, values if isinstance(values, tuple) else (values,)),
            str(row.points),
            f"{row.seconds:.3g}",
            _bytes(row.bytes),
        ]
        for values, row in zip(table.index, table.itertuples(), strict=True)
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.append(f"in all about {_time(found.seconds)}, and {_bytes(found.bytes)} of memory at a time")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    """
    >>> _time(42.0), _time(600.0), _time(9000.0)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    """
    >>> _bytes(3.2e8), _bytes(5e9)
    ('305 MiB', '4.7 GiB')
    """
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
