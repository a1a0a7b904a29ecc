"""The numbers that the report opens with, as pure functions of the frames. The words are in `paragraph.py`.

Ratios are taken pair by pair, then summarised. A pair whose divergence is exactly 0 (a replacement equal to the
original) has no ratio; a pair whose bound is infinite is counted, not averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from studies.findings.exponents import compared, fit_exponent

if TYPE_CHECKING:
    import pandas as pd

SLACK = 1e-9
"""Relative slack of every comparison of floats (theory, §4)."""
MARGIN = 0.02
"""An enclosure this close to the path length, relatively, is neither above nor below it."""
ASSUMING = ("T0", "T1", "T1c", "T2", "T3")
NORM = {
    "T0": "measured_sup",
    "T1": "measured_l2",
    "T1c": "measured_l2",
    "T2": "measured_l2",
    "T3": "measured_l2",
    "T4": "measured_l2",
    "T5": "measured_sup",
}
"""What each bound is a statement about: T0's theorem is stated for the worst sample, the rest of the ladder for the
stack."""


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest of `count` numbers; all nan when there are none."""

    low: float
    median: float
    high: float
    count: int

    def __bool__(self) -> bool:
        return self.count > 0


def spread_of(values: pd.Series | np.ndarray) -> Range:
    """
    >>> spread_of(np.array([3.0, 1.0, 2.0, np.inf, np.nan]))
    Range(low=1.0, median=2.0, high=3.0, count=3)
    """
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not values.size:
        return Range(np.nan, np.nan, np.nan, 0)
    return Range(float(values.min()), float(np.median(values)), float(values.max()), int(values.size))


def ratio(frame: pd.DataFrame, above: str, below: str) -> pd.Series:
    """above/below pair by pair; nan where `below` is 0.

    >>> import pandas as pd
    >>> ratio(pd.DataFrame({"T5": [2.0, 0.0], "path_sup": [1.0, 0.0]}), "T5", "path_sup").tolist()
    [2.0, nan]
    """
    return frame[above] / frame[below].where(frame[below] > 0)


@dataclass(frozen=True)
class PaperBound:
    """T0 against the measurement it bounds, and against the triangle inequality's 2L√n."""

    over_measured: Range
    over_floor: Range
    not_applicable: int
    broken: int


def paper_bound(summary: pd.DataFrame) -> PaperBound:
    return PaperBound(
        spread_of(ratio(summary, "T0", "measured_sup")),
        spread_of(ratio(summary, "T0", "vacuity_floor")),
        int(np.isinf(summary["T0"]).sum()),
        broken(summary, "T0"),
    )


def broken(summary: pd.DataFrame, bound: str) -> int:
    """Pairs in which the measurement exceeds the bound.

    >>> import pandas as pd
    >>> broken(pd.DataFrame({"T3": [1.0, 1.0], "measured_l2": [1.0 + 1e-12, 1.1]}), "T3")
    1
    """
    return int((summary[NORM[bound]] > summary[bound] * (1 + SLACK)).sum())


def informative(summary: pd.DataFrame) -> dict[str, int]:
    """For each bound under assumptions: pairs in which it is below the trivial level 2L√n of its norm."""
    return {bound: int((summary[bound] < summary["vacuity_floor"]).sum()) for bound in ASSUMING}


def exponents(summary: pd.DataFrame, columns: tuple[str, ...], draws: int = 2000) -> pd.DataFrame:
    """Fitted exponents of what the study runs along (`studies.findings.exponents.compared`): columns mass (along n) or n
    (along the mass), quantity, exponent (`studies.findings.exponents.Exponent`)."""
    import pandas as pd

    along = compared(summary)
    by = "n" if along == "mass" else "mass"
    rows = [
        (float(value), column, fit_exponent(rows, column, along=along, draws=draws))
        for value, rows in summary.groupby(by)
        for column in columns
    ]
    return pd.DataFrame(rows, columns=[by, "quantity", "exponent"]).sort_values(by, ascending=False, kind="stable")


@dataclass(frozen=True)
class Enclosure:
    """T5 over the path length, per sample, in three classes; T4 over the path length of the stack.

    Where T5 is not clearly below the path length, contraction explains nothing that the path length does not.
    """

    over_measured: Range
    over_path: Range
    below: int
    within: int
    above: int
    stacked: Range


def enclosure(summary: pd.DataFrame) -> Enclosure:
    """The classes leave room of MARGIN on either side of 1: a difference in the third digit explains nothing.

    >>> import pandas as pd
    >>> T5 = pd.DataFrame({"T5": [0.97, 0.99, 1.02, 1.03]})
    >>> found = enclosure(T5.assign(path_sup=1.0, measured_sup=0.9, T4=6.0, path_l2=2.0))
    >>> (found.below, found.within, found.above), found.stacked.median
    ((1, 2, 1), 3.0)
    """
    values = ratio(summary, "T5", "path_sup").dropna()
    below, above = int((values <= 1 - MARGIN).sum()), int((values > 1 + MARGIN).sum())
    return Enclosure(
        over_measured=spread_of(ratio(summary, "T5", "measured_sup")),
        over_path=spread_of(values),
        below=below,
        within=len(values) - below - above,
        above=above,
        stacked=spread_of(ratio(summary, "T4", "path_l2")),
    )


def null_twin(summary: pd.DataFrame) -> tuple[float, int]:
    """Largest divergence of the null twins (rounding alone), and the pairs whose divergence does not exceed their
    null twin's."""
    if "null_sup" not in summary.columns:
        return float("nan"), 0
    return float(summary["null_sup"].max()), int((summary["measured_sup"] <= summary["null_sup"]).sum())
