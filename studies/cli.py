"""The command ``stability``. Imports what a command needs when it runs: ``stability --help`` loads no torch.

Exit status: 0 done; 1 a point that failed, a lost worker or a full disk; 2 input that cannot be used; 130 interrupted;
`check` has statuses of its own (``studies.running.check``).
Every failure is one line on stderr.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nt_kernel.errors import NumericalError
from studies.running.check import add_options
from studies.running.engines import PointsFailed, WorkerLost


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"stability: error: {message} (see `{self.prog} --help`)\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="stability", description="Train twin networks and hold their divergence against the bounds.")
    top.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the studies that come with the package")
    listing.set_defaults(action=list_studies)

    show = commands.add_parser("show", help="a study as it would be run")
    show.set_defaults(action=show_study)
    plan = commands.add_parser("plan", help="how long a study would take, and how much memory, before it is run")
    plan.set_defaults(action=plan_study)
    run = commands.add_parser("run", help="train a study, or continue it, and draw its report")
    run.set_defaults(action=run_study)
    check = commands.add_parser(
        "check", help="the assumptions of the theorem at every point: 0 hold, 1 violated, 3 undecided"
    )
    add_options(check)
    predict = commands.add_parser("predict", help="rank the training samples by what replacing them does, from one run")
    predict.set_defaults(action=predict_study)
    for command in (show, plan, run, check, predict):
        command.add_argument("study", metavar="STUDY", help="a name from `stability list`, or the path of a TOML file")
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="KEY=VALUE",
            help="change a key, for example n=6,12 or grid.mass=0.1",
        )
        command.add_argument("--quick", action="store_true", help="the reduced grid of the study: within a minute")
    run.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: results/STUDY)")
    predict.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: results/STUDY-predicted)")
    predict.add_argument("--alpha", type=float, default=0.1, help="1 − coverage of the upper limits (default 0.1)")
    predict.add_argument("--each", type=int, default=3, help="replacements tried per sample (default 3)")

    resume = commands.add_parser("resume", help="continue the study that a results folder holds")
    resume.add_argument("out", type=Path, metavar="DIR", help="a results folder")
    resume.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="keys that change no number: workers, engine, …"
    )
    resume.set_defaults(action=resume_study)

    report = commands.add_parser("report", help="draw figures and report of a results folder again, without training")
    report.add_argument("out", type=Path, metavar="DIR", help="a results folder")
    report.set_defaults(action=draw_report)

    compare = commands.add_parser("compare", help="what differs between two results folders, config and numbers")
    for side in ("left", "right"):
        compare.add_argument(side, type=Path, metavar="DIR", help="a results folder")
    compare.set_defaults(action=compare_folders)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    >>> main(["list"])
    cifar10          Twins on CIFAR-10 (twins)
    ...
    digits           Twin networks on handwritten digits (twins)
    ...
    0
    """
    command_parser = parser()
    # argparse gives up on KEY=VALUE after an option: what it leaves over is collected here.
    arguments, left_over = command_parser.parse_known_args(argv)
    if unknown := [text for text in left_over if text.startswith("-") or not hasattr(arguments, "overrides")]:
        command_parser.error(f"unknown argument {unknown[0]}")
    if left_over:
        arguments.overrides = [*arguments.overrides, *left_over]
    _extend_path()
    try:
        status = arguments.action(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        return _fail(130, f"stability: {str(interrupt) or 'interrupted'}")
    except BrokenPipeError:  # the reader has gone, as in `stability show digits | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, ImportError, NumericalError, WorkerLost, PointsFailed, OSError) as error:
        if arguments.traceback:
            raise
        status = 1 if isinstance(error, NumericalError | WorkerLost | PointsFailed | OSError) else 2
        return _fail(status, f"stability: error: {error}")
    except Exception as error:  # a mistake of ours, or of a kind of study of the user's own
        if arguments.traceback:
            raise
        given = shlex.join(sys.argv[1:] if argv is None else argv)
        where = f"`stability --traceback {given}` shows where it comes from"
        return _fail(1, f"stability: error: {type(error).__name__}: {error}; {where}")
    return status or 0


def list_studies(arguments: argparse.Namespace) -> None:
    from studies.definition.config import Study, shipped_studies

    names = sorted(shipped_studies())
    width = max(map(len, names))
    for name in names:
        study = Study.from_toml(name)
        print(f"{name:<{width}} {study.title} ({study.kind})")


def show_study(arguments: argparse.Namespace) -> None:
    from studies.definition.config import Study, source_text

    study = Study.from_toml(arguments.study, arguments.overrides, quick=arguments.quick)
    changed = arguments.overrides or arguments.quick
    print(study.to_toml() if changed else source_text(arguments.study))  # unchanged: with its author's comments
    print(f"# {study.describe_size()}")


def run_study(arguments: argparse.Namespace) -> None:
    from studies.definition.config import Study

    study = Study.from_toml(arguments.study, arguments.overrides, quick=arguments.quick)
    name = Path(arguments.study).stem + ("-quick" if arguments.quick else "")
    out = arguments.out or Path("results") / name

    from studies.running import runner

    runner.run_study(study, out, command=["stability", *sys.argv[1:]])
    _write_report(out)


def plan_study(arguments: argparse.Namespace) -> None:
    from studies.definition.config import Study
    from studies.running.plan import plan, plan_text

    study = Study.from_toml(arguments.study, arguments.overrides, quick=arguments.quick)
    print(plan_text(study, plan(study)))


def resume_study(arguments: argparse.Namespace) -> None:
    from studies.definition.config import Study
    from studies.results import store
    from studies.running import runner

    out = arguments.out
    store.read_study(out)  # says what is wrong with the folder
    study = Study.from_toml(out / "config.toml", arguments.overrides)
    runner.run_study(study, out, command=["stability", *sys.argv[1:]])
    _write_report(out)


def compare_folders(arguments: argparse.Namespace) -> None:
    from studies.results.compare import compare_results
    from studies.results.whole import usable

    with usable(arguments.left), usable(arguments.right):
        found = compare_results(arguments.left, arguments.right)
    if found.config.empty:
        print("the configs are the same")
    else:
        print(found.config.to_string(index=False))
    print(
        f"\n{found.common} rows in both, {found.only_left} only in {arguments.left}, {found.only_right} only in "
        f"{arguments.right}; medians over the common rows:"
    )
    print(found.numbers.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    if found.equal:
        print("every number is the same, bit for bit")


def predict_study(arguments: argparse.Namespace) -> None:
    from studies.sensitivity import predict

    name = Path(arguments.study).stem + ("-quick" if arguments.quick else "") + "-predicted"
    out = arguments.out or Path("results") / name
    options = {"quick": arguments.quick, "alpha": arguments.alpha, "each": arguments.each}
    predict.predict_study(arguments.study, out, arguments.overrides, command=["stability", *sys.argv[1:]], **options)
    print(f"report: {out / 'report.html'}")


def draw_report(arguments: argparse.Namespace) -> None:
    from studies.results import store
    from studies.results.whole import usable

    out = arguments.out
    with usable(out):
        if (out / "points").is_dir():  # an interrupted run may have finished points that its tables do not hold
            store.collect(out, store.read_study(out))
    _write_report(out)


def _write_report(out: Path) -> None:
    from studies.report.page import write_report
    from studies.results.whole import usable

    with usable(out):
        page = write_report(out)
    print(f"report: {page}")


def _extend_path() -> None:
    """Let a user's own modules be found, but never before ours."""
    for folder in (str(Path(__file__).resolve().parent.parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)


def _fail(status: int, message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
