"""Which bounds a study states at all: a rung that does not fit the loss is NaN in every pair, is not drawn, and is said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def stated(table: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    """The columns that are there and not NaN throughout.

    >>> import pandas as pd
    >>> stated(pd.DataFrame({"T0": [np.nan, np.nan], "T4": [1.0, np.inf]}), ["T0", "T2H", "T4"])
    ['T4']
    """
    return [name for name in columns if name in table.columns and bool(table[name].notna().any())]


def scale_words(summary: pd.DataFrame) -> str:
    """What 1 means on the axis of the outputs, by the number of ``classes`` (0: a regression).

    >>> import pandas as pd
    >>> scale_words(pd.DataFrame({"classes": [10], "outputs": [10]}))
    'targets are one-hot, so 1 is the distance from 0 to a target'
    """
    # Tables of before 2026-12 hold no number of classes; there one output tells a regression.
    regression = summary["classes"] == 0 if "classes" in summary.columns else summary.get("outputs", 0) == 1
    if np.all(regression):
        return "the unit is that of the regression target (its standard deviation in scikit-learn's sets)"
    return "targets are one-hot, so 1 is the distance from 0 to a target"


def why_missing(values: pd.Series) -> str:
    """Why a bound has no number in some pairs: infinite because ξ is 0, or not applicable (NaN: the rate of T2H)."""
    return "ξ = 0" if np.isinf(values).any() else "its rate is not above 0"


def another_loss(summary: pd.DataFrame) -> bool:
    """True where the pairs say that T0 to T3 do not apply to the loss they were trained with."""
    return "not_applicable" in summary.columns and not stated(summary, ["T0"])


def loss_note(summary: pd.DataFrame) -> str:
    """One line for a figure; "" where the whole ladder applies."""
    if not another_loss(summary):
        return ""
    T2H = "" if stated(summary, ["T2H"]) else "; T2H (its rate is not above 0)"
    return f"not applicable: T0 to T3, 2L√n, 2L (they need ½‖y − a‖²){T2H}"
