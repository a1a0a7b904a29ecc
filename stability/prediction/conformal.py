"""From predictions to guarantees: a factor q, calibrated on a few trained twins, that holds for twins nobody trained.

Split conformal prediction (Vovk, Gammerman & Shafer 2005, *Algorithmic Learning in a Random World*; Lei et al. 2018,
"Distribution-free predictive inference for regression", JASA 113) with the score measured/predicted.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ConformalFactor:
    """q with P(measured ≤ q·predicted) ≥ 1 − α for a further twin drawn as the m calibration twins were."""

    factor: float  # q; inf where m is too small for α
    alpha: float
    m: int

    @property
    def guarantee(self) -> str:
        """What holds, and under what, in words."""
        if math.isinf(self.factor):
            need = smallest_calibration(self.alpha)
            return (
                f"no guarantee: {self.m} calibration twins are too few for a coverage of {1 - self.alpha:g}, which takes "
                f"at least {need}; q = inf"
            )
        return (
            f"P(measured ≤ {self.factor:.4g}·predicted) ≥ {1 - self.alpha:g} for one further twin whose (k, z') is drawn as "
            f"those of the {self.m} calibration twins were (exchangeable), on average over their draw (marginal): not "
            "for each k, nor for another S, initialisation or metric, nor for the largest of many twins at once"
        )

    def upper(self, predicted):
        """q·predicted, for a number, an array or a tensor."""
        return self.factor * predicted


def conformal_factor(measured, predicted, alpha: float = 0.1) -> ConformalFactor:
    """q = the ⌈(1 − α)(m + 1)⌉-th smallest ratio measured/predicted of m calibration twins; inf where that exceeds m.

    measured, predicted [m]: non-negative, of twins drawn at random, none left out. A ratio 0/0 counts as 1, x/0 as inf.
    **Guarantee**: for a further twin drawn the same way P(measured ≤ q·predicted) ≥ 1 − α; its rank among the m + 1
    exchangeable ratios is uniform (ties help). Without ties the probability is below 1 − α + 1/(m + 1).

    Raises ValueError for arrays of different or no length, negative or NaN entries, α outside (0, 1).

    >>> measured = [1.0, 1.1, 0.9, 1.3, 1.2, 1.0, 0.8, 1.05, 0.95]
    >>> conformal_factor(measured, [1.0] * 9, alpha=0.1).factor, conformal_factor(measured, [1.0] * 9, alpha=0.05).factor
    (1.3, inf)
    """
    measured, predicted = _numbers("measured", measured), _numbers("predicted", predicted)
    if len(measured) != len(predicted) or len(measured) == 0:
        raise ValueError(
            f"measured and predicted need one entry per calibration twin, got {len(measured)} and {len(predicted)}"
        )
    _check_alpha(alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where((measured == 0) & (predicted == 0), 1.0, measured / predicted)
    m, rank = len(ratios), rank_of(alpha, len(ratios))
    return ConformalFactor(float(np.sort(ratios)[rank - 1]) if rank <= m else math.inf, float(alpha), m)


def rank_of(alpha: float, m: int) -> int:
    """⌈(1 − α)(m + 1)⌉, in integers where (1 − α)(m + 1) is one up to rounding.

    >>> rank_of(0.1, 9), rank_of(0.1, 10), rank_of(0.3, 9)
    (9, 10, 7)
    """
    return math.ceil(round((1 - alpha) * (m + 1), 9))


def smallest_calibration(alpha: float) -> int:
    """The fewest calibration twins with a finite q: the least m with ⌈(1 − α)(m + 1)⌉ ≤ m.

    >>> smallest_calibration(0.1), smallest_calibration(0.05)
    (9, 19)
    """
    _check_alpha(alpha)
    m = max(1, math.floor(1 / alpha) - 2)
    while rank_of(alpha, m) > m:
        m += 1
    return m


def _numbers(name: str, values) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    if not bool((values >= 0).all() and np.isfinite(values).all()):
        raise ValueError(
            f"{name} must hold finite numbers >= 0, got {values[~(values >= 0) | ~np.isfinite(values)][0]}"
        )
    return values


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ValueError(f"alpha must be a number between 0 and 1, got {alpha!r}")
