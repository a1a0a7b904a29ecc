"""Verdicts on the numbers of a twin study, *holds*, *violated* or *undecided*, assumption by assumption.

The points are those the proof of Pehle & Slotine (arXiv 2603.03610, P4–P14) uses without stating: ξ > 0; no kernel drift
between the twins; one metric for both; the continuous flow; squared loss; C¹ activations. The last row asks whether the
arithmetic can resolve the divergence at all. Pure functions: numbers in, :class:`Assumption` out.
"""

import math
from collections.abc import Mapping

from torch import nn

from stability.assumptions.activations import smooth_activations
from stability.assumptions.catalogue import CATALOGUE, FLOW_DEFECT, NEGLIGIBLE, NULL_SHARE, ROUNDING_SHARE, SYSTEMS
from stability.assumptions.verdict import Assumption
from stability.losses import Loss, resolve_loss


def verdict_on(
    key: str, value: float, threshold: float, verdict: str, reason: str, *, margin: float | None = None, **place
) -> Assumption:
    """The verdict on an assumption of the catalogue; ``place``: replaced, layer, sample, step.

    Without ``margin`` it is the distance to the threshold, positive on the good side.
    """
    spec = CATALOGUE[key] if key in CATALOGUE else SYSTEMS[key]
    if margin is None:
        margin = threshold - value if spec.below else value - threshold
    return Assumption(
        spec.name, spec.quantity, float(value), float(threshold), float(margin), verdict, reason, spec.equation, **place
    )


def undecided(key: str, threshold: float, reason: str, **place) -> Assumption:
    """An assumption about which nothing was measured, and why."""
    return verdict_on(key, math.nan, threshold, "undecided", reason, **place)


def positive_rate(xi: float, structural: str, least: float = 0.0, **place) -> Assumption:
    """ξ > ``least``. ``structural`` says why λ_min must be 0 (rank, equal rows), "" if nothing forces it.

    >>> positive_rate(0.0, "").verdict, positive_rate(0.0, "rows 0 and 2 are equal").verdict
    ('undecided', 'violated')
    >>> positive_rate(0.1, "", least=0.2).reason
    'below the least rate that was asked for'
    """
    if structural:
        verdict, reason = "violated", structural
    elif xi > least:
        verdict, reason = "holds", "λ_min(H) stays above its rounding radius"
    elif xi > 0:
        verdict, reason = "violated", "below the least rate that was asked for"
    else:
        verdict = "undecided"
        reason = "no reason known that forces λ_min(H) = 0, but it cannot be told from 0 in this arithmetic"
    return verdict_on("positive_rate", xi, least, verdict, reason, **place)


def no_kernel_drift(drift: float, disturbance: float, replaced: int, limit: float = NEGLIGIBLE, **place) -> Assumption:
    """(H'_S − H)r' is absent: its share of sup‖d‖; only models linear in θ have none."""
    share = _share(drift, disturbance)
    verdict = "holds" if share <= limit else "violated"
    reason = "the proof drops (H'_S − H)r'" if share > NEGLIGIBLE else "the kernels of both twins agree on S"
    return verdict_on("no_kernel_drift", share, limit, verdict, reason, replaced=replaced, **place)


def one_metric(gap: float, replaced: int, limit: float = NEGLIGIBLE, **place) -> Assumption:
    """G = G': the metric is built on each twin's own data, so they differ already at θ₀."""
    verdict = "holds" if gap <= limit else "violated"
    reason = "G is built on each twin's own data" if gap > NEGLIGIBLE else "G does not depend on the data"
    return verdict_on("one_metric", gap, limit, verdict, reason, replaced=replaced, **place)


def step_limit(lr: float, rate: float, limit: float = 2.0, known: float | None = None, **place) -> Assumption:
    """lr·λ_max < 2 for every twin with its own H. ``rate`` is an upper bound on λ_max, ``known`` an attained value of it.

    λ_max is that of ΛHΛᵀ where ∇²ℓ = ΛᵀΛ: λ_max(H) for ℓ = ½‖y − a‖², σλ_max(H) for its σ-fold. A bound above a ``limit``
    that the attained value keeps decides nothing.

    >>> step_limit(1.0, 1.5).verdict, step_limit(1.0, 1.5, 1.0, 0.9).verdict, step_limit(1.0, 1.5, 1.0, 1.2).verdict
    ('holds', 'undecided', 'violated')
    """
    known = rate if known is None else known
    if lr * rate < limit:
        largest = 2 / rate if rate > 0 else math.inf  # a loss without curvature bears every step
        return verdict_on("step_limit", lr * rate, limit, "holds", f"2/λ_max is at least {largest:.4g}", **place)
    if lr * known >= limit:
        return verdict_on("step_limit", lr * known, limit, "violated", f"2/λ_max is {2 / known:.4g}", **place)
    reason = f"a bound of λ_max; that of the run on S gives {lr * known:.4g}"
    return verdict_on("step_limit", lr * rate, limit, "undecided", reason, **place)


