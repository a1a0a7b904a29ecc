"""``contraction_metric``: a metric in which sampled closed-loop matrices contract, by semidefinite programming, then checked.

Θ with I ⪯ Θ ⪯ χI and A_tᵀΘ + ΘA_t ⪯ −2λΘ for all t (discrete A_tᵀΘA_t ⪯ ρ²Θ) gives ‖e(t)‖ ≤ √χ e^{−λt}‖e(0)‖ and the
disturbance gain √χ/λ. For a symmetric H, Θ = I is already optimal; the search matters where A_t is not symmetric: momentum,
the cross-entropy H∇²ℓ, chains of modules. Lohmiller & Slotine (Automatica 34, 1998); condition and gain as in Tsukamoto &
Chung, arXiv 2006.04361.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from stability.contraction.check import Checked, check_metric
from stability.contraction.projection import best_sequence, extended, leaks, slow_basis
from stability.contraction.result import ContractionMetric, Projection, gain_of
from stability.contraction.sdp import Programs
from stability.contraction.search import (
    LARGEST_CONDITION,
    Proposal,
    exponent_limit,
    fastest,
    least_gain,
    speed,
)

KINDS = ("continuous", "discrete")
OBJECTIVES = ("rate", "gain")


def contraction_metric(
    matrices,
    *,
    kind: str = "continuous",
    time_varying: bool = False,
    condition: float | None = None,
    objective: str = "rate",
    max_states: int = 40,
    interval: float | Sequence[float] | None = None,
    tolerance: float = 1e-4,
) -> ContractionMetric:
    """Search Θ for the sampled ``matrices``, then certify it (``stability.contraction.check``).

    Parameters
    ----------
    matrices: A_t, a sequence of [D, D] or a tensor [T, D, D]: ė = A_t e ("continuous") or e_{t+1} = A_t e_t ("discrete").
    time_varying: T + 1 metrics, A_tᵀΘ_{t+1}A_t ⪯ ρ²Θ_t; in continuous time Θ linear between samples ``interval`` apart, over
        each of which A_t is constant: Θ̇ + A_tᵀΘ + ΘA_t ⪯ −2λΘ. Over finitely many samples any rate can be had for a large χ:
        objective "rate" needs a ``condition``.
    condition: the largest χ allowed; None is 1e6, beyond which float64 tells little.
    objective: "rate", the largest λ (smallest ρ) at that χ, by bisection; "gain", the smallest √χ/λ (√χ/(1 − ρ)) over all
        rates, by branch and bound to 1 %. The largest rate can have an arbitrarily bad gain.
    max_states: where D is larger, the programs see that many slow directions (``ContractionMetric.projected``); a discrete
        time-varying metric is then taken from Lyapunov's recursion on all states, with no program. A program
        takes about 0.03 s at 10 states, 0.4 s at 20, 7 s at 40, and a search 10 to 40 programs.
    tolerance: of the bisection, as a share of the range between Θ = I and the spectral limit.

    What cannot be contracted gives a result with ``feasible=False`` and a ``reason``; so does a failing solver. Raises
    ValueError/TypeError for matrices that are not square, finite and of one shape, and for options that are not known.

    >>> A = torch.tensor([[0.0, 1.0], [-1.0, -0.5]], dtype=torch.float64)
    >>> contraction_metric([A], condition=1).feasible  # A + Aᵀ is singular
    False
    >>> round(contraction_metric([A], condition=1.5).rate, 3), round(contraction_metric([A], condition=2.0).rate, 3)
    (0.199, 0.25)
    """
    arrays = _arrays(matrices)
    chi_max = _options(kind, time_varying, condition, objective, max_states, tolerance)
    intervals = _intervals(interval, len(arrays), kind, time_varying)
    size = len(arrays[0])
    if time_varying and kind == "continuous" and size > max_states:
        raise ValueError(
            f"time-varying metrics in continuous time are searched up to max_states = {max_states} states, got {size}"
        )
    like = matrices if isinstance(matrices, Tensor) else matrices[0]
    device = like.device if isinstance(like, Tensor) else torch.device("cpu")
    if time_varying and size > max_states:
        return _long(arrays, chi_max, objective, device)
    limit, worst = exponent_limit(kind, arrays, condition=chi_max, intervals=intervals, time_varying=time_varying)
    programs = Programs(kind, arrays, time_varying, intervals)
    if not time_varying and speed(kind, limit) <= 0:
        what = "spectral abscissa" if kind == "continuous" else "spectral radius"
        value = -limit / 2 if kind == "continuous" else math.sqrt(-limit)
        unstable = f"sample {worst} has {what} {value:.6g}: no constant metric contracts it"
        return _infeasible(kind, unstable, check_metric(kind, arrays, [np.eye(size)]), programs, None)
    if size > max_states:
        return _large(arrays, kind, chi_max, objective, max_states, tolerance, device)
    proposal = _search(programs, limit, chi_max, objective, tolerance)
    checked = None if proposal is None else check_metric(kind, arrays, proposal.metrics, intervals)
    if checked is None or not _contracts(kind, checked.rate):
        return _infeasible(kind, _why(kind, checked, limit, chi_max, programs, len(arrays)), checked, programs, None)
    return _feasible(kind, checked, programs.solves, None, time_varying, len(arrays), device)


def certified_metric(matrices, metric, *, kind: str = "continuous") -> ContractionMetric:
    """The certificate of a given constant Θ [D, D], whoever proposed it; ``feasible`` is False where it does not contract.

    Θ is scaled to Θ ⪰ I. Raises as :func:`contraction_metric`, and ValueError for a Θ of another size or not finite.

    >>> A = torch.tensor([[0.0, 1.0], [-1.0, -0.5]], dtype=torch.float64)
    >>> certified_metric([A], torch.tensor([[1.0, 0.25], [0.25, 1.0]])).rate
    0.250000000000
    """
    arrays = _arrays(matrices)
    _options(kind, False, None, "rate", 2, 0.5)
    Theta = _arrays([metric])[0]
    if Theta.shape != arrays[0].shape:
        raise ValueError(f"metric has shape {Theta.shape}, the matrices {arrays[0].shape}")
    checked = check_metric(kind, arrays, [Theta])
    device = metric.device if isinstance(metric, Tensor) else torch.device("cpu")
    if checked is not None and _contracts(kind, checked.rate):
        return _feasible(kind, checked, 0, None, False, len(arrays), device)
    why = "the given Θ could not be certified positive definite"
    if checked is not None:
        why = f"the given Θ does not contract all {len(arrays)} samples: its rate is {checked.rate:.6g}"
    return _infeasible(kind, why, checked, Programs(kind, arrays), None)


def _search(programs: Programs, limit: float, chi_max: float, objective: str, tolerance: float) -> Proposal | None:
    if objective == "gain":
        return least_gain(programs, limit, chi_max)
    return fastest(programs, limit, chi_max, tolerance)


def _large(
    arrays, kind: str, chi_max: float, objective: str, max_states: int, tolerance: float, device
) -> ContractionMetric:
    V = slow_basis(kind, np.mean(arrays, 0), max_states)
    small = [V.T @ A @ V for A in arrays]
    programs, inner = Programs(kind, small), None
    limit, _ = exponent_limit(kind, small)
    if speed(kind, limit) > 0:
        proposal = _search(programs, limit, chi_max, objective, tolerance)
        inner = None if proposal is None else check_metric(kind, small, proposal.metrics)
    Theta = inner.metrics[0] if inner is not None and _contracts(kind, inner.rate) else None
    candidate = extended(kind, arrays, V, Theta, objective=objective, condition=chi_max)
    checked = None if candidate is None else check_metric(kind, arrays, [candidate])
    whole = checked is not None and _contracts(kind, checked.rate)
    rate, chi = (inner.rate, inner.condition) if inner is not None else (math.nan, math.nan)
    basis = torch.from_numpy(V).to(device)
    projected = Projection(V.shape[1], len(V), basis, *leaks(arrays, V), rate, chi, whole)
    if whole:
        return _feasible(kind, checked, programs.solves, projected, False, len(arrays), device)
    what = "contracts there" if Theta is not None else "does not contract even there"
    why = (
        f"{len(V)} states are more than max_states = {max_states}: the programs saw the {V.shape[1]} slowest directions "
        f"({what}, rate {rate:.6g}), and no extension to all states contracts all {len(arrays)} samples at χ ≤ {chi_max:g}"
    )
    eye = check_metric(kind, arrays, [np.eye(len(V))])
    return _infeasible(kind, why, eye, programs, projected)


def _long(arrays, chi_max: float, objective: str, device) -> ContractionMetric:
    """Time-varying and large: Lyapunov's recursion on all states, no program."""
    metrics = best_sequence(arrays, objective=objective, condition=chi_max)
    checked = None if metrics is None else check_metric("discrete", arrays, metrics)
    programs = Programs("discrete", arrays, True)
    if checked is None or not _contracts("discrete", checked.rate):
        why = (
            f"no sequence Θ_t = I + A_tᵀΘ_{{t+1}}A_t/ρ² with ρ < 1 has χ ≤ {chi_max:g} (no program was solved for "
            f"{len(arrays[0])} states)"
        )
        return _infeasible("discrete", why, checked, programs, None)
    found = _feasible("discrete", checked, 0, None, True, len(arrays), device)
    return replace(found, assumptions=f"{found.assumptions}; Θ_t by Lyapunov's recursion, not optimised by a program")


