"""Run a study: every point of its grid once, each stored as soon as it is finished, then the tables of all together."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from studies.definition.config import Study
from studies.definition.points import Point
from studies.results import store
from studies.running.engines import PointsFailed, WorkerLost
from studies.running.outcome import Failure, Outcome, attempt

if TYPE_CHECKING:
    from studies.results.frames import Frames


def run_study(
    study: Study, out: str | Path, *, progress: bool = True, command: Sequence[str] | None = None
) -> "Frames":
    """Compute what is not yet in the folder ``out`` and return all results; running again continues.

    However it ends, finished points stay and the tables hold them. Raises ValueError for input or a folder that cannot
    be used, before anything is computed where that can be known. A point that fails is recorded with its traceback
    (``out``/failed) and reported after the others are done: as ValueError where the step was too large or the input wrong,
    NumericalError where the arithmetic failed, PointsFailed otherwise. When all of the quickest points fail by their
    input, at once: the others would fare no better.
    """
    from studies.results.provenance import provenance
    from studies.running.engines import run_tasks

    if not isinstance(study, Study):
        raise TypeError(
            f"run_study takes a studies.Study, got {type(study).__name__} {study!r}; read one from a name or a file: "
            'Study.from_toml("digits")'
        )
    out, began = Path(out), time.perf_counter()
    check_device(study)
    study.kind_object.check(study)
    facts = provenance(command)
    to_do = store.open_folder(out, study, facts)
    effort = {point: study.kind_object.work(study, point) for point in study.points()}
    least = min((effort[point] for point in to_do), default=0)
    trial = {point for point in to_do if effort[point] == least}
    # Long ones first: no worker is left alone with one at the end. But before them the quick ones that try the step.
    to_do.sort(key=lambda point: (point not in trial, -effort[point]))
    kept, failures, elsewhere = len(effort) - len(to_do), {}, []

    def standing() -> str:
        return f"{kept + len(elsewhere)} of {len(effort)} points are finished and kept in {out}"

    workers = worker_count(study)
    tasks = run_tasks if to_do else _nothing  # an engine that is not there is not needed for that
    outcomes = tasks(
        partial(attempt, study),
        _missing(out, to_do, elsewhere),
        engine=study.engine,
        workers=min(workers, len(to_do)) if study.engine != "ray" else workers,
        threads=study.threads,
        gpus=study.gpus,
        cluster=study.cluster,
        on_lost=_worker_died,
    )
    try:
        with closing(outcomes), _bar(effort, to_do, shown=progress) as bar:
            for point, outcome in outcomes:
                if outcome.failure:
                    failures[point] = outcome.failure
                    failure = {name: value for name, value in vars(outcome.failure).items() if value}
                    store.write_failure(out, point, failure | outcome.facts)
                    if not kept and _hopeless([failures.get(tried) for tried in trial]):
                        break
                else:
                    store.write_point(out, point, outcome.tables, outcome.facts | {"commit": facts["commit"]})
                    kept += 1
                bar.set_description_str(f"{kept + len(elsewhere)} of {len(effort)} points", refresh=False)
                bar.update(effort[point])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {standing()}; the same command continues") from None
    except WorkerLost as error:
        raise WorkerLost(f"{error}; {standing()}; the same command continues") from error
    finally:
        store.collect(out, study)
        if to_do:
            done = {"seconds": round(time.perf_counter() - began, 3), "engine": study.engine, "workers": workers}
            done |= {
                "finished": kept - (len(effort) - len(to_do)),
                "failed": len(failures),
                "finished elsewhere": len(elsewhere),
            }
            store.write_run(out, {"started": facts["date"]} | done | facts)
    if failures:
        left = len(effort) - kept - len(elsewhere) - len(failures)
        ending = f"; {left} points were not tried" * bool(left) + f"; {standing()}"
        raise _error(list(effort), failures, ending + f", `stability report {out}` draws them" * bool(kept))
    return store.load_results(out)


def _nothing(*_, **__) -> Iterator[tuple[Point, Outcome]]:
    yield from ()


def _missing(out: Path, points: Sequence[Point], elsewhere: list[Point]) -> Iterator[Point]:
    """The points as workers ask for them; those that another process has finished meanwhile go to ``elsewhere``."""
    for point in points:
        if store.is_finished(out, point):
            elsewhere.append(point)
        else:
            yield point


def _worker_died(point: Point, error: WorkerLost) -> Outcome:
    from studies.running.engines import ATTEMPTS

    return Outcome(None, Failure("worker", str(error), attempts=ATTEMPTS))


def _hopeless(failures: "Sequence[Failure | None]") -> bool:
    """Did every one of the quickest points fail, and by what was asked for? λ_max hardly depends on n."""
    kinds = {failure.kind if failure else None for failure in failures}
    return kinds in ({"step"}, {"input"})


def _error(points: Sequence[Point], failures: Mapping[Point, Failure], ending: str) -> Exception:
    """One error for all points that failed, the input's before the arithmetic's before the rest."""
    from nt_kernel.errors import NumericalError
    from optim.steps.step_limit import round_down

    in_order = {point: failures[point] for point in points if point in failures}
    too_large = {point: failure for point, failure in in_order.items() if failure.kind == "step"}
    others = {point: failure for point, failure in in_order.items() if failure.kind != "step"}
    of, parts = len(points), []
    if too_large:
        point, failure = next(iter(too_large.items()))
        strictest = min(failure.limit for failure in too_large.values())
        parts.append(
            f"lr = {failure.lr:g} is too large at {len(too_large)} of {of} points, the first {point}: "
            f"{failure.where or 'the step'} needs lr < 2/λ_max = {failure.limit:.4g}"
            + f", the strictest of them lr < {strictest:.4g}" * (strictest < failure.limit)
            + f"; write lr = {round_down(0.9 * strictest):g} or less" * (strictest > 0)
        )
    if others:
        point, failure = next(iter(others.items()))
        tries = f", {failure.attempts} times" * (failure.attempts > 1)
        parts.append(f"{len(others)} of {of} points failed{tries}, the first at {point}: {failure.message}")
    kinds = {failure.kind for failure in in_order.values()}
    if kinds & {"step", "input", "memory"}:
        kind = ValueError
    else:
        kind = NumericalError if kinds == {"numerical"} else PointsFailed
        ending = "; tracebacks are in its folder failed" * (kind is PointsFailed) + ending
    return kind("; ".join(parts) + ending)


def check_device(study: Study) -> None:
    """ValueError when the study asks for a GPU that is not there."""
    if study.device == "cpu" or study.engine == "ray":  # a Ray worker may sit where the GPUs are
        return
    import torch

    index = int(study.device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={study.device} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs "
            "here; write device=cpu"
        )


def worker_count(study: Study) -> int:
    """Processes to use: as written, or one per core on the CPU and one on a GPU; 0 leaves it to a Ray cluster."""
    if study.engine == "in-process":
        return 1
    if study.workers != "auto":
        return study.workers
    if study.cluster:
        return 0
    if study.device != "cpu":
        return 1
    import joblib  # comes with scikit-learn; knows about containers' limits, which os.cpu_count does not

    return max(joblib.cpu_count() // study.threads, 1)


def _bar(effort: Mapping[Point, float], to_do: Sequence[Point], *, shown: bool):
    from tqdm import tqdm

    everything, missing = sum(effort.values()), sum(effort[point] for point in to_do)
    screen = shutil.get_terminal_size()  # tqdm's own guess shows nothing on a terminal that gives its size as 0 × 0
    return tqdm(
        desc=f"{len(effort) - len(to_do)} of {len(effort)} points",
        total=everything,
        initial=everything - missing,
        disable=not shown,
        file=sys.stderr,
        bar_format="{desc} |{bar}| {elapsed} so far, {remaining} left",
        mininterval=0.1 if sys.stderr.isatty() else 20,
        ncols=min(screen.columns, 100),
        nrows=screen.lines,
    )
