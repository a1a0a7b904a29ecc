"""Assertions for a user's own tests: a rung of the ladder holds, a prediction is right, a rate is fitted, a loop contracts.

Each returns what it measured, so that a test can keep it as a baseline (fixture ``assumption``), and raises an
AssertionError that says what failed and by how much. Heavy imports are inside: a test module that imports this one
loads no torch by it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from stability.assumptions.catalogue import CATALOGUE, theorem_keys

# What each rung bounds: the stacked divergence, or the largest at one sample.
RUNGS = {
    "T0": "measured_l2", "T1": "measured_l2", "T1c": "measured_l2", "T2": "measured_l2", "T3": "measured_l2",
    "T4": "measured_l2", "T5": "measured_sup", "path_l2": "measured_l2", "path_sup": "measured_sup",
}  # fmt: skip
SLACK = 1e-9  # relative, for rounding


def each_assumption(
    function=None, *, only: Iterable[str] | None = None, skip: Iterable[str] = (), argument: str = "name"
):
    """Decorator: run a test once per assumption, with its key as the argument ``name`` (or ``argument``).

        @each_assumption(skip=["gradient_flow"])
        def test_assumption(name, report, assumption):   # report: a fixture of yours, check_assumptions(...)
            assumption.require(report[name])

    Raises ValueError for unknown assumptions and those that ``check_assumptions`` does not measure (of NAIM, of movements).
    """
    import pytest

    chosen = theorem_keys(CATALOGUE if only is None else only, "only")
    left_out = theorem_keys(skip, "skip")
    mark = pytest.mark.parametrize(argument, [key for key in chosen if key not in left_out])
    return mark if function is None else mark(function)


def assert_bounded(result, rung: str = "T5", *, margin: float = 0.0) -> float:
    """sup_t measured ≤ (1 − margin)·bound for every twin of a ``TwinResult`` (or its ``pairs``).

    Where the bound is kept as a series (T3, T4, T5, path lengths) it has to hold at every step too, there without a
    margin: the enclosures begin at the divergence itself. ``rung``: "T0" … "T5", "path_l2", "path_sup". T0 to T4 and
    path_l2 bound ‖y' − y‖ on S, T5 and path_sup its largest entry sup_i|y'_i − y_i|. Returns the largest measured/bound.
    A bound that is not finite (ξ = 0) holds nothing: it fails.

    >>> pair = {"replaced": 0, "T2": 2.0, "measured_l2": 1.5}
    >>> assert_bounded([pair], "T2")
    0.75
    >>> assert_bounded([pair], "T2", margin=0.5)
    Traceback (most recent call last):
    AssertionError: T2 does not hold with a margin of 50 %: ‖y' − y‖ = 1.5 > 1 = 0.5·2 for the twin of sample 0, 50 % too large
    """
    if rung not in RUNGS:
        from nt_kernel.errors import unknown_name

        raise ValueError(unknown_name("rung", rung, RUNGS))
    if not 0 <= margin < 1:
        raise ValueError(f"margin is a share of the bound, 0 <= margin < 1; got {margin!r}")
    pairs = getattr(result, "pairs", result)
    if not pairs:
        raise ValueError("result holds no twin")
    measured, series, worst = RUNGS[rung], getattr(result, "trajectories", {}), 0.0
    symbol = "sup|y' − y|" if measured.endswith("sup") else "‖y' − y‖"
    for j, pair in enumerate(pairs):
        found, bound, where = float(pair[measured]), float(pair[rung]), f"for the twin of sample {pair['replaced']}"
        if not math.isfinite(bound):
            raise AssertionError(f"{rung} = {bound:g} bounds nothing {where}: ξ is 0, or the run is not finite")
        for step, (m, b) in enumerate(zip(series[measured][j], series[rung][j], strict=True)) if rung in series else ():
            if not m <= b + SLACK * bound:
                raise AssertionError(f"{rung} does not hold {where}: {symbol} = {m:.4g} > {b:.4g} at step {step}")
        limit = (1 - margin) * bound
        if not found <= limit * (1 + SLACK):
            by = f", {100 * (found / limit - 1):.3g} % too large" if limit > 0 else ""
            asked = f" with a margin of {100 * margin:g} %" if margin else ""
            share = f" = {1 - margin:g}·{bound:.4g}" if margin else ""
            raise AssertionError(
                f"{rung} does not hold{asked}: {symbol} = {found:.4g} > {limit:.4g}{share} {where}{by}"
            )
        worst = max(worst, found / bound if bound > 0 else 0.0)
    return worst


def assert_predicted(
    predicted, measured, *, tolerance: float | None = None, alpha: float | None = None, calibration: int | None = None,
    significance: float = 0.01,
) -> dict:  # fmt: skip
    """Predictions of the twins' divergence against trained twins, [R] each: relative error, or conformal coverage, or both.

    predicted, measured: numbers, or a ``Prediction`` and a ``TwinResult`` (their ``pairs``: sup divergence on S).
    ``tolerance``: largest |predicted − measured|/measured. ``alpha`` with ``calibration``: q is calibrated on the first m
    twins; of the t others those with measured ≤ q·predicted are counted. Under exchangeable draws without ties the count is
    beta-binomial (t, m + 1 − l, l), l = ⌊(m + 1)α⌋: it fails where so few are improbable, P < ``significance``.

    Returns error, coverage, factor (what was asked for).

    >>> assert_predicted([1.0, 2.0], [1.05, 2.0], tolerance=0.1)["error"]
    0.0476...
    >>> assert_predicted([1.0, 2.0], [1.05, 3.0], tolerance=0.1)
    Traceback (most recent call last):
    AssertionError: twin 1 was predicted at 2, measured 3: off by 33.3 %, tolerance 10 % (median error 19 %)
    """
    import numpy as np

    predicted, measured = _sup(predicted, "predicted_sup"), _sup(measured, "measured_sup")
    if predicted.shape != measured.shape or not len(measured):
        raise ValueError(f"one prediction per measured twin was expected, got {predicted.shape} and {measured.shape}")
    if tolerance is None and alpha is None:
        raise ValueError("say what is asserted: tolerance=0.1, or alpha=0.1 with calibration=9, or both")
    found = {}
    if tolerance is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.where(predicted == measured, 0.0, np.abs(predicted - measured) / np.abs(measured))
        j = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
        if not errors[j] <= tolerance:
            raise AssertionError(
                f"twin {j} was predicted at {predicted[j]:.4g}, measured {measured[j]:.4g}: off by {100 * errors[j]:.3g} %, "
                f"tolerance {100 * tolerance:g} % (median error {100 * np.median(errors):.3g} %)"
            )
        found["error"] = float(errors[j])
    if alpha is not None:
        found |= _coverage(predicted, measured, alpha, calibration, significance)
    return found


def _coverage(predicted, measured, alpha: float, calibration: int | None, significance: float) -> dict:
    from scipy.stats import betabinom

    from stability.prediction.conformal import rank_of, smallest_calibration
    from stability.prediction.coverage import coverage

    if calibration is None or not smallest_calibration(alpha) <= calibration < len(measured):
        raise ValueError(
            f"alpha = {alpha:g} needs calibration of at least {smallest_calibration(alpha)} twins and one more to test; got "
            f"calibration = {calibration!r} of {len(measured)}"
        )
    row = coverage(measured, predicted, calibration, alpha)
    above = calibration + 1 - rank_of(alpha, calibration)  # l: calibration scores and the test's own, above q
    chance = float(betabinom.cdf(row["covered"], row["tested"], calibration + 1 - above, above))
    if chance < significance:
        raise AssertionError(
            f"q = {row['factor']:.4g} from {calibration} twins covers {row['covered']} of {row['tested']}, "
            f"{100 * row['coverage']:.3g} %; {100 * (1 - alpha):g} % was promised, and so few have probability {chance:.2g} "
            "where calibration and test twins are drawn alike"
        )
    return {"coverage": row["coverage"], "factor": row["factor"]}


def assert_rate(
    n: Sequence[float], values: Sequence[float], *, between: tuple[float, float], series: Sequence | None = None,
    level: float = 0.95,
) -> tuple[float, float, float]:  # fmt: skip
    """The exponent b of values ~ nᵇ lies in ``between`` with confidence ``level``: its whole interval is inside.

    Least squares of log value on log n, one slope per series (a seed, say), whose mean has Student's interval; with one series
    the interval is that of its residuals. Returns (slope, low, high). An interval that only overlaps ``between`` fails
    too, and says that it is the data that are too few.

    >>> n = [8, 16, 32, 64]
    >>> slope, low, high = assert_rate(n, [m**-0.5 * (1 + 0.01 * (-1) ** m) for m in n], between=(-0.6, -0.4))
    >>> round(slope, 2)
    -0.5
    """
    import numpy as np
    from scipy.stats import t as student

    n, values = np.asarray(n, dtype=float), np.asarray(values, dtype=float)
    group = np.zeros(len(n)) if series is None else np.unique(np.asarray(series), return_inverse=True)[1]
    low, high = between
    if not low < high or not 0 < level < 1:
        raise ValueError(f"between must be (low, high), 0 < level < 1; got {between!r}, {level!r}")
    if n.shape != values.shape or n.ndim != 1 or len(group) != len(n):
        raise ValueError(
            f"n, values and series need one entry each per row, got {n.shape}, {values.shape}, {group.shape}"
        )
    if not ((n > 0) & (values > 0) & np.isfinite(values)).all():
        raise ValueError("an exponent needs n > 0 and finite values > 0")
    fits = [_line(np.log(n[group == g]), np.log(values[group == g])) for g in np.unique(group)]
    slopes = np.array([slope for slope, _ in fits])
    if len(fits) > 1:
        error, freedom = slopes.std(ddof=1) / math.sqrt(len(fits)), len(fits) - 1
    else:
        error, freedom = fits[0][1], int((group == 0).sum()) - 2
    slope = float(slopes.mean())
    half = float(student.ppf(0.5 + level / 2, freedom) * error)
    found = (slope, slope - half, slope + half)
    if low <= found[1] and found[2] <= high:
        return found
    said = f"exponent {slope:.3g}, {100 * level:g} % interval [{found[1]:.3g}, {found[2]:.3g}]"
    if found[2] < low or found[1] > high:
        by = low - slope if slope < low else slope - high
        raise AssertionError(f"{said}, is outside [{low:g}, {high:g}], by {by:.3g}")
    raise AssertionError(f"{said}, is not inside [{low:g}, {high:g}]: it overlaps, and more seeds or n would decide")


def _line(x, y) -> tuple[float, float]:
    """Slope and its standard error."""
    import numpy as np

    if len(np.unique(x)) < 3:
        raise ValueError(f"a fit needs three different n in every series, got {len(np.unique(x))}")
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    return slope, math.sqrt(float(rest @ rest) / (len(x) - 2) / float(centred @ centred))


def assert_contracting(
    closed_loop,
    *,
    kind: str = "discrete",
    rate: float | None = None,
    condition: float | None = None,
    lr: float | None = None,
):
    """One constant metric Θ, I ⪯ Θ ⪯ χI, in which every recorded closed-loop matrix contracts; returns its certificate.

    ``closed_loop``: matrices A_t, e⁺ = A_t e ("discrete") or ė = A_t e ("continuous"); with ``lr`` they are kernels H_t of
    the run on S, and A_t = I − lr·H_t (−H_t where continuous); or a ``TwinResult``, whose A_t = I − lr·H_t are symmetric:
    Θ = I is optimal, and the two extreme eigenvalues of every step stand for all (the certificate's matrices are 2 × 2).
    ``rate``: the largest ρ (the smallest λ) to be reached; ``condition``: the largest χ.

    >>> import torch
    >>> momentum = torch.tensor([[0.9, 0.5], [-0.1, 0.5]], dtype=torch.float64)  # ‖A‖₂ > 1, spectral radius 0.71
    >>> assert_contracting([momentum], rate=0.9).rate < 0.9
    True
    >>> assert_contracting([2 * momentum])
    Traceback (most recent call last):
    AssertionError: no metric contracts the closed loop: sample 0 has spectral radius ...
    """
    import torch

    from stability.contraction.metric import certified_metric, contraction_metric

    if hasattr(closed_loop, "spectrum"):
        edges = torch.as_tensor(closed_loop.spectrum)[:, [0, -1]].double()  # [T + 1, 2]
        step = closed_loop.pairs[0]["lr"]
        matrices = torch.diag_embed(1 - step * edges if kind == "discrete" else -edges)
        found = certified_metric(matrices, torch.eye(2, dtype=torch.float64), kind=kind)
    else:
        matrices = [torch.as_tensor(A).double() for A in closed_loop]
        if lr is not None:
            eye = torch.eye(len(matrices[0]), dtype=torch.float64)
            matrices = [eye - lr * H if kind == "discrete" else -H for H in matrices]
        found = contraction_metric(matrices, kind=kind, condition=condition)
    if not found.feasible:
        raise AssertionError(f"no metric contracts the closed loop: {found.reason}")
    short = rate is not None and (found.rate > rate if kind == "discrete" else found.rate < rate)
    if short:
        symbol = "ρ" if kind == "discrete" else "λ"
        raise AssertionError(
            f"the closed loop contracts at {symbol} = {found.rate:.6g} (χ = {found.condition:.4g}), {symbol} = {rate:g} was "
            f"asked for: off by {abs(found.rate - rate):.3g}"
        )
    return found


def _sup(values, name: str):
    import numpy as np

    pairs = getattr(values, "pairs", values)
    if isinstance(pairs, Sequence) and pairs and isinstance(pairs[0], Mapping):
        pairs = [pair[name] for pair in pairs]
    if hasattr(pairs, "detach"):
        pairs = pairs.detach().cpu().double().numpy()
    return np.asarray(pairs, dtype=float).reshape(-1)