def _contracts(kind: str, rate: float) -> bool:
    return rate > 0 if kind == "continuous" else rate < 1


def _why(kind: str, checked: Checked | None, limit: float, chi_max: float, programs: Programs, samples: int) -> str:
    if checked is None:
        return programs.failure or f"no Θ with χ ≤ {chi_max:g} passed the check in float64"
    symbol, alone = ("λ", limit / 2) if kind == "continuous" else ("ρ", math.sqrt(max(-limit, 0.0)))
    common = "" if samples == 1 else f"; each of the {samples} samples alone would allow {alone:.6g}"
    solver = f" ({programs.failure})" if programs.failure else ""
    return f"no Θ with χ ≤ {chi_max:g} was found that contracts: the best has {symbol} = {checked.rate:.6g}{common}{solver}"


def _feasible(
    kind, checked: Checked, solves: int, projected, time_varying: bool, samples: int, device
) -> ContractionMetric:
    stacked = torch.from_numpy(np.stack(checked.metrics)).to(device)
    return ContractionMetric(
        True, "", kind, checked.rate, stacked if time_varying else stacked[0], checked.condition,
        gain_of(kind, checked.rate, checked.condition), checked.margin, projected,
        _assumptions(kind, time_varying, samples), solves,
    )  # fmt: skip


