"""What a study over any axes says in numbers: which axes vary, medians at each of their values, changes along them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.findings.exponents import LEAST, fit_exponent
from studies.findings.written import setting, short_words

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

LOOP_COLUMNS = (
    *("measured_replaced", "measured_others", "measured_heldout", "T5", "path_sup", "null_sup"),
    *("train_loss", "held_out_loss", "gap", "held_out_accuracy", "uniform_stability", "parameter_distance"),
)


def varied(frames: Frames) -> list[str]:
    """The axes with more than one value, those that are keys of the study first, then by the number of values.

    >>> import pandas as pd
    >>> from studies.results.frames import Frames
    >>> summary = pd.DataFrame({"n": [6, 12], "mass": [1.0, 1.0], "width": [8, 8], "seed": [0, 1]})
    >>> varied(Frames(summary, summary, summary, summary))
    ['n']
    """
    summary = frames.summary
    own = [name for name in frames.extra_axes if summary[name].nunique() > 1]
    rest = [name for name in ("n", "mass", "width") if name in summary.columns and summary[name].nunique() > 1]
    return own + sorted(rest, key=lambda name: -summary[name].nunique())


def medians(summary: pd.DataFrame, axes: list[str], columns: tuple[str, ...]) -> pd.DataFrame:
    """Medians over seeds and pairs at every combination of the axes' values, in the order of the grid."""
    columns = [name for name in columns if name in summary.columns and summary[name].notna().any()]
    if not axes:
        return summary[columns].median().to_frame().T
    return summary.groupby(axes, sort=True)[columns].median().reset_index()


def loop_numbers(frames: Frames) -> list[tuple[str, pd.DataFrame]]:
    count = len(frames.summary)
    caption = f"Medians over seeds and twin pairs ({count} pairs in all); divergences are suprema over training."
    found = [(caption, medians(frames.summary, varied(frames), LOOP_COLUMNS))]
    identity = on_average(frames.summary, varied(frames))
    if len(identity):
        found.append((IDENTITY, identity.map(str)))
    return found


IDENTITY = (
    "The on-average identity, E[gap] = E[replace-one stability]: mean generalization gap, mean stability at the removed and "
    "the new sample, and their difference paired within draws, each with its 95 % interval over the independent draws. "
    "0 outside the interval of the difference would mean that something in the chain is wrong."
)


def on_average(summary: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """``stability.on_average_gap`` at every combination of the axes' values: columns gap, stability, difference (intervals),
    draws. Needs the losses of ``kind = "loops"`` and two seeds."""
    import pandas as pd

    from stability import on_average_gap

    rows = []
    groups = summary.groupby(axes) if axes else [((), summary)]
    for values, group in groups:
        group = group.sort_values(["seed", "replaced", "replacement"])
        draws = [rows for _, rows in group.groupby("seed")]
        if len(draws) < 2 or len({len(rows) for rows in draws}) > 1:
            continue
        losses = {name: np.stack([rows[name] for rows in draws]) for name in LOSSES}
        means = [[rows[name].iloc[0] for rows in draws] for name in ("train_loss", "held_out_loss")]
        found = on_average_gap(*losses.values(), *means)
        intervals = {"gap": found.gap, "stability": found.stability, "difference": found.difference}
        rows.append(dict(zip(axes, values, strict=True)) | intervals | {"draws": found.draws})
    return pd.DataFrame(rows)


OF_N = {
    "measured_others": "divergence at the other training samples",
    "measured_heldout": "divergence at held-out points",
    "uniform_stability": "largest difference of the twins' losses at held-out points",
    "gap": "generalization gap",
}
LOSSES = ("removed_own", "removed_twin", "new_own", "new_twin")


def loop_finding(frames: Frames) -> list[str]:
    """The opening paragraphs: how far the twins move apart along the first axis, what explains it, what it generalizes to."""
    summary, axes = frames.summary, varied(frames)
    pairs = f"{len(summary)} pairs of runs that differ in one training sample"
    sup = summary["measured_sup"]
    said = [
        f"{pairs} moved apart by {sup.min():.3g} to {sup.max():.3g} (median {sup.median():.3g}) on the worst training sample."
    ]
    if axes:
        said.append(f"Medians over seeds and pairs by {short_words(axes[0])}: " + along(summary, axes[0]))
    if "T5" in summary.columns and summary["T5"].notna().any():
        finite = summary[np.isfinite(summary["T5"]) & (summary["path_sup"] > 0)]
        below = int((finite["T5"] < 0.98 * finite["path_sup"]).sum())
        held = int((finite["T5"] * (1 + 1e-9) < finite["measured_sup"]).sum())
        said.append(
            f"The enclosure T5 is {(finite['T5'] / finite['measured_sup']).median():.3g} times the measured divergence in the "
            f"median, and clearly below the theory-free path length in {below} of {len(finite)} pairs; elsewhere contraction "
            "explains nothing beyond the length of the path." + f" It is broken in {held} pairs." * bool(held)
        )
    identity = on_average(summary, axes).to_dict("records")
    if identity:
        agree = sum(row["difference"].holds(0.0) for row in identity)
        said.append(
            f"The mean generalization gap equals the mean replace-one stability within the 95 % interval at {agree} of "
            f"{len(identity)} places of the grid, as it must in expectation; for example "
            + "; ".join(
                f"{', '.join(setting(name, row[name]) for name in axes)}: gap {row['gap']}, stability {row['stability']}"
                for row in identity[:2]
            ).removeprefix(": ")
            + "."
        )
    rounding = int((summary["null_sup"] > 0.01 * sup).sum())
    if rounding:
        said.append(f"In {rounding} pairs rounding alone (the null twin) makes more than 1 % of the divergence.")
    if summary["n"].nunique() >= LEAST and axes == ["n"]:
        fits = {what: fit_exponent(summary, column) for column, what in OF_N.items() if column in summary}
        fitted = [f"{what} {fit}" for what, fit in fits.items() if fit.fitted]
        if fitted:
            said.append(f"Exponents of n, with 95 % intervals: {'; '.join(fitted)}.")
    return said


def along(summary: pd.DataFrame, axis: str) -> str:
    """One clause per value of the axis.

    >>> import pandas as pd
    >>> at = {"measured_replaced": 0.5, "measured_others": 0.1, "measured_heldout": 0.2, "gap": 0.3}
    >>> along(pd.DataFrame([{"optimizer": "adam"} | at]), "optimizer")
    'adam: 0.5 at the replaced sample, 0.1 at the others, 0.2 held out, gap 0.3.'
    """
    table = medians(summary, [axis], ("measured_replaced", "measured_others", "measured_heldout", "gap"))
    return (
        "; ".join(
            f"{setting(axis, row[axis])}: {row['measured_replaced']:.3g} at the replaced sample, "
            f"{row['measured_others']:.3g} at the others, {row['measured_heldout']:.3g} held out, gap {row['gap']:.3g}"
            for _, row in table.iterrows()
        )
        + "."
    )
