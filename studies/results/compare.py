"""Two results folders against each other: what differs in their configs, and by how much in their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from studies.definition.config import WITHOUT_EFFECT
from studies.definition.config_text import flatten
from studies.definition.kinds import kind_of
from studies.results.frames import Frames
from studies.results.store import load_results

if TYPE_CHECKING:
    import pandas as pd


LARGEST = "largest relative difference"


@dataclass(frozen=True)
class Comparison:
    """``config``: rows key, left, right of what differs. ``numbers``: a row per column of the summaries: median on each side
    over the common rows, median ratio right/left, and the largest
    relative difference |right − left|/max(|left|, |right|). ``common``: how many rows both have."""

    config: pd.DataFrame
    numbers: pd.DataFrame
    common: int
    only_left: int
    only_right: int

    @property
    def equal(self) -> bool:
        """Same rows, and the same numbers bit for bit."""
        return not self.only_left and not self.only_right and not (self.numbers[LARGEST] > 0).any()


def compare_results(left: str | Path | Frames, right: str | Path | Frames) -> Comparison:
    """Compare two folders (or their frames) row by row: rows are the same where axes, seed and pair are.

    An axis that only one of them has, or that has one value in each, does not count: runs with lr = 0.1 and lr = 0.2 are
    compared pair by pair. Raises ValueError where they have no row in common.
    """
    import pandas as pd

    a, b = (side if isinstance(side, Frames) else load_results(side) for side in (left, right))
    mine, theirs = (flatten({k: v for k, v in side.config.items() if k != "provenance"}) for side in (a, b))
    rows = [
        {"key": key, "left": str(mine.get(key, "not set")), "right": str(theirs.get(key, "not set"))}
        for key in mine | theirs
        if mine.get(key) != theirs.get(key) and key not in WITHOUT_EFFECT
    ]
    key = [name for name in _key_columns(a) if name in b.summary.columns and name in _key_columns(b)]
    rows_named_by = (
        kind_of(a.config.get("kind", "twins")).tables["summary"].key
    )  # labels, of which no median makes sense
    key = [name for name in key if a.summary[name].nunique() > 1 or b.summary[name].nunique() > 1 or name == "seed"]
    both = a.summary.merge(b.summary, on=key, suffixes=(" left", " right"))
    if both.empty:
        raise ValueError(f"the two have no row in common by {', '.join(key)}: nothing to compare")
    numbers = []
    for name in a.summary.columns:
        if name in {*key, *rows_named_by} or name not in b.summary.columns or a.summary[name].dtype.kind not in "iuf":
            continue
        x, y = (both[f"{name} {side}"].to_numpy(float) for side in ("left", "right"))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(x == y, 1.0, y / x)
            difference = np.where(
                (x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(y - x) / np.maximum(np.abs(x), np.abs(y))
            )
        middle = [float(np.nanmedian(v)) if np.isfinite(v).any() else float("nan") for v in (x, y, ratio)]
        numbers.append(
            dict(zip(("column", "left", "right", "right/left"), (name, *middle), strict=True))
            | {LARGEST: float(np.nanmax(difference)) if not np.isnan(difference).all() else float("nan")}
        )
    counts = [len(side.summary) - len(both[key].drop_duplicates().merge(side.summary[key])) for side in (a, b)]
    return Comparison(pd.DataFrame(rows, columns=["key", "left", "right"]), pd.DataFrame(numbers), len(both), *counts)


def _key_columns(frames: Frames) -> list[str]:
    """Axes, seed and what else names a row of the summary in this kind of study."""
    kind = kind_of(frames.config.get("kind", "twins"))
    names = [*kind.config.AXES, *frames.extra_axes, "seed", *kind.tables["summary"].key]
    return [name for name in dict.fromkeys(names) if name in frames.summary.columns]
