"""Which Θ to take: the largest rate at a bounded condition, or the smallest gain √χ/λ over all rates.

Both work in the exponent q of ``stability.contraction.sdp`` and trust a program only for the Θ that it proposes.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from stability.contraction.sdp import Programs, exponent_of

LARGEST_CONDITION = 1e6  # where the caller sets no χ: what a float64 check still tells from rounding
BADLY_SCALED = 1e4  # a χ beyond which the program at given χ loses digits: that of the smallest χ is asked first
MOST_SOLVES = 60
GAIN_TOLERANCE = 0.01


@dataclass(frozen=True)
class Proposal:
    """The best Θ found and its exponent, both before the check."""

    metrics: list[np.ndarray]
    exponent: float


def speed(kind: str, q: float) -> float:
    """What divides the gain: λ = q/2, or 1 − ρ with ρ = √−q.

    >>> speed("continuous", 0.5), speed("discrete", -0.25)
    (0.25, 0.5)
    """
    return q / 2 if kind == "continuous" else 1 - math.sqrt(max(-q, 0.0))


def exponent_at(kind: str, x: float) -> float:
    """The inverse of :func:`speed`."""
    return 2 * x if kind == "continuous" else -((1 - x) ** 2)


def exponent_limit(kind: str, matrices, *, condition: float = math.inf, intervals=None, time_varying=False):
    """(q, t): no metric allows an exponent above q, and sample t is why.

    A constant Θ: −2·spectral abscissa, −(spectral radius)². Metrics that vary lose that limit; what is left is
    ‖Φ_t‖₂ ≤ √χ·e^{−λh} for every one-sample transition Φ_t = e^{A_t h} (or A_t, √χ·ρ).
    """
    limits = []
    for t, A in enumerate(matrices):
        if not time_varying:
            z = np.linalg.eigvals(A)
            limits.append(-2 * z.real.max() if kind == "continuous" else -(np.abs(z).max() ** 2))
        elif kind == "discrete":
            limits.append(-(np.linalg.norm(A, 2) ** 2) / condition)
        else:
            growth = math.log(max(np.linalg.norm(scipy.linalg.expm(A * intervals[t]), 2), 1e-300))
            limits.append((math.log(condition) - 2 * growth) / intervals[t])
    t = int(np.argmin(limits))
    return float(limits[t]), t


def fastest(programs: Programs, limit: float, condition: float, tolerance: float) -> Proposal:
    """Bisection of the rate between Θ = I and ``limit`` at I ⪯ Θ ⪯ χI.

    The lower end jumps to the exponent that the Θ of every solve has; q counts as infeasible where that falls short of q.
    """
    start = [np.eye(len(programs.matrices[0]))] * programs.count
    best = Proposal(start, exponent_of(programs.kind, programs.matrices, start, programs.intervals))
    width = tolerance * max(limit - best.exponent, 0.0)
    upper = limit
    while upper - best.exponent > max(width, 1e-12 * max(1.0, abs(limit))) and programs.solves < MOST_SOLVES:
        if condition <= 1:
            break
        q = (best.exponent + upper) / 2
        metrics = programs.roundest(q) if condition > BADLY_SCALED else None
        if metrics is None or spread(metrics) > condition:
            metrics = programs.slackest(q, condition)
        if metrics is None:
            upper = q
            continue
        found = exponent_of(programs.kind, programs.matrices, metrics, programs.intervals)
        if found > best.exponent:
            best = Proposal(metrics, found)
        if found < q - width / 8:  # not merely the solver's tolerance
            upper = q
    return best


def least_gain(
    programs: Programs, limit: float, condition: float, tolerance: float = GAIN_TOLERANCE
) -> Proposal | None:
    """The smallest √χ*(x)/x over the speeds 0 < x ≤ ``limit``, within ``tolerance``; None where no Θ contracts.

    χ*(x), the smallest condition at speed x, does not decrease, so on [a, b] the gain is at least √χ*(a)/b: branch and
    bound, the interval of the least bound first, needs no unimodality. **Derived.** (The bound rests on the solver's χ*.)
    """
    kind, eye = programs.kind, [np.eye(len(programs.matrices[0]))] * programs.count
    best, least = None, math.inf

    def offer(metrics: list[np.ndarray]) -> None:
        nonlocal best, least
        try:
            q = exponent_of(kind, programs.matrices, metrics, programs.intervals)
        except np.linalg.LinAlgError:
            return
        x, chi = speed(kind, q), spread(metrics)
        if x > 0 and chi <= condition * (1 + 1e-9) and math.sqrt(chi) / x < least:
            best, least = Proposal(metrics, q), math.sqrt(chi) / x

    def smallest_condition(x: float) -> float:
        metrics = programs.roundest(exponent_at(kind, x))
        if metrics is None:
            return math.inf
        offer(metrics)
        chi = spread(metrics)
        return chi if chi <= condition * (1 + 1e-6) else math.inf

    offer(eye)
    intervals = [(0.0, speed(kind, limit), 1.0)]  # from, to, χ* at from
    while intervals and programs.solves < MOST_SOLVES:
        bounds = [math.sqrt(chi) / b for _, b, chi in intervals]
        i = int(np.argmin(bounds))
        if bounds[i] * (1 + tolerance) >= least:
            break
        a, b, chi = intervals.pop(i)
        if b - a <= 1e-6 * b:
            continue
        middle = (a + b) / 2
        found = smallest_condition(middle)
        intervals.append((a, middle, chi))
        if found < math.inf:
            intervals.append((middle, b, max(chi, found)))
    return best


def spread(metrics: list[np.ndarray]) -> float:
    """χ of metrics taken together: their largest eigenvalue over their smallest; inf where that is not positive.

    >>> spread([np.diag([2.0, 6.0]), np.diag([4.0, 8.0])]), spread([np.diag([0.0, 1.0])])
    (4.0, inf)
    """
    values = np.concatenate([np.linalg.eigvalsh(Theta)[[0, -1]] for Theta in metrics])
    return float(values.max() / values.min()) if values.min() > 0 else math.inf
