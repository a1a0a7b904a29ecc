"""What running many points costs: overhead a point, memory over a study, a killed worker.

``python -m benchmarks.studies_scale``: a study of 200 points of a kind that only waits (tests/studies/light_kind.py), on the
process pool and, where Ray is installed, on a Ray cluster of two workers; in each run one worker is killed by its process
id. Writes benchmarks/results/studies-scale.md.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from studies import Study, run_study

TEXT = 'kind = "tests.studies.light_kind:LIGHT"\n[grid]\nsize = [{sizes}]\nseeds = 10\n'
RESULTS = Path(__file__).parent / "results" / "studies-scale.md"


def resident() -> float:
    """MiB of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def workers_of(engine: str) -> list[int]:
    """Process ids of the workers below this process."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}

    def below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    # a worker of Ray belongs to a daemon of its own: the points run under the name of the task
    mark = "spawn_main" if engine == "pool" else "ray::call_in_child"
    return [int(row[0]) for row in rows if len(row) > 2 and mark in row[2] and (engine == "ray" or below(int(row[0])))]


def watch(engine: str, out: Path, seen: dict, stop: threading.Event) -> None:
    """Memory of this process every second; one worker killed when a quarter of the points are there."""
    while not stop.wait(0.5):
        seen["memory"].append(resident())
        finished = sum(1 for _ in out.glob("points/size*"))
        if not seen["killed"] and finished >= seen["kill at"] and (found := workers_of(engine)):
            os.kill(found[0], signal.SIGKILL)
            seen["killed"] = found[0]


def run(engine: str, points: int, wait: float, folder: Path) -> dict:
    """One study; its wall time, what of it was waiting, and the memory of the driver in four quarters."""
    sizes = ", ".join(str(size) for size in range(1, points // 10 + 1))
    (folder / "scale.toml").write_text(TEXT.format(sizes=sizes))
    study = Study.from_toml(folder / "scale.toml", [f"wait={wait}", f"engine={engine}", "workers=2"])
    out, stop = folder / engine, threading.Event()
    seen = {"memory": [], "killed": 0, "kill at": points // 4}
    watcher = threading.Thread(target=watch, args=(engine, out, seen, stop))
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        frames = run_study(study, out, progress=False)
    finally:
        stop.set()
        watcher.join()
    seconds = time.perf_counter() - start
    quarter = max(len(seen["memory"]) // 4, 1)
    memory = [max(seen["memory"][i * quarter : (i + 1) * quarter] or [float("nan")]) for i in range(4)]
    ideal = points * wait / 2
    return {
        "engine": engine,
        "points": len(frames.summary) // 3,
        "killed": seen["killed"],
        "seconds": seconds,
        "cpu": (time.process_time() - cpu) / points,
        "overhead": (seconds - ideal) * 2 / points,
        "memory": memory,
    }


def page(rows: list[dict], wait: float) -> str:
    lines = [
        "# Running many points",
        "",
        f"`python -m benchmarks.studies_scale` on {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[1]:.0f}: where that is more than the cores, other work makes most of the wall times, "
        "and the CPU time is what counts. "
        f"Points that wait {wait:g} s; 2 workers; one of them killed by its process id in each run.",
        "Overhead of a point: wall time of the study beyond points × wait / workers, start of the workers and the killed "
        "one's lost point included, times workers over points. Memory: largest resident size of the driver in each "
        "quarter of the study.",
        "",
        "| engine | points | worker killed | wall [s] | overhead a point [s] | of a 5 s point | "
        "driver's CPU a point [s] | memory by quarters [MiB] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = " / ".join(f"{value:.0f}" for value in row["memory"])
        killed = "yes" if row["killed"] else "no"
        lines.append(
            f"| {row['engine']} | {row['points']} | {killed} | {row['seconds']:.0f} | {row['overhead']:.3f} | "
            f"{100 * row['overhead'] / 5:.1f} % | {row['cpu']:.3f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200, help="points of the study, a multiple of 10")
    parser.add_argument("--wait", type=float, default=0.5, help="seconds that a point takes")
    parser.add_argument("--engines", default="pool,ray" if find_spec("ray") else "pool")
    options = parser.parse_args()
    rows = []
    for engine in options.engines.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(engine, options.points, options.wait, Path(folder)))
        print(rows[-1], file=sys.stderr)
    RESULTS.write_text(page(rows, options.wait))


if __name__ == "__main__":
    main()
