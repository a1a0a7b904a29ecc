"""A kind of study that trains nothing: its points are a formula and a pause. For tests of engines, store and plug-ins, and
as small as a kind of one's own may be."""

import os
import time
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd

from studies.definition.config import Grid, Study
from studies.definition.fields import Count, one_or_more
from studies.definition.kinds import Kind, TableSpec


class LightGrid(Grid):
    size: Annotated[list[Count], *one_or_more]


class LightStudy(Study):
    AXES: ClassVar[tuple[str, ...]] = ("size",)

    power: float = 2.0
    wait: float = 0.0  # seconds a point takes
    deaths: str = ""  # a file: each of its lines lets one point end its own process
    grid: LightGrid


def run_point(study, point):
    at = study.at(point)
    time.sleep(at.wait)
    if at.deaths and Path(at.deaths).exists() and (left := Path(at.deaths).read_text().splitlines()):
        Path(at.deaths).write_text("\n".join(left[1:]))
        os.kill(os.getpid(), 9)
    noise = np.random.default_rng(point.seed).standard_normal(3)
    rows = [study.columns(point) | {"draw": i, "value": point.size**at.power + x} for i, x in enumerate(noise)]
    return {"summary": pd.DataFrame(rows)}


LIGHT = Kind(
    name="light",
    what="a formula",
    config=LightStudy,
    tables={"summary": TableSpec(("draw",), ("value",))},
    run_point=run_point,
    work=lambda study, point: point.size,
    finding=lambda frames: [f"The mean is {frames.summary['value'].mean():.3f}."],
    numbers=lambda frames: [("Means", frames.summary.groupby("size")[["value"]].mean().reset_index())],
)
