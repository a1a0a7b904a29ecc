"""What became of one point, in a form that any engine can carry: tables, or a failure with its traceback in words."""

import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.definition.config import Study
from studies.definition.points import Point
from studies.definition.training import FILES

if TYPE_CHECKING:
    import pandas as pd

ATTEMPTS = 3


@dataclass(frozen=True)
class Failure:
    """``kind``: "step" (lr too large), "numerical", "input" (what was asked for cannot be), "memory", "worker" (it died), or
    "other", a mistake of ours or of the user's model."""

    kind: str
    message: str
    traceback: str = ""
    attempts: int = 1
    lr: float = 0.0
    limit: float = 0.0
    where: str = ""


@dataclass(frozen=True)
class Outcome:
    tables: "dict[str, pd.DataFrame] | None"
    failure: Failure | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # seconds, host, attempts


def attempt(study: Study, point: Point, *, attempts: int = ATTEMPTS) -> Outcome:
    """The point's tables. What is wrong with the input or the numbers is wrong the second time too; anything else is tried
    ``attempts`` times in all. No exception but an interrupt leaves this function."""
    compute = study.kind_object.run_point
    for tried in range(1, attempts + 1):
        start = time.perf_counter()
        tables, failure = _once(compute, study, point, tried)
        facts = {"seconds": round(time.perf_counter() - start, 3), "threads": study.threads, "host": platform.node()}
        if failure is None or failure.kind not in ("other", "memory"):
            break
    return Outcome(tables, failure, facts | {"attempts": tried})


def _once(compute: Callable, study: Study, point: Point, tried: int) -> "tuple[Any, Failure | None]":
    try:
        _check_key(study, point)
        tables = compute(study, point)
        _check_key(study, point)
        return tables, None
    except Exception as error:
        return None, failure_of(error, study.device, tried)


def _check_key(study: Study, point: Point) -> None:
    """Numbers of other data, changed meanwhile or different on the machine of a worker, must not be stored under this key."""
    name = getattr(getattr(study.at(point), "data", None), "name", "")
    if name.endswith(FILES) and not study.is_of(point):
        there, here = f"data.name = {name} on {platform.node()}", Path.cwd()
        if not Path(name).is_file():
            raise ValueError(f"{there}: no such file; paths are taken from the current folder there, {here}")
        raise ValueError(f"{there} does not hold what it held when the study was started; start it again")


def failure_of(error: Exception, device: str, tried: int = 1) -> Failure:
    """What an exception means for the study."""
    from nt_kernel.errors import NumericalError
    from optim.steps.step_limit import StepTooLargeError

    said, text = str(error), "".join(traceback.format_exception(error))
    if isinstance(error, StepTooLargeError):
        return Failure("step", said, text, tried, error.lr, error.limit, error.where or "")
    if isinstance(error, NumericalError):
        return Failure("numerical", said, text, tried)
    if _out_of_memory(error):
        advice = "write a smaller n or width, or fewer replacements or workers"
        return Failure("memory", f"not enough memory on {device}; {advice}", text, tried)
    if isinstance(error, ValueError | TypeError | ImportError):
        return Failure("input", said, text, tried)
    return Failure("other", f"{type(error).__name__}: {said}", text, tried)


def _out_of_memory(error: BaseException | None) -> bool:
    import torch

    if error is None:
        return False
    said = ("can't allocate memory", "not enough memory")  # torch's CPU allocator has no type of its own for it
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said):
        return True
    return _out_of_memory(error.__cause__)  # the user's code ran out of it
