"""What theorem 3 takes for granted, measured: one verdict per assumption, *holds*, *violated* or *undecided*.

The points are those the proof of Pehle & Slotine (arXiv 2603.03610, P4–P14) uses without stating: ξ > 0; no kernel drift
between the twins; one metric for both; the continuous flow; squared loss; C¹ activations. The last row asks whether the
arithmetic can resolve the divergence at all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from stability.losses import Loss, resolve_loss

_SMOOTH = (
    nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.LogSigmoid, nn.Tanhshrink, nn.Softmax, nn.LogSoftmax,
    nn.Softsign, nn.CELU,
)  # fmt: skip
_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Threshold, nn.SELU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip
_AFFINE = (nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Sequential, nn.ModuleList)

# Relative size below which a term that the proof drops counts as absent (float64 rounding along a run stays far below).
NEGLIGIBLE = 1e-6
# Largest relative defect of an Euler step that leaves the verdict open rather than violated.
FLOW_DEFECT = 1e-2
# Largest share of the measured divergence that rounding alone (the null twin) may make.
NULL_SHARE = 1e-3


@dataclass(frozen=True)
class Assumption:
    """One assumption of theorem 3: what was measured, against what, with what verdict. ``replaced`` −1: the S run."""

    assumption: str
    quantity: str
    value: float
    threshold: float
    margin: float  # signed: how far on the good side of the threshold
    verdict: str  # holds | violated | undecided
    reason: str
    equation: str
    replaced: int = -1

    def to_dict(self) -> dict:
        return asdict(self)


def positive_rate(xi: float, structural: str) -> Assumption:
    """ξ > 0. ``structural`` says why λ_min must be 0 (rank, equal rows), "" if nothing forces it.

    >>> positive_rate(0.0, "").verdict, positive_rate(0.0, "rows 0 and 2 are equal").verdict
    ('undecided', 'violated')
    """
    if structural:
        verdict, reason = "violated", structural
    elif xi > 0:
        verdict, reason = "holds", "λ_min(H) stays above its rounding radius"
    else:
        verdict, reason = (
            "undecided",
            "no reason known that forces λ_min(H) = 0, but it cannot be told from 0 in this arithmetic",
        )
    return Assumption("positive rate", "ξ = inf λ_min(H)", xi, 0.0, xi, verdict, reason, "P5, P14")


def no_kernel_drift(drift: float, disturbance: float, replaced: int) -> Assumption:
    """(H'_S − H)r' is absent: its share of sup‖d‖; only models linear in θ have none."""
    share = _share(drift, disturbance)
    verdict = "holds" if share <= NEGLIGIBLE else "violated"
    reason = "the proof drops (H'_S − H)r'" if verdict == "violated" else "the kernels of both twins agree on S"
    return Assumption(
        "no kernel drift",
        "sup‖(H'_S − H)r'‖ / sup‖d‖",
        share,
        NEGLIGIBLE,
        NEGLIGIBLE - share,
        verdict,
        reason,
        "P8",
        replaced,
    )


def one_metric(gap: float, replaced: int) -> Assumption:
    """G = G': the metric is built on each twin's own data, so they differ already at θ₀."""
    verdict = "holds" if gap <= NEGLIGIBLE else "violated"
    reason = "G is built on each twin's own data" if verdict == "violated" else "G does not depend on the data"
    return Assumption(
        "one metric",
        "max_α ‖G'^−½(G − G')G'^−½‖ at θ₀",
        gap,
        NEGLIGIBLE,
        NEGLIGIBLE - gap,
        verdict,
        reason,
        "P8",
        replaced,
    )


def step_limit(lr: float, rate: float) -> Assumption:
    """lr·λ_max < 2 for every twin with its own H; ``rate`` is a bound on λ_max, and a larger step is never made."""
    value = lr * rate
    return Assumption(
        "step below its limit", "bound on lr·λ_max(H), both twins", value, 2.0, 2.0 - value,
        "holds" if value < 2 else "violated", f"2/λ_max is at least {2 / rate:.4g}", "Euler step of P4",
    )  # fmt: skip


def gradient_flow_followed(defect: float, dynamics: str) -> Assumption:
    """The run follows θ̇ = −G⁻¹∇h: what an Euler step leaves out, relative to the step."""
    value = 0.0 if dynamics == "flow" else defect
    verdict = "holds" if value <= NEGLIGIBLE else "undecided" if value <= FLOW_DEFECT else "violated"
    reason = "integrated to tolerance" if dynamics == "flow" else "Euler steps; T0 to T3 speak of the flow"
    return Assumption(
        "gradient flow", "sup of curvature and lr·λ_max/2 per step", value, FLOW_DEFECT, FLOW_DEFECT - value, verdict,
        reason, "P4",
    )  # fmt: skip


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


def smooth_activations(model: nn.Module) -> Assumption:
    """C¹ activations: known kinks by module; undecided where a forward is the user's own code.

    >>> smooth_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).reason
    "layer '1' (ReLU) is only piecewise smooth"
    """
    verdict, reason, kinks = "holds", "all modules are C¹", 0
    for name, module in model.named_modules():
        if isinstance(module, _KINKED) or (type(module) is nn.ELU and module.alpha != 1):
            verdict, kinks = "violated", kinks + 1
            reason = f"layer {name!r} ({type(module).__name__}) is only piecewise smooth"
        elif verdict == "holds" and type(module) not in (*_SMOOTH, *_AFFINE, nn.ELU):  # a subclass may do anything
            verdict, reason = (
                "undecided",
                f"the forward of {name or 'the model'!r} ({type(module).__name__}) is not known",
            )
    return Assumption("C¹ activations", "modules with a kink", kinks, 0.0, -float(kinks), verdict, reason, "P8")


def resolved_by_floats(null: float, measured: float, replaced: int) -> Assumption:
    """The divergence stands above what rounding alone does (null twin: θ₀ moved by one ulp)."""
    share = _share(null, measured)
    if measured == 0:
        verdict, reason = "undecided", "the twins do not diverge at all"
    elif share <= NULL_SHARE:
        verdict, reason = "holds", "one ulp at θ₀ moves the outputs far less than the replaced sample"
    else:
        verdict, reason = "violated", "rounding alone moves the outputs by a visible share of the divergence"
    return Assumption(
        "resolved by floats",
        "null twin / measured sup",
        share,
        NULL_SHARE,
        NULL_SHARE - share,
        verdict,
        reason,
        "–",
        replaced,
    )


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
