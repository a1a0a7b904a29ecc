"""Means with intervals over seeds of an optimizer study, tuned learning rates, and what came out in sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

FIXED = ("seed", "replaced", "replacement")
MEASURED = ("loss_tail", "held_out", "thickness", "alignment", "sup", "held_out_sup", "sup_at_level")


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
    """One row for each setting and seed: the mean over its twins. A diverged run has no loss and no divergence."""
    table = summary.copy()
    table["diverged"] = table["diverged"].astype(float)
    lost = table["diverged"] > 0
    table.loc[lost, [name for name in MEASURED if name != "held_out"]] = np.nan
    table = table.replace([np.inf, -np.inf], np.nan)
    return table.groupby([*axes, "seed"], as_index=False, dropna=False)[[*MEASURED, "diverged"]].mean()


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
    """Mean and interval of every measured quantity for each setting."""
    import pandas as pd

    axes = axes_of(frames)
    table = per_seed(frames.summary, axes)
    rows = []
    for values, group in table.groupby(axes or (lambda _: 0), sort=False):
        row = dict(zip(axes, values if isinstance(values, tuple) else (values,), strict=True)) if axes else {}
        row["seeds"] = len(group)
        row["diverged"] = group["diverged"].mean()
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


def sentences(frames: Frames) -> list[str]:
    """What came out: the setting with the least steady-state loss, the one with the least divergence, and how sure that is."""
    from studies.findings.written import number

    choice = (
        tuned(frames)
        if frames.summary.get("lr", frames.summary["seed"]).nunique() > 1 and "lr" in frames.summary
        else frames
    )
    table = means(choice)
    axes = [name for name in axes_of(frames) if name in table and (name != "lr" or choice is frames)]
    if not axes or len(table) < 2:
        return [f"{len(frames.summary)} twin pairs; steady-state loss {number(table['loss_tail'].iloc[0])}."]

    def label(row) -> str:
        return ", ".join(f"{name.rpartition('.')[2]} {row[name]}" for name in axes)

    said = []
    for name, what, least in (
        ("loss_tail", "Least steady-state loss", True),
        ("held_out", "Best held-out accuracy", False),
        ("held_out_sup", "Most stable on held-out points (least largest twin divergence)", True),
        ("sup_at_level", "Most stable at equal training loss", True),
    ):
        rows = table[table[name].notna()].sort_values(name, ascending=least)
        if len(rows) < 2:
            continue
        first, second = rows.iloc[0], rows.iloc[1]
        apart = abs(first[name] - second[name]) > np.nansum([first[f"{name} ±"], second[f"{name} ±"]])
        said.append(
            f"{what}: {label(first)}, {number(first[name])} ± {number(first[f'{name} ±'])}; next {label(second)}, "
            f"{number(second[name])} ± {number(second[f'{name} ±'])} ({'intervals apart' if apart else 'intervals overlap'})."
        )
    lost = table[table["diverged"] > 0]
    if len(lost):
        said.append(
            "Runs that diverged: "
            + "; ".join(f"{label(row)} ({row['diverged']:.0%})" for _, row in lost.iterrows())
            + "."
        )
    return said
