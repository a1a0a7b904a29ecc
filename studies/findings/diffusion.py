"""Latent diffusion by movements: the rows of each solver's best learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def best(frames) -> pd.DataFrame:
    """The rows of the summary at each solver's and budget's best learning rate (least mean held-out loss)."""
    keys = ["solver", "budget"]
    mean = frames.summary.groupby([*keys, "lr"], as_index=False)["loss"].mean()
    chosen = mean.loc[mean.groupby(keys)["loss"].idxmin(), [*keys, "lr"]]
    return frames.summary.merge(chosen, on=[*keys, "lr"])
