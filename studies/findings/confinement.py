"""Where the influence of the replaced sample goes: to its own output, the other training outputs, held-out points.

The question: does a small mass confine it, as H → multiple of the identity suggests? Two readings, because a small mass
also trains faster: the supremum over training, and the divergence at a training loss that every S run compared reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.results.frames import PAIR

if TYPE_CHECKING:
    import pandas as pd

PLACES = {
    "measured_replaced": "at the replaced sample",
    "measured_others": "at the other training samples",
    "measured_heldout": "at held-out points",
}


def equal_loss(trajectories: pd.DataFrame) -> tuple[float, pd.DataFrame]:
    """The divergence of each pair where the training loss of its S run comes down to a common level.

    The level is the lowest that every run reaches: the largest over the runs of their smallest training loss. Between
    the last step above the level and the first one at or below it, the step and the divergences are interpolated,
    linearly in log(training loss): at mass 0.01 one step may halve the loss. Returns the level and one row per pair:
    its key, `step` (with a fraction), the columns of PLACES, and `starts_below`, true where a run is at or below the
    level before its first step and the row is its start. (nan, no rows) for an empty frame.

    >>> import pandas as pd
    >>> key = {"n": 6, "width": 8, "seed": 0, "replaced": 0, "replacement": 9}
    >>> rates = {1.0: 0.9, 0.1: 0.5}
    >>> rows = [key | {"mass": m, "step": t, "train_loss": 0.5 * rates[m] ** t} for m in rates for t in range(5)]
    >>> level, at = equal_loss(pd.DataFrame(rows))
    >>> level, at.set_index("mass")["step"].to_dict()
    (0.328..., {0.1: 0.608..., 1.0: 4.0})
    """
    if trajectories.empty:
        return float("nan"), trajectories
    level = float(trajectories.groupby(PAIR)["train_loss"].min().max())
    places = [place for place in PLACES if place in trajectories.columns]
    rows = trajectories[[*PAIR, "step", "train_loss", *places]].sort_values([*PAIR, "step"])
    before = rows.groupby(PAIR)[["step", "train_loss", *places]].shift()  # the step before, of the same pair
    reached = rows["train_loss"] <= level
    first = rows[reached].groupby(PAIR).head(1)
    before = before.loc[first.index]
    tiny = np.finfo(float).tiny  # a loss of exactly 0 has no logarithm
    loss, loss_before = np.log(first["train_loss"].clip(lower=tiny)), np.log(before["train_loss"].clip(lower=tiny))
    # The weight of the step at or below the level; 1 where nothing comes before it.
    weight = ((loss_before - np.log(max(level, tiny))) / (loss_before - loss)).fillna(1.0)
    found = first[PAIR].assign(starts_below=before["train_loss"].isna())
    for name in ("step", *places):
        found[name] = weight * first[name] + (1 - weight) * before[name].fillna(first[name])
    return level, found.reset_index(drop=True)


def by_place(frame: pd.DataFrame) -> pd.DataFrame:
    """Median, smallest and largest divergence over the pairs: columns place, n, mass, median, low, high, pairs."""
    long = frame.melt(id_vars=PAIR, value_vars=list(PLACES), var_name="place", value_name="value")
    grouped = long[np.isfinite(long["value"])].groupby(["place", "n", "mass"])["value"]
    return grouped.agg(median="median", low="min", high="max", pairs="size").reset_index()


def change_with_mass(frame: pd.DataFrame) -> pd.DataFrame:
    """Divergence at the smallest mass over that at the largest, pair by pair (same data, start and replacement).

    Columns place, n, heavy, light, ratio (median over the pairs), low, high, pairs. Only pairs trained at both masses
    and with a positive divergence at both count. Empty with one mass.

    >>> import pandas as pd
    >>> key = {"n": 6, "width": 8, "seed": 0, "replaced": 0, "replacement": 9}
    >>> same = {"measured_replaced": 0.5, "measured_heldout": 0.5}
    >>> rows = [key | same | {"mass": mass, "measured_others": value} for mass, value in ((1.0, 0.4), (0.01, 0.1))]
    >>> change_with_mass(pd.DataFrame(rows)).set_index("place")["ratio"].to_dict()
    {'measured_heldout': 1.0, 'measured_others': 0.25, 'measured_replaced': 1.0}
    """
    import pandas as pd

    heavy, light = frame["mass"].max(), frame["mass"].min()
    key = [name for name in PAIR if name != "mass"]
    columns = ["place", "n", "heavy", "light", "ratio", "low", "high", "pairs"]
    if not heavy > light:
        return pd.DataFrame(columns=columns)
    both = frame[frame["mass"] == light].merge(frame[frame["mass"] == heavy], on=key, suffixes=("_light", "_heavy"))
    rows = []
    for place in sorted(PLACES):
        over, under = both[f"{place}_light"], both[f"{place}_heavy"]
        usable = (over > 0) & (under > 0)
        for n, ratios in (over[usable] / under[usable]).groupby(both.loc[usable, "n"]):
            rows.append((place, int(n), heavy, light, ratios.median(), ratios.min(), ratios.max(), len(ratios)))
    return pd.DataFrame(rows, columns=columns)
