"""Metrics of composed systems from the metrics of their parts: in parallel, in cascade, in feedback (small gain).

Parts i = 1, 2 with I ⪯ Θ_i ⪯ χ_iI and rate λ_i (ρ_i) in Θ_i; couplings in the metrics' norms, g₁₂ = ‖Θ₁^½B₁₂Θ₂^{−½}‖₂. In
x = (Θ₁^½e₁, εΘ₂^½e₂) the composed system is bounded by a 2 × 2 matrix of the rates and couplings alone. **Derived**, after
Slotine (*Modular stability tools for distributed computation and control*, Int. J. Adapt. Control Signal Process. 17, 2003).
No A_t is needed, which is the point; with the A_t at hand ``stability.contraction.check`` can confirm the result.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from stability.contraction.result import ContractionMetric, gain_of

ROUNDING = 1e-12  # relative enlargement of a coupling per state and unit of √χ: far above the rounding of its norm
BACK_OFF = 1e-12  # of the composed rate, for the rounding of the formulas


def coupling_gain(to: ContractionMetric, of: ContractionMetric, coupling) -> float:
    """max_t ‖Θ_to^½ B_t Θ_of^{−½}‖₂, rounded up; ``coupling`` B [D_to, D_of], or [T, D_to, D_of] for samples of it."""
    T1, T2 = (m.metric.double().cpu() for m in (to, of))
    B = torch.as_tensor(np.asarray(coupling.detach().cpu() if isinstance(coupling, Tensor) else coupling)).double()
    B = B[None] if B.dim() == 2 else B
    if B.dim() != 3 or B.shape[1:] != (len(T1), len(T2)) or not bool(torch.isfinite(B).all()):
        raise ValueError(
            f"the coupling must be finite, [{len(T1)}, {len(T2)}] or samples of that, got shape {tuple(B.shape)}"
        )
    L1, L2 = torch.linalg.cholesky(T1), torch.linalg.cholesky(T2)  # ‖L₁ᵀBL₂⁻ᵀ‖ = ‖Θ₁^½BΘ₂^{−½}‖
    white = torch.linalg.solve_triangular(L2, (L1.mT @ B).mT, upper=False)
    size = (len(T1) + len(T2)) * math.sqrt(of.condition * to.condition)
    return torch.linalg.matrix_norm(white, 2).max().item() * (1 + ROUNDING * size)


def parallel(first: ContractionMetric, second: ContractionMetric) -> ContractionMetric:
    """diag(A₁, A₂): Θ = diag(Θ₁, Θ₂), rate min λ_i (max ρ_i), χ = max χ_i.

    >>> from stability.contraction.metric import contraction_metric
    >>> found = parallel(contraction_metric([-torch.eye(1)]), contraction_metric([-2 * torch.eye(2)]))
    >>> round(found.rate, 6), found.condition, found.metric.shape
    (1.0, 1.0, torch.Size([3, 3]))
    """
    if failed := _unfit(first, second):
        return failed
    slower = min if first.kind == "continuous" else max
    return _composed(first, second, slower(first.rate, second.rate), 1.0, "in parallel, nothing couples them")


def cascade(
    first: ContractionMetric, second: ContractionMetric, coupling, *, rate: float | None = None
) -> ContractionMetric:
    """[[A₁, 0], [B, A₂]], B = ``coupling`` from part 1 into part 2, b its gain: Θ = diag(Θ₁, ε²Θ₂) has every ``rate``

        λ < min λ_i,  ε = 2√((λ₁ − λ)(λ₂ − λ))/b           (continuous)
        ρ > max ρ_i,  ε = √((ρ² − ρ₁²)(ρ² − ρ₂²))/(bρ)       (discrete)

    and χ = max(χ₁, ε²χ₂)/min(1, ε²); every smaller ε will do as well, and ε ≤ 1 is best for χ. Left out, the rate is that of
    the smallest gain √χ/λ. A cascade of contracting parts always contracts; a rate beyond the parts' is infeasible.
    """
    if failed := _unfit(first, second):
        return failed
    b = coupling_gain(second, first, coupling)
    kind = first.kind
    best = min(first.rate, second.rate) if kind == "continuous" else max(first.rate, second.rate)
    if b == 0:
        if rate is not None and (rate > best if kind == "continuous" else rate < best):
            return _refused(kind, f"rate {rate:.6g} is beyond that of the slower part, {best:.6g}")
        return _composed(first, second, best if rate is None else rate, 1.0, "in cascade, with coupling 0")

    def scale(x: float) -> float:
        if kind == "continuous":
            return min(1.0, 2 * math.sqrt((first.rate - x) * (second.rate - x)) / b)
        return min(1.0, math.sqrt((x**2 - first.rate**2) * (x**2 - second.rate**2)) / (b * x))

    if rate is None:
        ends = (0.0, best) if kind == "continuous" else (best, 1.0)
        inner = [ends[0] + share * (ends[1] - ends[0]) for share in (1e-6, 1 - 1e-6)]
        gain = lambda x: gain_of(kind, x, _condition(first, second, scale(x)))  # noqa: E731
        rate = float(minimize_scalar(gain, bounds=inner, method="bounded").x)
    elif not (rate < best if kind == "continuous" else best < rate < 1):
        way = "below" if kind == "continuous" else "below 1 and above"
        return _refused(
            kind, f"rate {rate:.6g} must be {way} that of the slower part, {best:.6g}, as the coupling is {b:.3g}"
        )
    return _composed(first, second, rate, scale(rate), f"in cascade, coupling at most {b:.6g} in the metrics' norms")


def feedback(first: ContractionMetric, second: ContractionMetric, into_first, into_second) -> ContractionMetric:
    """[[A₁, B₁₂], [B₂₁, A₂]], gains g₁₂, g₂₁ of ``into_first`` = B₁₂ and ``into_second`` = B₂₁: Θ = diag(Θ₁, (g₁₂/g₂₁)Θ₂) has

        λ = (λ₁ + λ₂)/2 − √(((λ₁ − λ₂)/2)² + g₁₂g₂₁),  λ > 0 iff g₁₂g₂₁ < λ₁λ₂               (continuous)
        ρ = (ρ₁ + ρ₂)/2 + √(((ρ₁ − ρ₂)/2)² + g₁₂g₂₁),  ρ < 1 iff g₁₂g₂₁ < (1 − ρ₁)(1 − ρ₂)   (discrete)

    Where the small-gain condition fails the result says so (the loop may contract all the same). A zero coupling makes
    a cascade.
    """
    if failed := _unfit(first, second):
        return failed
    g12, g21 = coupling_gain(first, second, into_first), coupling_gain(second, first, into_second)
    kind = first.kind
    if g12 == 0:
        return cascade(first, second, into_second)
    if g21 == 0:
        return _swapped(cascade(second, first, into_first), len(second.metric))
    room = first.rate * second.rate if kind == "continuous" else (1 - first.rate) * (1 - second.rate)
    root = math.hypot((first.rate - second.rate) / 2, math.sqrt(g12 * g21))
    middle = (first.rate + second.rate) / 2
    rate = middle - root if kind == "continuous" else middle + root
    backed = _backed_off(kind, rate, max(middle, root))
    if g12 * g21 >= room or (backed <= 0 if kind == "continuous" else backed >= 1):
        product = "λ₁λ₂" if kind == "continuous" else "(1 − ρ₁)(1 − ρ₂)"
        return _refused(
            kind, f"the small-gain condition fails: g₁₂g₂₁ = {g12 * g21:.6g} is not below {product} = {room:.6g}", rate
        )
    text = f"in feedback, gains at most {g12:.6g} and {g21:.6g} in the metrics' norms"
    return _composed(first, second, backed, math.sqrt(g12 / g21), text)


def _backed_off(kind: str, rate: float, size: float) -> float:
    return rate - BACK_OFF * size if kind == "continuous" else rate + BACK_OFF * size


def _condition(first: ContractionMetric, second: ContractionMetric, scale: float) -> float:
    return max(first.condition, scale**2 * second.condition) / min(1.0, scale**2)


def _composed(first, second, rate: float, scale: float, how: str) -> ContractionMetric:
    """diag(Θ₁, ε²Θ₂)/min(1, ε²)."""
    unit = min(1.0, scale**2)
    Theta = torch.block_diag(first.metric / unit, second.metric.to(first.metric) * (scale**2 / unit))
    chi = _condition(first, second, scale) * (1 + BACK_OFF)
    chi = 1.0 if first.condition == second.condition == scale == 1.0 else chi
    text = f"two contracting parts {how}; first part: {first.assumptions}; second part: {second.assumptions}"
    return ContractionMetric(
        True, "", first.kind, rate, Theta, chi, gain_of(first.kind, rate, chi), math.nan, None, text
    )


def _swapped(found: ContractionMetric, size: int) -> ContractionMetric:
    """The result for parts in the other order: the first ``size`` states come last."""
    if found.metric is None:
        return found
    order = [*range(size, len(found.metric)), *range(size)]
    return ContractionMetric(**{**vars(found), "metric": found.metric[order][:, order]})


def _unfit(first: ContractionMetric, second: ContractionMetric) -> ContractionMetric | None:
    """A refusal where a part does not contract; ValueError where the two cannot be composed at all."""
    if first.kind != second.kind:
        raise ValueError(f"one part is {first.kind}, the other {second.kind}; compose parts of one kind")
    parts: Sequence[tuple[str, ContractionMetric]] = (("first", first), ("second", second))
    for name, part in parts:
        if not part.feasible:
            return _refused(part.kind, f"the {name} part has no contraction metric: {part.reason}")
        if part.time_varying:
            raise ValueError(f"the {name} part's metric varies in time; composition is for constant metrics")
    return None


def _refused(kind: str, reason: str, rate: float = math.nan) -> ContractionMetric:
    return ContractionMetric(
        False, reason, kind, rate, None, math.nan, math.inf, math.nan, None, "none: nothing is claimed"
    )
