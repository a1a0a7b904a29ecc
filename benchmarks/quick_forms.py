"""The reduced form of every shipped study: what `stability plan` foretells, and what the run then takes.

``python -m benchmarks.quick_forms [STUDY …]``: for each study that needs no download, plan and run its ``--quick`` form in
processes of their own, on as many workers as the study asks for. Writes benchmarks/results/quick-forms.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quick-forms.md"
DOWNLOADS = {"mnist", "cifar10", "rlo-cifar10"}
MIB = 2**20


def shipped() -> list[str]:
    """The studies of the catalogue that run without network."""
    found = (Path(str(path)).stem for path in files("studies.catalogue").iterdir() if str(path).endswith(".toml"))
    return sorted(set(found) - DOWNLOADS)


def planned(name: str) -> tuple[float, float]:
    """(seconds, bytes of the largest point) that the plan foretells of the quick form."""
    from studies import Study
    from studies.running.plan import plan

    found = plan(Study.from_toml(name, quick=True))
    return found.seconds, float(found.points["bytes"].max())


def taken(name: str) -> tuple[float, float, float]:
    """(wall seconds of the whole command, wall seconds of its points, bytes of its largest process)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "studies.cli", "run", name, "--quick", "--out", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        complaints = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)  # of the process and of its workers, the largest
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"{' '.join(command)} failed:\n{complaints}")
        points = sum(json.loads(record.read_text())["seconds"] for record in Path(folder, "runs").glob("*.json"))
    return seconds, points, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def page(rows: list[tuple], load: float) -> str:
    worst = max(rows, key=lambda row: row[3])
    lines = [
        "# Reduced forms of the shipped studies",
        "",
        f"`python -m benchmarks.quick_forms` on {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before it. "
        "Planned: what `stability plan STUDY --quick` says of the points, from its calibration. Points: wall time of the "
        "points on all workers. Command: wall time of `stability run STUDY --quick`, with imports, workers' start and "
        "report. Memory: planned for the largest point, and the largest process of the run (which can be the one that "
        "draws the report).",
        "",
        f"{len(rows)} of {len(shipped())} studies timed. Longest command: {worst[0]}, {worst[3]:.0f} s.",
        "",
        "| study | planned [s] | points [s] | command [s] | memory planned [MiB] | memory [MiB] |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {name} | {foretold:.0f} | {points:.0f} | {command:.0f} | {memory / MIB:.0f} | {peak / MIB:.0f} |"
        for name, foretold, points, command, memory, peak in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=shipped(), metavar="STUDY")
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[1]
    for name in options.studies:
        foretold, memory = planned(name)
        command, points, peak = taken(name)
        rows.append((name, foretold, points, command, memory, peak))
        print(rows[-1], file=sys.stderr)
        RESULTS.write_text(page(rows, load))  # what has been timed stays, should the rest be stopped


if __name__ == "__main__":
    main()
