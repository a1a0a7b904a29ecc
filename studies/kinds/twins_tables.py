"""What the twins of one point gave, laid out as the four tables of a results folder. One row means one thing:

summary       a twin pair
trajectories  a twin pair at a step
spectra       a run at a step and a quantile of the eigenvalues of H
assumptions   a quantity of one assumption, of a twin pair or (replaced = replacement = −1) of the run on S
"""

from collections import Counter

import numpy as np
import pandas as pd

from nt_kernel.errors import NumericalError
from stability.loss_ladder import NOT_APPLICABLE
from studies.data.subsets import Draw


def as_tables(key: dict, drawn: Draw, result) -> dict[str, pd.DataFrame]:
    """The result of ``train_twins`` with key columns in front: n, width, mass, seed; replaced, replacement of a pair.

    ``key``: the columns of the point (``study.columns``). Raises NumericalError when a summary number is NaN.
    """
    rows = [{f"{name}_used" if name in key else name: value for name, value in pair.items()} for pair in result.pairs]
    pair_keys = [
        key | {"replaced": k, "replacement": row} for k, row in zip(drawn.replaced, drawn.replacement_rows, strict=True)
    ]
    fixed = {"classes": drawn.classes}
    summary = pd.DataFrame([pair_key | fixed | pair for pair_key, pair in zip(pair_keys, rows, strict=True)])
    _refuse_nan(summary)

    run = {name: np.asarray(series) for name, series in result.run.items()}
    step = np.arange(len(next(iter(run.values()))))  # [T + 1]
    trajectories = pd.concat(
        [
            pd.DataFrame(
                pair_key
                | {"step": step, "time": step * pair["lr"]}
                | {name: series[j] for name, series in result.trajectories.items()}
                | run
            )
            for j, (pair_key, pair) in enumerate(zip(pair_keys, result.pairs, strict=True))
        ],
        ignore_index=True,
    )
    quantiles = np.asarray(result.spectrum_quantiles)
    spectra = pd.DataFrame(
        key
        | {
            "step": step.repeat(len(quantiles)),
            "quantile": np.tile(quantiles, len(step)),
            "eigenvalue": np.asarray(result.spectrum).ravel(),  # [T + 1, Q], row by row
        }
    )
    return {
        "summary": summary,
        "trajectories": trajectories,
        "spectra": spectra,
        "assumptions": _assumptions(key, drawn, result.assumptions),
    }


def _assumptions(key: dict, drawn: Draw, rows: list[dict]) -> pd.DataFrame:
    found, seen = [], Counter()
    for row in rows:
        k = row["replaced"]
        candidates = [z for replaced, z in zip(drawn.replaced, drawn.replacement_rows, strict=True) if replaced == k]
        # With fewer samples than replacements a sample k has several twins; their rows come in the order of the pairs.
        which = (k, row["assumption"], row["quantity"])
        replacement = -1 if k < 0 else candidates[seen[which] % len(candidates)]
        seen[which] += 1
        found.append(key | {"replaced": k, "replacement": replacement} | row)
    return pd.DataFrame(found).astype({"value": float, "threshold": float, "margin": float})


def _refuse_nan(summary: pd.DataFrame) -> None:
    stated = NOT_APPLICABLE if "not_applicable" in summary else ()  # rungs that say why they are NaN
    if broken := [name for name in summary.columns[summary.isna().any()] if name not in stated]:
        raise NumericalError(f"not a number in {', '.join(broken)}")
