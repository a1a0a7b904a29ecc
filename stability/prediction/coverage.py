"""Does a calibrated prediction keep what it promises? Coverage on twins that were held back, over many settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from stability.prediction.conformal import ConformalFactor, conformal_factor
from stability.prediction.predict import predict_twins
from stability.prediction.trained import trained_divergence
from stability.replacement import Replacement

QUANTITIES = ("sup", "others", "heldout")


@dataclass(frozen=True)
class Setting:
    """One run and its twins, drawn at random beforehand; ``options`` go to the run (steps, lr, mass, …)."""

    name: str
    model: nn.Module
    x: Tensor
    targets: Tensor
    candidates: Sequence[Replacement]
    held_out: Tensor | None
    options: Mapping


def coverage_study(
    settings: Sequence[Setting],
    *,
    calibration: int,
    alpha: float = 0.1,
    method: str = "parameter-path",
    cg_steps: int = 2,
) -> list[dict]:
    """Train and predict the twins of every setting; calibrate q on the first ``calibration`` of them, test it on the rest.

    One dict per setting and quantity ("sup", "others", "heldout"): "setting", "quantity", "factor" (q), "covered" and
    "tested" (counts), "coverage", "overestimate" (median of q·predicted/measured over the tested twins), "correlation" and
    "error" (median |predicted − measured|/measured), both over all twins, "alpha", "m". The counts of settings that
    share nothing add up: their coverage is at least 1 − α on average (``pooled``).
    Raises ValueError for a setting that leaves nobody to test.
    """
    rows = []
    for setting in settings:
        if len(setting.candidates) <= calibration:
            raise ValueError(
                f"setting {setting.name!r} has {len(setting.candidates)} twins, {calibration} of them to calibrate on: "
                "none is left to test"
            )
        data = (setting.model, setting.x, setting.targets, setting.candidates)
        found = predict_twins(*data, held_out=setting.held_out, method=method, cg_steps=cg_steps, **setting.options)
        trained = trained_divergence(*data, held_out=setting.held_out, **setting.options)
        for quantity in QUANTITIES:
            if f"measured_{quantity}" in trained:
                predicted = found.column(f"predicted_{quantity}").numpy()
                measured = trained[f"measured_{quantity}"].double().cpu().numpy()
                row = {"setting": setting.name, "quantity": quantity}
                rows.append(row | coverage(measured, predicted, calibration, alpha))
    return rows


def coverage(measured: np.ndarray, predicted: np.ndarray, calibration: int, alpha: float) -> dict:
    """The numbers of one row of :func:`coverage_study`.

    >>> row = coverage(np.array([1.0, 2.0, 1.0, 3.0]), np.array([1.0, 1.0, 1.0, 1.0]), 2, 0.5)
    >>> row["factor"], row["covered"], row["tested"], row["overestimate"]
    (2.0, 1, 2, 1.3333333333333333)
    """
    q: ConformalFactor = conformal_factor(measured[:calibration], predicted[:calibration], alpha)
    tested, upper = measured[calibration:], q.upper(predicted[calibration:])
    varies = len(measured) > 1 and measured.std() > 0 and predicted.std() > 0
    return {
        "factor": q.factor,
        "covered": int((tested <= upper).sum()),
        "tested": len(tested),
        "coverage": float((tested <= upper).mean()),
        "overestimate": float(np.median(upper / tested)),
        "correlation": float(np.corrcoef(measured, predicted)[0, 1]) if varies else float("nan"),
        "error": float(np.median(np.abs(predicted - measured) / measured)),
        "alpha": alpha,
        "m": calibration,
    }


def pooled(rows: Sequence[Mapping], quantity: str) -> dict:
    """All settings together for one quantity: twins tested, their coverage, the median over-estimate and the median q.

    >>> rows = [{"quantity": "sup", "covered": 9, "tested": 10, "overestimate": 1.1, "factor": 1.2}] * 2
    >>> pooled(rows, "sup")
    {'tested': 20, 'coverage': 0.9, 'overestimate': 1.1, 'factor': 1.2}
    """
    rows = [row for row in rows if row["quantity"] == quantity]
    tested = sum(row["tested"] for row in rows)
    return {
        "tested": tested,
        "coverage": sum(row["covered"] for row in rows) / tested,
        "overestimate": float(np.median([row["overestimate"] for row in rows])),
        "factor": float(np.median([row["factor"] for row in rows])),
    }
