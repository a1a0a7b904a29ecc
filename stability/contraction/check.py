"""The independent check of a contraction metric: a rate that holds for the stored Θ and A_t whatever solver and rounding did.

Nothing of the solver is believed but Θ itself. Θ is scaled to Θ ⪰ I; λ (or ρ) starts from the eigenvalues of the
whitened inequality and is backed off until the smallest eigenvalue of −(A_tᵀΘ + ΘA_t) − 2λΘ (discrete: ρ²Θ − A_tᵀΘA_t) is
certified ≥ 0: ``nt_kernel.spectra.certified`` for the matrix as stored, less a bound of the rounding in forming it. Under the
assumptions on the machine of ``nt_kernel.spectra.directed`` this is a proof for the stored matrices. **Derived.**
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nt_kernel.spectra.certified import certified_lambda_max, certified_lambda_min
from nt_kernel.spectra.directed import UNIT, gamma, next_up, round_up
from stability.contraction.sdp import exponent_of, inequalities

BACK_OFFS = 60  # each doubles the last: from a few roundings to anything


@dataclass(frozen=True)
class Checked:
    """Θ scaled to I ⪯ Θ ⪯ ``condition``·I, the certified rate in it, and the ``margin`` left in the inequality there."""

    metrics: list[np.ndarray]
    rate: float  # λ, or ρ
    condition: float
    margin: float  # certified smallest eigenvalue of the slack of the worst inequality, ≥ 0


def check_metric(
    kind: str, matrices: Sequence[np.ndarray], metrics: Sequence[np.ndarray], intervals: Sequence[float] | None = None
) -> Checked | None:
    """The certified rate and condition of given metrics; None where they cannot be certified positive definite.

    A rate λ ≤ 0, or ρ ≥ 1, is certified as well: it bounds the growth.

    >>> A = np.array([[0.0, 1.0], [-1.0, -0.5]])
    >>> found = check_metric("continuous", [A], [np.array([[1.0, 0.25], [0.25, 1.0]])])
    >>> 0.25 - 1e-13 < found.rate <= 0.25, 5 / 3 <= found.condition < 5 / 3 + 1e-13, found.margin >= 0
    (True, True, True)
    """
    metrics = normalised(metrics)
    if metrics is None:
        return None
    condition = max(1.0, *(certified_lambda_max(_tensor(Theta)).item() for Theta in metrics))
    try:
        start = exponent_of(kind, matrices, metrics, intervals)
    except np.linalg.LinAlgError:
        return None
    size = len(matrices[0])
    back = 8 * UNIT * size * max(abs(start), UNIT, *(float(np.linalg.norm(A, 2)) for A in matrices))
    for _ in range(BACK_OFFS):
        q = min(start - back, 0.0) if kind == "discrete" else start - back
        margin = certified_slack(kind, matrices, metrics, q, intervals)
        if margin >= 0:
            rate = q / 2 if kind == "continuous" else next_up(next_up(math.sqrt(-q)))
            return Checked(metrics, rate, condition, margin)
        back *= 2
    return None


def normalised(metrics: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """All metrics by one factor, so that the smallest eigenvalue of any is certified ≥ 1, and 1 to rounding."""
    if not all(np.isfinite(Theta).all() for Theta in metrics):
        return None
    metrics = [(Theta + Theta.T) / 2 for Theta in metrics]
    for _ in range(BACK_OFFS):
        least = min(certified_lambda_min(_tensor(Theta)).item() for Theta in metrics)
        if least <= 0:
            return None
        resolution = UNIT * len(metrics[0]) * max(1.0, *(np.linalg.norm(Theta, 2) / least for Theta in metrics))
        if 1 <= least < 1 + 64 * resolution:
            return metrics
        metrics = [Theta * ((1 + 8 * resolution) / least) for Theta in metrics]
    return None


def certified_slack(kind: str, matrices, metrics, q: float, intervals=None) -> float:
    """A lower bound of min_t λ_min(−G_t(Θ) − qΘ_t) for the exact products of the stored matrices.

    With P = fl(ΘA): |P − ΘA| ≤ γ_D|Θ||A| entry by entry, the sums add three to five roundings, and in discrete time there
    is a second product; ‖E‖₂ ≤ ‖|E|‖_F.
    """
    size = len(matrices[0])
    count = (2 * size if kind == "discrete" else size) + 8
    magnitudes = inequalities(kind, [abs(A) for A in matrices], [abs(Theta) for Theta in metrics], intervals)
    slopes = None if len(metrics) == 1 or kind == "discrete" else np.repeat(np.arange(len(matrices)), 2)
    worst = math.inf
    for j, ((G, Theta), (size_G, size_Theta)) in enumerate(
        zip(inequalities(kind, matrices, metrics, intervals), magnitudes, strict=True)
    ):
        if slopes is not None:  # |after| − |now| is no bound of |after − now|: add what it can miss, twice over
            t = slopes[j]
            size_G = size_G + 2 * (abs(metrics[t + 1]) + abs(metrics[t])) / intervals[t]
        slack = -G - q * Theta
        slack = (slack + slack.T) / 2
        entries = size_G + abs(q) * size_Theta
        radius = round_up(gamma(count) * float(np.sqrt(np.square(entries).sum())), size * size + 2 * size + 16)
        worst = min(worst, certified_lambda_min(_tensor(slack)).item() - radius)
    return worst


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
