"""Run a study: every point of its grid once, each stored as soon as it is finished, then the tables of all together."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from studies.definition.config import Point, Study
from studies.results import store

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames


def run_study(
    study: Study, out: str | Path, *, progress: bool = True, command: Sequence[str] | None = None
) -> "Frames":
    """Train what is not yet in the folder ``out`` and return all results; running again continues.

    However it ends, finished points stay and the tables hold them. Raises ValueError for input or a folder that cannot
    be used, before anything is trained where that can be known. A point that fails numerically (NumericalError) or does
    not bear the step (ValueError) is reported after the others are done; when none of the smallest n bears the step,
    at once.
    """
    from optim.step_limit import StepTooLargeError
    from studies.data.subsets import check_enough_rows
    from studies.results.provenance import provenance
    from studies.running.engines import WorkerLost, run_tasks

    out = Path(out)
    check_device(study)
    check_enough_rows(study)
    to_do = store.open_folder(out, study, provenance(command))
    trial = {point for point in to_do if point.n == min(study.grid.n)}
    # Long ones first: no worker is left alone with one at the end. But before them the quick ones that try the step.
    to_do.sort(key=lambda point: (point not in trial, -work(point)))
    points = study.points()
    kept, failures = len(points) - len(to_do), {}

    def standing() -> str:
        return f"{kept} of {len(points)} points are finished and kept in {out}"

    outcomes = run_tasks(partial(_attempt, study), to_do, workers=worker_count(study), threads=study.threads)
    try:
        with closing(outcomes), _bar(points, to_do, shown=progress) as bar:
            for point, (tables, seconds) in outcomes:
                if isinstance(tables, Exception):
                    failures[point] = tables
                    if not kept and all(isinstance(failures.get(tried), StepTooLargeError) for tried in trial):
                        break  # the others fare no better: λ_max hardly depends on n
                else:
                    store.write_point(out, point, tables, {"seconds": round(seconds, 3), "threads": study.threads})
                    kept += 1
                bar.set_description_str(f"{kept} of {len(points)} points", refresh=False)
                bar.update(work(point))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {standing()}; the same command continues") from None
    except WorkerLost as error:
        raise WorkerLost(f"{error}; {standing()}; the same command continues") from error
    finally:
        store.collect(out, study)
    if failures:
        left = len(points) - kept - len(failures)
        ending = f"; {left} points were not tried" * bool(left) + f"; {standing()}"
        raise _failure(study, failures, ending + f", `stability report {out}` draws them" * bool(kept))
    return store.load_results(out)


def _failure(study: Study, failures: Mapping[Point, Exception], ending: str) -> Exception:
    """One error for all points that failed: ValueError where a step was too large, else NumericalError."""
    from nt_kernel.errors import NumericalError
    from optim.step_limit import StepTooLargeError, round_down

    in_order = {point: failures[point] for point in study.points() if point in failures}
    too_large = {point: error for point, error in in_order.items() if isinstance(error, StepTooLargeError)}
    others = [f"{point}: {error}" for point, error in in_order.items() if point not in too_large]
    of, parts = len(study.points()), []
    if too_large:
        point, error = next(iter(too_large.items()))
        strictest = min(error.limit for error in too_large.values())
        parts.append(
            f"lr = {error.lr:g} is too large at {len(too_large)} of {of} points, the first {point}: "
            f"{error.where or 'the step'} needs lr < 2/λ_max = {error.limit:.4g}"
            + f", the strictest of them lr < {strictest:.4g}" * (strictest < error.limit)
            + f"; write lr = {round_down(0.9 * strictest):g} or less" * (strictest > 0)
        )
    if others:
        parts.append(f"{len(others)} of {of} points failed, the first at {others[0]}")
    return (ValueError if too_large else NumericalError)("; ".join(parts) + ending)


def run_point(study: Study, point: Point) -> dict[str, "pd.DataFrame"]:
    """Train one point's twins and lay the results out as the four tables of a results folder."""
    import stability
    from studies.data.subsets import draw
    from studies.kinds.twins_tables import as_tables

    drawn = draw(study, point)
    replacements = [
        stability.Replacement(index=k, x=x, target=target)
        for k, x, target in zip(drawn.replaced, drawn.replacement_x, drawn.replacement_targets, strict=True)
    ]
    result = stability.train_twins(
        drawn.model,
        drawn.x,
        drawn.targets,
        replacements,
        held_out=drawn.held_out,
        steps=study.steps,
        lr=study.lr,
        mass=point.mass,
        output_metric=study.output_metric,
        scale=study.metric_scale,
        loss=study.loss,
        null_twin=True,
    )
    return as_tables(point, drawn, result)


def _attempt(study: Study, point: Point):
    """``(tables, seconds)``; a failure of this point comes back in place of the tables, so that other points go on."""
    from nt_kernel.errors import NumericalError
    from optim.step_limit import StepTooLargeError

    start = time.perf_counter()
    try:
        outcome = run_point(study, point)
    except (NumericalError, StepTooLargeError) as error:
        outcome = error
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError  # a subclass may want other arguments
        raise kind(f"{point}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise ValueError(
            f"{point}: not enough memory on {study.device}; write a smaller n or width, or fewer replacements or workers"
        ) from error
    return outcome, time.perf_counter() - start


def _out_of_memory(error: Exception) -> bool:
    import torch

    said = ("can't allocate memory", "not enough memory")  # torch's CPU allocator has no type of its own for it
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


def check_device(study: Study) -> None:
    """ValueError when the study asks for a GPU that is not there."""
    if study.device == "cpu":
        return
    import torch

    index = int(study.device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={study.device} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs "
            "here; write device=cpu"
        )


def worker_count(study: Study) -> int:
    """Processes to use: as written, or one per core on the CPU and one on a GPU."""
    if study.workers != "auto":
        return study.workers
    if study.device != "cpu":
        return 1
    import joblib  # comes with scikit-learn; knows about containers' limits, which os.cpu_count does not

    return max(joblib.cpu_count() // study.threads, 1)


def work(point: Point) -> int:
    """About how long a point takes, in hundredths of a small one: orders the points and weighs the progress bar."""
    return round(100 * (1 + (point.n / 22) ** 3))  # measured: flat below n = 12, cubic (Cholesky factors) beyond 24


def _bar(points: list[Point], to_do: list[Point], *, shown: bool):
    from tqdm import tqdm

    everything, missing = sum(map(work, points)), sum(map(work, to_do))
    screen = shutil.get_terminal_size()  # tqdm's own guess shows nothing on a terminal that gives its size as 0 × 0
    return tqdm(
        desc=f"{len(points) - len(to_do)} of {len(points)} points",
        total=everything,
        initial=everything - missing,
        disable=not shown,
        file=sys.stderr,
        bar_format="{desc} |{bar}| {elapsed} so far, {remaining} left",
        mininterval=0.1 if sys.stderr.isatty() else 20,
        ncols=min(screen.columns, 100),
        nrows=screen.lines,
    )
