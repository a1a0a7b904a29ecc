"""One estimate for all replacements of each sample: how far can replacing sample k take the outputs, whatever comes in?

**Derived.** Let Z' be a pool that z' is drawn from, s(k, z') the predicted divergence (any quantity of ``predict_twins``), and
scale_k the largest s(k, z'_i) over some z'_i drawn for each k. For m further pairs (k_j, z'_j), drawn at random, the scores
s(k_j, z'_j)/scale_{k_j} are exchangeable with that of the next pair, given the scales; so with q their
⌈(1 − α)(m + 1)⌉-th smallest, P(s(k, z') ≤ q·scale_k) ≥ 1 − α (split conformal, ``stability.prediction.conformal``). No twin
is trained: for *trained* twins it is an estimate, as good as the prediction; ``calibrated`` makes it a guarantee by a few.

The single ellipsoid of ``stability.prediction.uniform`` is the same for every k, and has to hold the largest of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from stability.prediction.conformal import ConformalFactor, conformal_factor, smallest_calibration
from stability.prediction.predict import predict_twins
from stability.replacement import Replacement

QUANTITIES = ("sup", "others", "heldout")


@dataclass(frozen=True)
class PerSampleEstimate:
    """Per quantity ("sup", "others", "heldout"): the scale of each sample of S, [n], and the factor that lifts it."""

    scales: Mapping[str, Tensor]
    factors: Mapping[str, ConformalFactor]
    trained: bool = False  # what the factors were calibrated on: predictions, or trained twins

    def upper(self, quantity: str = "sup") -> Tensor:
        """q·scale_k of every sample k, [n], float64.

        >>> PerSampleEstimate({"sup": torch.tensor([1.0, 2.0])}, {"sup": ConformalFactor(1.5, 0.1, 9)}).upper()
        tensor([1.5000, 3.0000])
        """
        if quantity not in self.scales:
            raise ValueError(f"quantity must be one of {', '.join(self.scales)}, got {quantity!r}")
        return self.factors[quantity].factor * self.scales[quantity]

    def calibrated(self, replaced, measured: Mapping[str, Tensor], alpha: float = 0.1) -> "PerSampleEstimate":
        """The same scales with the factors of m trained twins, (k, z') drawn at random: then for a further twin drawn
        the same way P(measured ≤ q·scale_k) ≥ 1 − α.

        replaced: k of each, [m]; measured: {quantity: [m]} (``trained_divergence`` without its prefix, or a part of it).
        """
        k = torch.as_tensor(replaced)
        factors = {name: conformal_factor(values, self.scales[name][k], alpha) for name, values in measured.items()}
        return replace(self, scales={name: self.scales[name] for name in factors}, factors=factors, trained=True)

    @property
    def guarantee(self) -> str:
        """What holds, and under what, in words."""
        q = next(iter(self.factors.values()))
        of = "measured" if self.trained else "predicted"
        rest = "" if self.trained else "; for trained twins an estimate, whose coverage has to be measured"
        return (
            f"P({of} ≤ q·scale_k) ≥ {1 - q.alpha:g} for one further (k, z') drawn at random, on average over the draw of "
            f"the {q.m} pairs that q was calibrated on{rest}"
        )


def uniform_per_sample(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    pool: Tensor,
    pool_targets: Tensor,
    *,
    each: int = 4,
    alpha: float = 0.02,
    calibration: int | None = None,
    seed: int = 0,
    method: str = "strided-path",
    **options,
) -> PerSampleEstimate:
    """Estimate, from one run on S, how far any z' in the place of sample k takes the outputs, for every k.

    Parameters
    ----------
    model, x, targets, options: as for ``predict_twins`` (steps, lr, mass, held_out, …), with its ``method``.
    pool [Z, …], pool_targets [Z, p]: where z' comes from.
    each: draws of z' per k for the scales; calibration: m further pairs (default: the fewest that α allows, or n if more).
    alpha: of the conformal level. seed: of the draws; no global random state is touched.

    Cost: one ``predict_twins`` of n·each + m candidates. Raises ValueError for an empty pool, and what ``predict_twins`` does.

    >>> draw = torch.Generator().manual_seed(0)
    >>> model, x = nn.Linear(2, 1).double(), torch.randn(4, 2, generator=draw, dtype=torch.float64)
    >>> pool = torch.randn(50, 2, generator=draw, dtype=torch.float64)
    >>> found = uniform_per_sample(model, x, x.sum(1, keepdim=True), pool, pool.sum(1, keepdim=True), steps=20)
    >>> found.upper().shape, found.factors["sup"].m
    (torch.Size([4]), 49)
    """
    n, Z = len(x), len(pool)
    if isinstance(each, bool) or not isinstance(each, int) or each < 1:
        raise ValueError(f"each must be an int >= 1, got {each!r}")
    if Z < 1 or len(pool_targets) != Z:
        raise ValueError(f"pool and pool_targets need one row per z', at least one; got {Z} and {len(pool_targets)}")
    m = max(n, smallest_calibration(alpha)) if calibration is None else calibration
    draws = np.random.default_rng(seed)
    k = np.concatenate([np.repeat(np.arange(n), each), draws.integers(0, n, m)])
    z = np.concatenate([draws.permutation(Z) for _ in range(-(-len(k) // Z))])[: len(k)]
    candidates = [Replacement(int(i), pool[j], pool_targets[j]) for i, j in zip(k, z, strict=True)]
    found = predict_twins(model, x, targets, candidates, method=method, **options)
    scales, factors = {}, {}
    for name in QUANTITIES:
        if f"predicted_{name}" not in found.pairs[0]:
            continue
        s = found.column(f"predicted_{name}")
        scales[name] = s[: n * each].unflatten(0, (n, each)).amax(1)
        factors[name] = conformal_factor(s[n * each :], scales[name][torch.from_numpy(k[n * each :])], alpha)
    return PerSampleEstimate(scales, factors)
