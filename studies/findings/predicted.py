"""How well one run predicted its twins: errors, correlation, and the factor that makes the prediction a guarantee."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.findings.grid import varied

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

LEVEL = 0.1


def agreement(rows: pd.DataFrame, place: str = "sup") -> dict[str, float]:
    """Of the rows' pairs: median and largest relative error, correlation, and the conformal factor at level 0.9.

    >>> import pandas as pd
    >>> found = agreement(pd.DataFrame({"measured_sup": [1.0, 2.0], "predicted_sup": [1.1, 1.8]}))
    >>> found["median error"], found["largest error"], found["correlation"]
    (0.1, 0.1, 1.0)
    """
    from stability import conformal_factor

    measured, predicted = rows[f"measured_{place}"].to_numpy(), rows[f"predicted_{place}"].to_numpy()
    error = np.abs(predicted - measured) / np.where(measured > 0, measured, np.nan)
    moving = len(rows) > 1 and measured.std() > 0 and predicted.std() > 0
    return {
        "pairs": len(rows),
        "median error": float(np.nanmedian(error)),
        "largest error": float(np.nanmax(error)),
        "correlation": float(np.corrcoef(measured, predicted)[0, 1]) if moving else float("nan"),
        "factor at 90 %": conformal_factor(measured, predicted, LEVEL).factor,
    }


def prediction_numbers(frames: Frames) -> list[tuple[str, pd.DataFrame]]:
    import pandas as pd

    axes = varied(frames)
    if not axes:
        table = pd.DataFrame([agreement(frames.summary)])
    else:
        rows = []
        for values, group in frames.summary.groupby(axes):
            rows.append(dict(zip(axes, values, strict=True)) | agreement(group))
        table = pd.DataFrame(rows)
    caption = (
        "Relative error of the predicted largest divergence on the training samples; the factor q with which measured ≤ "
        "q·predicted for a further twin drawn the same way with probability 0.9 (split conformal, marginal over draws; "
        "infinite where the pairs are too few, and only approximate here, since pairs of one seed share S)."
    )
    return [(caption, table)]


def prediction_finding(frames: Frames) -> list[str]:
    found = agreement(frames.summary)
    timing = frames.others.get("timing")
    said = [
        f"{found['pairs']} twins were predicted from runs on S alone and then trained: the prediction of the largest "
        f"divergence is off by {100 * found['median error']:.2g} % in the median, by {100 * found['largest error']:.2g} % at "
        f"most, with correlation {found['correlation']:.4f}."
    ]
    if timing is not None and len(timing):
        ratio = (timing["train_seconds"] / timing["predict_seconds"]).median()
        said.append(
            f"Predicting took {1 / ratio:.2g} times the time of training the same twins (median over the points)."
        )
    return said
