"""Means with intervals over seeds of an optimizer study, and tuned learning rates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

DISTANCES = ("sup", "held_out_sup", "sup_at_level")
VELOCITY = ("thickness", "alignment", "factor", "forcing")
MEASURED = ("loss_tail", "held_out", *VELOCITY, *DISTANCES)
LOST = ("diverged", "twin_diverged")


def axes_of(frames: Frames) -> list[str]:
    """The axes with more than one value, in the order of the columns."""
    grid = frames.config.get("grid", {})
    known = [
        "n",
        "width",
        "mass",
        *[name for name in grid if name not in ("n", "width", "mass", "seeds", "replacements")],
    ]
    return [name for name in known if name in frames.summary.columns and frames.summary[name].nunique() > 1]


def per_seed(summary: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """One row for each setting and seed: the mean over its twins. A run that diverged has no loss, its pairs no distance."""
    # older folders do not say it of twins, and frames of one's own may hold no velocity
    there = {name: summary.get(name, 0.0) for name in LOST} | {name: summary.get(name, np.nan) for name in VELOCITY}
    table = summary.assign(**there)
    table[list(LOST)] = table[list(LOST)].astype(float)
    lost = table["diverged"] > 0
    table.loc[lost, [name for name in MEASURED if name != "held_out"]] = np.nan
    table.loc[table["twin_diverged"] > 0, list(DISTANCES)] = np.nan
    table = table.replace([np.inf, -np.inf], np.nan)
    return table.groupby([*axes, "seed"], as_index=False, dropna=False)[[*MEASURED, *LOST]].mean()


def interval(values: np.ndarray) -> float:
    """Half the width of the 95 % t interval of the mean; nan for fewer than two values.

    >>> round(interval(np.array([1.0, 2.0, 3.0])), 3)
    2.484
    """
    from scipy.stats import t

    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def means(frames: Frames) -> pd.DataFrame:
    """Mean and interval of every measured quantity for each setting; ``reached``: seeds that came down to the loss at which
    ``sup_at_level`` is read, over which alone it is a mean."""
    import pandas as pd

    axes = axes_of(frames)
    table = per_seed(frames.summary, axes)
    rows = []
    for values, group in table.groupby(axes or (lambda _: 0), sort=False):
        row = dict(zip(axes, values if isinstance(values, tuple) else (values,), strict=True)) if axes else {}
        row["seeds"] = len(group)
        row |= {name: group[name].mean() for name in LOST}
        row["reached"] = int(group["sup_at_level"].notna().sum())
        for name in MEASURED:
            row[name] = group[name].mean()
            row[f"{name} ±"] = interval(group[name].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def tuned(frames: Frames) -> Frames:
    """The rows at each setting's best learning rate: least mean steady-state loss over seeds, no seed diverged if possible."""
    axes = [name for name in axes_of(frames) if name != "lr"]
    table = per_seed(frames.summary, [*axes, "lr"])
    grouped = table.groupby([*axes, "lr"], as_index=False).agg(
        loss=("loss_tail", "mean"), diverged=("diverged", "mean")
    )
    ranked = grouped.sort_values(["diverged", "loss"])
    best = ranked.groupby(axes, as_index=False).head(1) if axes else ranked.head(1)
    return replace(frames, summary=frames.summary.merge(best[[*axes, "lr"]], on=[*axes, "lr"]))


def at_the_edge(frames: Frames) -> pd.DataFrame:
    """The settings whose tuned learning rate is the smallest or largest tried, and it as ``lr``: a better may lie beyond."""
    settings = [name for name in axes_of(frames) if name != "lr"]
    chosen = tuned(frames).summary[[*settings, "lr"]].drop_duplicates()
    tried = frames.summary["lr"]
    return chosen[chosen["lr"].isin([tried.min(), tried.max()])]
