"""Exponents of power laws in n, with confidence intervals that respect how a study draws its samples.

Model: log q = a + b·log n, ordinary least squares over all series (one series = one twin pair followed over n).
The seeds are the independent draws (data, initialisation, replacements); the replaced samples of one seed share them,
so the bootstrap draws whole seeds, each with all its replaced samples (Davison & Hinkley 1997, §3.8: whole clusters
mimic the variance, resampling inside them again overstates it). With few seeds the percentiles of a bootstrap are too
narrow; the interval is slope ± t·SE·√(G/(G−1)), G seeds, t of G − 1 degrees of freedom, which is exact for Gaussian
seeds. With one seed the replaced samples are the clusters, and the note says that seeds were not sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEAST_N = 3
"""A line through two points has no residual: below this no exponent is stated."""


@dataclass(frozen=True)
class Exponent:
    """Slope of log q against log n. `slope` is nan where nothing was fitted and `note` says why."""

    slope: float
    low: float
    high: float
    n_values: tuple[int, ...]
    clusters: int
    note: str = ""

    @property
    def fitted(self) -> bool:
        return bool(np.isfinite(self.slope))

    def __str__(self) -> str:
        if not self.fitted:
            return self.note
        if not np.isfinite(self.low):
            return f"{signed(self.slope)} (no interval)"
        return f"{signed(self.slope)}\u00a0[{signed(self.low)},\u00a0{signed(self.high)}]"


def signed(value: float) -> str:
    """
    >>> signed(-0.5), signed(1.234), signed(-0.001)
    ('−0.50', '+1.23', '+0.00')
    """
    text = f"{value:+.2f}"
    return "+0.00" if text == "-0.00" else text.replace("-", "−")


def slopes(x: np.ndarray, y: np.ndarray, cluster: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Least-squares slopes of y on x, one for each row of integer cluster weights.

    x, y: [rows]; cluster: [rows] in 0…G−1; weights: [draws, G]. Returns [draws]; nan where a draw holds a single x.

    >>> slopes(np.array([0., 1, 2]), np.array([1., 3, 5]), np.zeros(3, int), np.ones((1, 1)))
    array([2.])
    """
    moments = np.stack([np.ones_like(x), x, y, x * x, x * y], axis=1)  # [rows, 5]
    sums = np.zeros((weights.shape[1], 5))
    np.add.at(sums, cluster, moments)
    count, sx, sy, sxx, sxy = (weights @ sums).T  # each [draws]
    spread = count * sxx - sx**2
    ok = spread > 1e-9 * np.maximum(count * sxx, 1e-300)
    return np.where(ok, (count * sxy - sx * sy) / np.where(ok, spread, 1.0), np.nan)


def fit_exponent(
    frame: pd.DataFrame, column: str, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Exponent:
    """Exponent b of `column` ~ n^b in the rows of one width and one mass.

    Pairs that are 0 at every n (a replacement equal to the original) have no logarithm and are left out. Of the rest
    only those n count at which the column is finite and positive in every row: to drop just the rows where a bound is
    infinite, or ξ is 0, would choose the favourable pairs.

    Raises:
        ValueError: level outside (0, 1), or an unknown column.

    >>> import pandas as pd
    >>> rows = [(n, s, 0, 9, (1 + s) * n**-0.5) for n in (6, 12, 24) for s in (0, 1, 2)]
    >>> frame = pd.DataFrame(rows, columns=["n", "seed", "replaced", "replacement", "measured_sup"])
    >>> fit_exponent(frame, "measured_sup").slope
    -0.50
    """
    from scipy.stats import t as student

    if not 0 < level < 1:
        raise ValueError(f"level={level} is no confidence level; expected a number between 0 and 1, such as 0.95")
    if column not in frame.columns:
        raise ValueError(f"no column {column!r} to fit; the frame has {', '.join(map(str, frame.columns))}")

    still = (
        (frame[column] == 0)
        .groupby([frame["seed"], frame["replaced"], frame["replacement"]])
        .transform("all")
        .astype(bool)
    )
    rows = frame[~still]
    usable = (np.isfinite(rows[column]) & (rows[column] > 0)).groupby(rows["n"]).all().astype(bool)
    left_out = [int(n) for n in usable.index[~usable]]
    rows = rows[rows["n"].isin(usable.index[usable])]
    n_values = tuple(sorted(int(n) for n in rows["n"].unique()))
    notes = []
    if left_out:
        notes.append(f"0 or infinite in some pair at n = {', '.join(map(str, left_out))}")
    if still.any():
        notes.append("pairs that are 0 at every n left out")
    if len(n_values) < LEAST_N:
        return Exponent(np.nan, np.nan, np.nan, n_values, 0, "; ".join(["needs at least three n", *notes]))

    by_seed = rows["seed"].nunique() > 1
    names = ["seed"] if by_seed else ["seed", "replaced", "replacement"]
    cluster = rows.groupby(names).ngroup().to_numpy()
    groups = int(cluster.max()) + 1
    x, y = np.log(rows["n"].to_numpy(float)), np.log(rows[column].to_numpy(float))
    slope = float(slopes(x, y, cluster, np.ones((1, groups)))[0])
    if groups < 2:
        return Exponent(slope, np.nan, np.nan, n_values, groups, "; ".join(["one series: no interval", *notes]))
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    resampled = slopes(x, y, cluster, weights)
    resampled = resampled[np.isfinite(resampled)]
    half = float(student.ppf(0.5 + level / 2, groups - 1) * np.std(resampled) * np.sqrt(groups / (groups - 1)))
    if not by_seed:
        notes.insert(0, "one seed: the interval covers the replaced samples only")
    return Exponent(slope, slope - half, slope + half, n_values, groups, "; ".join(notes))
