"""``python -m benchmarks``: time us and our peers, interleaved, and write one Markdown table per question."""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

# Each module has TITLE, ABOUT, CASES, QUICK and report(settings, cases, stem), which gives the body of its page after each
# case; one that draws writes beside ``stem``. To ask another question, add its line here.
QUESTIONS = {
    "gram": "benchmarks.gram",
    "memory": "benchmarks.memory",
    "growth": "benchmarks.growth",
    "solver": "benchmarks.solver",
    "step": "benchmarks.step",
    "rlo": "benchmarks.rlo",
    "movement": "benchmarks.movement",
    "stacked": "benchmarks.stacked",
    "training": "benchmarks.training",
    "prediction": "benchmarks.prediction",
    "coverage": "benchmarks.coverage",
    "influence": "benchmarks.influence",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on stderr for a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against peers, as ratios.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds; into files of their own")
    parser.add_argument("--rounds", type=int, help="turns of each contender (default 15; with --quick 3)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    options = parser.parse_args(arguments)
    # Idle threads that spin take the cores from whoever is timed next. Read when torch loads, so it comes first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Check the request, then time and write one table after the other."""
    unknown = [q for q in options.questions if q not in QUESTIONS]
    if unknown:
        raise ValueError(f"unknown question {unknown[0]!r}; write one of {', '.join(QUESTIONS)}")
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; write a whole number of at least 1")

    import torch

    from benchmarks.timing import Settings

    if options.device != "cpu" and not options.device.startswith("cuda"):
        raise ValueError(f"--device is {options.device!r}; write cpu or cuda")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"--device is {options.device!r}, but torch {torch.__version__} sees no CUDA device; write --device cpu"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        rounds=options.rounds or (3 if options.quick else 15), device=options.device, workers=not options.quick
    )
    options.out.mkdir(parents=True, exist_ok=True)
    device, ending = options.device.partition(":")[0], "-quick" if options.quick else ""
    for name in options.questions or QUESTIONS:
        question = importlib.import_module(QUESTIONS[name])
        cases = question.QUICK if options.quick else question.CASES
        stem = options.out / f"{name}-{device}{ending}"
        path = stem.with_suffix(".md")
        for done, body in enumerate(question.report(settings, cases, stem), start=1):  # what is timed is kept
            if done < len(cases):
                body = f"Unfinished: {done} of {len(cases)} cases.\n\n{body}"
            method = getattr(question, "METHOD", rounds(settings))
            text = page(question.TITLE, question.ABOUT, method, body, [case[0] for case in cases[:done]], settings)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {done} of {len(cases)}", file=sys.stderr)
        print(f"{text}\nwritten to {path}\n")


def rounds(settings) -> str:
    """How calls are timed, in two sentences."""
    return (
        f"Times: {settings.rounds} rounds, the contenders in turn within each (A B C A B C …), a turn of about "
        f"{settings.turn * 1e3:.0f} ms or one call; whoever takes over {settings.patience:g} s a call has three rounds, over "
        f"{10 * settings.patience:g} s its first call alone. Ratios are taken within a round: median and quartiles."
    )


def page(title: str, about: str, method: str, body: str, workloads: Sequence[str], settings) -> str:
    """The Markdown page: what was asked, where and when, how it was timed, the tables, the networks."""
    from benchmarks.workloads import WORKLOADS

    networks = "\n".join(f"- {key}: {WORKLOADS[key]}" for key in dict.fromkeys(workloads) if key in WORKLOADS)
    when = datetime.now(UTC).date().isoformat()
    return (
        f"# {title}\n\n{about}\n\n{when}; {machine(settings.device)}.\n{method}\n\n{body}\n\n{networks}".rstrip() + "\n"
    )


def machine(device: str) -> str:
    """The machine in one line.

    >>> machine("cpu").endswith("OMP_WAIT_POLICY=" + os.environ.get("OMP_WAIT_POLICY", "unset"))
    True
    """
    import torch

    import nt_kernel
    from studies.results.provenance import commit

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [
        f"commit {commit(Path(nt_kernel.__file__).parent) or 'unknown'}",
        f"{processor()}, {_several(cores, 'core')}",
        *([torch.cuda.get_device_name(device)] if device != "cpu" else []),
        f"Python {platform.python_version()}, torch {torch.__version__}, {_several(torch.get_num_threads(), 'thread')}",
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
    ]
    return ", ".join(facts)


def _several(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' * (n > 1)}"


def processor() -> str:
    """The processor's name where the system tells it, else its kind.

    >>> processor() != ""
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