def _infeasible(kind: str, reason: str, checked: Checked | None, programs: Programs, projected) -> ContractionMetric:
    rate = math.nan if checked is None else checked.rate
    return ContractionMetric(
        False,
        reason,
        kind,
        rate,
        None,
        math.nan,
        math.inf,
        math.nan,
        projected,
        "none: nothing is claimed",
        programs.solves,
    )


def _assumptions(kind: str, time_varying: bool, samples: int) -> str:
    between = (
        "ė = A_t e with A_t constant between samples and Θ linear"
        if time_varying and kind == "continuous"
        else "e_{t+1} = A_t e_t"
        if time_varying
        else "every A(t) in their convex hull"
    )
    return (
        f"certified in float64 for the {samples} stored matrices, hence for {between}; matrices off the sampled run, and "
        "whatever the linear model leaves out (it enters as the disturbance w), are not covered"
    )


def _arrays(matrices) -> list[np.ndarray]:
    if isinstance(matrices, str) or not isinstance(matrices, Sequence | Tensor | np.ndarray):
        raise TypeError(f"matrices must be a sequence of [D, D] or a tensor [T, D, D], got {type(matrices).__name__}")
    arrays = []
    for t, A in enumerate(matrices):
        array = A.detach().cpu().double().numpy() if isinstance(A, Tensor) else np.asarray(A, dtype=np.float64)
        shape = arrays[0].shape if arrays else array.shape
        if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape != shape or not array.size:
            raise ValueError(f"matrices[{t}] has shape {array.shape}, expected square matrices [D, D] of one size")
        if not np.isfinite(array).all():
            raise ValueError(f"matrices[{t}] holds NaN or inf")
        arrays.append(array)
    if not arrays:
        raise ValueError("matrices is empty: a metric needs at least one sample A_t")
    return arrays


def _options(kind, time_varying, condition, objective, max_states, tolerance) -> float:
    if kind not in KINDS:
        raise ValueError(unknown_name("kind", kind, KINDS))
    if objective not in OBJECTIVES:
        raise ValueError(unknown_name("objective", objective, OBJECTIVES))
    if condition is not None and not 1 <= condition < math.inf:
        raise ValueError(f"condition must be a finite number >= 1 (I ⪯ Θ ⪯ χI), or None, got {condition!r}")
    if time_varying and condition is None and objective == "rate":
        raise ValueError(
            "a time-varying metric reaches any rate over finitely many samples: give condition, or objective='gain'"
        )
    if isinstance(max_states, bool) or not isinstance(max_states, int) or max_states < 2:
        raise ValueError(f"max_states must be an int >= 2, got {max_states!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    return LARGEST_CONDITION if condition is None else float(condition)


def _intervals(interval, samples: int, kind: str, time_varying: bool) -> list[float] | None:
    if not (time_varying and kind == "continuous"):
        if interval is not None:
            raise ValueError("interval is for time-varying metrics in continuous time only")
        return None
    if interval is None:
        raise ValueError("a time-varying metric in continuous time needs interval, the time between samples")
    values = [float(interval)] * samples if isinstance(interval, int | float) else [float(h) for h in interval]
    if len(values) != samples or not all(0 < h < math.inf for h in values):
        raise ValueError(f"interval must be positive, one number or one per sample ({samples}), got {interval!r}")
    return values
