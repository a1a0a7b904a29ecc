"""What each inequality costs: the factors between the measured divergence and the paper's bound, step by step.

Along a chain of bounds of one quantity, value = measured · Π (factor of each step). Factors of one pair multiply exactly;
over pairs they are averaged in log10, so that the means of the steps still add up to the mean of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from studies.findings.applicable import stated

if TYPE_CHECKING:
    import pandas as pd

CHAINS = {
    "l2": ("measured_l2", "path_l2", "T5_l2", "T4", "T3", "T2", "T1c", "T1", "T0"),
    "sup": ("measured_sup", "path_sup", "T5"),
}
"""Bounds of ‖e‖, and of maxᵢ|eᵢ|, from the measurement upwards. A chain leaves out what a table does not hold."""
ORDERED = {
    ("measured_l2", "path_l2"),
    ("measured_l2", "T5_l2"),
    ("measured_sup", "path_sup"),
    ("T5_l2", "T4"),
    ("T3", "T2"),
    ("T2", "T1c"),
    ("T1c", "T1"),
    ("T1", "T0"),
}
"""Steps that are inequalities whatever the run: their factor is at least 1. The others compare two kinds of statement, and
may fall: T5 below the path where contraction explains something, T3 below T4 where it misses the drift of the kernel."""
GRID = ("n", "width", "mass")


def chain_of(columns: Iterable[str], quantity: str = "l2") -> tuple[str, ...]:
    """The chain of ``quantity`` as far as a table with these columns holds it. Raises ValueError for another quantity.

    >>> chain_of(["measured_l2", "T4", "path_l2", "n"])
    ('measured_l2', 'path_l2', 'T4')
    """
    if quantity not in CHAINS:
        raise ValueError(f"quantity must be one of {', '.join(CHAINS)}, got {quantity!r}")
    there = set(columns)
    return tuple(name for name in CHAINS[quantity] if name in there)


def waterfall(summary: pd.DataFrame, quantity: str = "l2") -> pd.DataFrame:
    """One row per step of the chain and per (n, width, mass), over the pairs of a study's ``summary``.

    Columns: ``step`` (its place in the chain), ``start``, ``end`` (names), ``ordered`` (an inequality whatever the run),
    ``log10`` (mean over the pairs of log10(end/start)), ``factor`` = 10^log10, ``low``, ``high`` (smallest and largest
    log10 of a pair), ``before``, ``after`` (mean log10 of start/measured and end/measured), ``pairs`` (how many entered) and
    ``left_out`` (pairs with no finite value there or before: ξ = 0).

    Σ log10 over the steps is ``after`` of the last, where the same pairs entered all of them. Bounds that do not apply to
    the loss (NaN in every pair) are not in the chain.

    >>> import pandas as pd
    >>> rows = pd.DataFrame({"n": 6, "mass": 1.0, "measured_l2": [1.0], "path_l2": [2.0], "T4": [20.0], "T0": [2e4]})
    >>> waterfall(rows)[["start", "end", "log10", "after"]].round(2).values.tolist()
    [['measured_l2', 'path_l2', 0.3, 0.3], ['path_l2', 'T4', 1.0, 1.3], ['T4', 'T0', 3.0, 4.3]]
    """
    import pandas as pd

    chain = chain_of(stated(summary, summary.columns), quantity)
    keys = [key for key in GRID if key in summary.columns]
    rows: list[dict] = []
    for key, these in summary.groupby(keys, sort=True):
        values = these[list(chain)].to_numpy(float)
        rows += [dict(zip(keys, key, strict=True)) | step for step in steps_of(values, chain)]
    return pd.DataFrame(rows)


def steps_of(values: np.ndarray, chain: Sequence[str]) -> list[dict]:
    """The steps of one chain, ``values`` [pairs, len(chain)]. A pair takes part as far as its values are positive, finite."""
    usable = np.logical_and.accumulate(np.isfinite(values) & (values > 0), axis=1)
    logs = np.log10(np.where(usable, values, 1.0))
    found = []
    for j, (start, end) in enumerate(pairwise(chain)):
        own = usable[:, j + 1]
        step, whole = logs[own, j + 1] - logs[own, j], logs[own, j + 1] - logs[own, 0]
        some = bool(own.any())
        mean = float(step.mean()) if some else np.nan
        found.append(
            {
                "step": j,
                "start": start,
                "end": end,
                "ordered": (start, end) in ORDERED,
                "log10": mean,
                "factor": 10**mean,
                "low": float(step.min()) if some else np.nan,
                "high": float(step.max()) if some else np.nan,
                "before": float((logs[own, j] - logs[own, 0]).mean()) if some else np.nan,
                "after": float(whole.mean()) if some else np.nan,
                "pairs": int(own.sum()),
                "left_out": int((~own).sum()),
            }
        )
    return found
