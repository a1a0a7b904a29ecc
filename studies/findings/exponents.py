"""Exponents of power laws, in n or another axis of numbers, with intervals that respect how a study draws its samples.

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

from studies.findings.written import plural_of, settings, short_words

if TYPE_CHECKING:
    import pandas as pd

LEAST = 3
"""A line through two points has no residual: below this no exponent is stated."""


def compared(summary: pd.DataFrame) -> str:
    """What bounds and exponents run along: n, or the mass where a study has one n and several masses.

    >>> import pandas as pd
    >>> compared(pd.DataFrame({"n": [6, 12], "mass": [1.0, 0.1]})), compared(pd.DataFrame({"n": [6, 6], "mass": [1.0, 0.1]}))
    ('n', 'mass')
    """
    return "mass" if summary["n"].nunique() == 1 and summary["mass"].nunique() > 1 else "n"


@dataclass(frozen=True)
class Exponent:
    """Slope of log q against log n, or of another axis. `slope` is nan where nothing was fitted and `note` says why."""

    slope: float
    low: float
    high: float
    values: tuple[float, ...]
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
    frame: pd.DataFrame, column: str, *, along: str = "n", level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Exponent:
    """Exponent b of `column` ~ n^b in the rows of one width and one mass; ``along`` names another axis than n.

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
    for name in (column, along):
        if name not in frame.columns:
            raise ValueError(f"no column {name!r} to fit; the frame has {', '.join(map(str, frame.columns))}")

    still = (
        (frame[column] == 0)
        .groupby([frame["seed"], frame["replaced"], frame["replacement"]])
        .transform("all")
        .astype(bool)
    )
    rows = frame[~still]
    usable = (np.isfinite(rows[column]) & (rows[column] > 0)).groupby(rows[along]).all().astype(bool)
    left_out = list(usable.index[~usable])
    rows = rows[rows[along].isin(usable.index[usable])]
    values = tuple(sorted(rows[along].unique().tolist()))
    notes = []
    if left_out:
        notes.append(f"0 or infinite in some pair at {settings(along, left_out)}")
    if still.any():
        notes.append(f"pairs that are 0 at every {short_words(along)} left out")
    if len(values) < LEAST:
        return Exponent(
            np.nan, np.nan, np.nan, values, 0, "; ".join([f"needs at least three {plural_of(along)}", *notes])
        )

    by_seed = rows["seed"].nunique() > 1
    names = ["seed"] if by_seed else ["seed", "replaced", "replacement"]
    cluster = rows.groupby(names).ngroup().to_numpy()
    groups = int(cluster.max()) + 1
    x, y = np.log(rows[along].to_numpy(float)), np.log(rows[column].to_numpy(float))
    slope = float(slopes(x, y, cluster, np.ones((1, groups)))[0])
    if groups < 2:
        return Exponent(slope, np.nan, np.nan, values, groups, "; ".join(["one series: no interval", *notes]))
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    resampled = slopes(x, y, cluster, weights)
    resampled = resampled[np.isfinite(resampled)]
    half = float(student.ppf(0.5 + level / 2, groups - 1) * np.std(resampled) * np.sqrt(groups / (groups - 1)))
    if not by_seed:
        notes.insert(0, "one seed: the interval covers the replaced samples only")
    return Exponent(slope, slope - half, slope + half, values, groups, "; ".join(notes))