def gradient_flow_followed(defect: float, dynamics: str) -> Assumption:
    """The run follows θ̇ = −G⁻¹∇h: what an Euler step leaves out, relative to the step, where the flow itself is not run."""
    value = 0.0 if dynamics == "flow" else defect
    verdict = "holds" if value <= NEGLIGIBLE else "undecided" if value <= FLOW_DEFECT else "violated"
    reason = "integrated to tolerance" if dynamics == "flow" else "Euler steps; T0 to T3 speak of the flow"
    quantity, equation = "sup of curvature and lr·λ_max(ΛHΛᵀ)/2 per step", CATALOGUE["gradient_flow"].equation
    name, margin = CATALOGUE["gradient_flow"].name, FLOW_DEFECT - value
    return Assumption(name, quantity, value, FLOW_DEFECT, margin, verdict, reason, equation)


def loss_of_the_theorem(loss: "Loss | str") -> Assumption:
    """ℓ = ½‖y − a‖², or (σ/2)‖y − a‖² with σξ for the rate; every other loss violates it.

    >>> loss_of_the_theorem("mse").verdict, loss_of_the_theorem("huber").verdict
    ('holds', 'violated')
    """
    loss = resolve_loss(loss)
    if loss.quadratic:
        same = loss.sigma(1) == loss.sigma(2) == 1
        reason = "the loss of this study" if same else f"{loss.name!r} is (σ/2)‖y − a‖²: σξ stands for ξ"
        return Assumption("squared loss", "ℓ = ½‖y − a‖²", 0.0, 0.0, 0.0, "holds", reason, "P6")
    reason = f"∇²ℓ of {loss.name!r} changes with y: T0 to T3 do not apply, T2H and T3H stand in their place"
    return Assumption("squared loss", "ℓ = ½‖y − a‖²", 1.0, 0.0, -1.0, "violated", reason, "P6")


def resolved_by_floats(null: float, measured: float, replaced: int, limit: float = NULL_SHARE, **place) -> Assumption:
    """The divergence stands above what rounding alone does (null twin: θ₀ moved by one ulp)."""
    share = _share(null, measured)
    if measured == 0:
        verdict, reason = "undecided", "the twins do not diverge at all"
    elif share <= limit:
        verdict, reason = "holds", "one ulp at θ₀ moves the outputs far less than the replaced sample"
    else:
        verdict, reason = "violated", "rounding alone moves the outputs by a visible share of the divergence"
    return verdict_on("resolved_by_floats", share, limit, verdict, reason, replaced=replaced, **place)


def float_sufficiency(share: float, limit: float = ROUNDING_SHARE, **place) -> Assumption:
    """The rounding radius of H's eigenvalues is a small share of λ_min; ``share`` is inf where λ_min is not positive.

    >>> float_sufficiency(0.01).verdict, float_sufficiency(3.0).verdict
    ('holds', 'violated')
    """
    if share <= limit:
        verdict, reason = "holds", "λ_min(H) is known to that relative accuracy"
    else:
        verdict, reason = "violated", "the rounding of this dtype is too large a part of λ_min(H)"
    return verdict_on("float_sufficiency", share, limit, verdict, reason, **place)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else float("inf"))


def judge(
    model: nn.Module,
    run: Mapping[str, float],
    pairs: list[Mapping[str, float]],
    *,
    dynamics: str,
    structural: str,
    loss: "Loss | str" = "squared",
) -> list[Assumption]:
    """All verdicts of one twin study.

    ``run``: lr, xi, lambda_max_twin, flow_defect, null_sup (NaN where no null twin was trained); ``pairs``, one per twin:
    replaced, drift, disturbance, metric_gap, measured_sup.
    """
    found = [
        positive_rate(run["xi"], structural),
        gradient_flow_followed(run["flow_defect"], dynamics),
        loss_of_the_theorem(loss),
        smooth_activations(model),
    ]
    if dynamics == "euler":
        found.insert(1, step_limit(run["lr"], run["lambda_max_twin"]))
    for pair in pairs:
        k = pair["replaced"]
        found += [no_kernel_drift(pair["drift"], pair["disturbance"], k), one_metric(pair["metric_gap"], k)]
        if run["null_sup"] == run["null_sup"]:
            found.append(resolved_by_floats(run["null_sup"], pair["measured_sup"], k))
    return found
