"""Peak additional memory of one Gram matrix, by contender, each in a fresh process."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.environments import NEURAL_TANGENTS, RemoteKernel, neural_tangents
from benchmarks.gram import TOO_SLOW, reason
from benchmarks.rivals import OURS, RIVALS
from benchmarks.timing import Settings
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import WORKLOADS

TITLE = "Memory of a Gram matrix"
ABOUT = (
    "Peak resident memory during one call above what was resident before it, the result included, in a fresh process per "
    "contender after a first call: VmHWM − VmRSS with the mark reset before (/proc/self/clear_refs) and an allocator told to "
    "return freed blocks at once; on CUDA `torch.cuda.max_memory_allocated`. `seconds`: a call of that process before (not "
    "interleaved: it only says who is fast). Demanded: ours ≤ 1.5 × that of the best peer, which is the fastest; the leanest "
    "is beside it."
)
CASES = [
    ("W1", 128, "float32"),
    ("W2", 64, "float32"),
    ("W3", 32, "float32"),
    ("W4", 1024, "float32"),
    ("R", 32, "float32"),
    ("T", 32, "float32"),
]
QUICK = [("W4", 64, "float32")]
ALLOWED = 1.5
REPEATS = 3
PATIENCE = 180.0  # seconds for one request


@dataclass(frozen=True)
class Peak:
    """One row: bytes and seconds of one call, or the reason why there are none."""

    case: str
    name: str
    bytes: float | None = None
    seconds: float = float("nan")
    note: str = ""


@contextmanager
def torch_process(workload: str, n: int, dtype: str, contender: str, device: str) -> Iterator[RemoteKernel]:
    """A fresh process with one contender prepared."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.torch_worker",
        "--threads",
        str(torch.get_num_threads()),
    ]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with Worker(command, PATIENCE, {**os.environ, "PYTHONPATH": path}) as worker:
        worker.ask(do="prepare", workload=workload, n=n, dtype=dtype, contender=contender, device=device)
        yield RemoteKernel(worker)


def measured(case: str, name: str, process: AbstractContextManager[RemoteKernel], patience: float) -> Peak:
    """Medians over a few calls, one call where it is slow."""
    try:
        with process as kernel:
            repeats = 1 if kernel.seconds(1) > patience else REPEATS
            seconds = median(kernel.seconds(1) for _ in range(repeats))
            return Peak(case, name, median(kernel.peak() for _ in range(repeats)), seconds)
    except WorkerError as error:
        note = str(error) if "not installed" in str(error) else reason(error)
        return Peak(case, name, note="not installed" if "ModuleNotFoundError" in note else note)


def peaks(settings: Settings, cases: Sequence[tuple[str, int, str]] = CASES) -> list[Peak]:
    """The rows of the table."""
    rows = []
    for workload, n, dtype in cases:
        case = f"{workload}, n = {n}, {dtype}"
        for name in RIVALS:
            if (workload, name) in TOO_SLOW:
                rows.append(Peak(case, name, note=TOO_SLOW[workload, name]))
            else:
                process = torch_process(workload, n, dtype, name, settings.device)
                rows.append(measured(case, name, process, settings.patience))
        if settings.workers:
            for name, implementation in NEURAL_TANGENTS.items():
                process = neural_tangents(WORKLOADS[workload], n, dtype, implementation)
                rows.append(measured(case, name, process, settings.patience))
    return rows


def verdicts(rows: Sequence[Peak]) -> str:
    """By case: ours beside the fastest and the leanest peer.

    >>> print(verdicts([Peak("W", OURS, 2e6, 0.1), Peak("W", "a", 1e6, 0.2), Peak("W", "b", 4e6, 0.1)]))
    | case | ours, MB | fastest peer | its MB | ours / its | | leanest peer | its MB | ours / its |
    |---|--:|---|--:|--:|---|---|--:|--:|
    | W | 2.0 | b | 4.0 | 0.50 | met | a | 1.0 | 2.00 |
    """
    lines = [
        "| case | ours, MB | fastest peer | its MB | ours / its | | leanest peer | its MB | ours / its |",
        "|---|--:|---|--:|--:|---|---|--:|--:|",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.name: row for row in rows if row.case == case and row.bytes is not None}
        peers = [row for name, row in found.items() if name != OURS]
        if OURS not in found or not peers:
            continue
        ours = found[OURS].bytes
        fast, lean = min(peers, key=lambda row: row.seconds), min(peers, key=lambda row: row.bytes)
        share = ours / max(fast.bytes, 1)
        verdict = "met" if share <= ALLOWED else f"missed by {share / ALLOWED:.2f}×"
        lines.append(
            f"| {case} | {ours / 1e6:.1f} | {fast.name} | {fast.bytes / 1e6:.1f} | {share:.2f} | {verdict} | {lean.name} | "
            f"{lean.bytes / 1e6:.1f} | {ours / max(lean.bytes, 1):.2f} |"
        )
    return "\n".join(lines)


def table(rows: Sequence[Peak]) -> str:
    """Every row.

    >>> print(table([Peak("W", OURS, 2e6, 0.1), Peak("W", "a", note="not installed")]))
    | case | | peak, MB | ours / this | seconds |
    |---|---|--:|--:|--:|
    | W | layer factors | 2.0 | 1.00 | 0.100 |
    | W | a | not installed | – | – |
    """
    ours = {row.case: row.bytes for row in rows if row.name == OURS and row.bytes is not None}
    lines = ["| case | | peak, MB | ours / this | seconds |", "|---|---|--:|--:|--:|"]
    for row in rows:
        if row.bytes is None:
            lines.append(f"| {row.case} | {row.name} | {row.note} | – | – |")
        else:
            share = f"{ours[row.case] / max(row.bytes, 1):.2f}" if row.case in ours else "–"
            lines.append(f"| {row.case} | {row.name} | {row.bytes / 1e6:.1f} | {share} | {row.seconds:.3f} |")
    return "\n".join(lines)


def report(settings: Settings, cases: Sequence[tuple[str, int, str]], stem: Path) -> Iterator[str]:
    """The body of the page after each case: verdicts, then every row."""
    rows: list[Peak] = []
    for case in cases:
        rows += peaks(settings, [case])
        yield f"{verdicts(rows)}\n\n{table(rows)}"
