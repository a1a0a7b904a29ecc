"""``train_twins``: one run on S, its twins on S^(k→z'), and everything that can be said of how far they drift apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nt_kernel.mass import Mass, smallest_mass
from nt_kernel.metric.output_metric import OutputMetric
from optim.flow import gradient_flow
from optim.steps.step_limit import check_lr
from stability.assumptions.catalogue import NULL_SHARE
from stability.assumptions.structure import why_singular
from stability.assumptions.verdicts import judge
from stability.bounds import bound_ladder
from stability.loss_step import auto_step
from stability.losses import Loss, PerSample, resolve_loss
from stability.monitor import QUANTILES, Monitor
from stability.replacement import Replacement, data_for
from stability.system import TwinSystem

_SUP = (
    "kappa", "L", "h", "column", "disturbance", "drift", "T3", "T4", "T5", "T5_l2", "T5_others", "path_l2", "path_sup",
)  # fmt: skip
_MEASURED = ("measured_sup", "measured_l2", "measured_replaced", "measured_others", "measured_heldout")
_SERIES = (
    *_MEASURED, "T3", "T4", "T5", "T5_l2", "T5_others", "path_l2", "path_sup", "disturbance", "drift", "twin_train_loss",
    "T3H", "T3H_drift", "rate_H", "measured_H",
)  # fmt: skip


@dataclass(frozen=True)
class TwinResult:
    """What one twin study found. R pairs, T steps.

    ``pairs``: one dict per replacement: constants, bounds, enclosures, measured suprema, flags. ``trajectories``
    {name: [R, T + 1]}; ``run`` {name: [T + 1]} of the S run; ``spectrum`` [T + 1, Q], the ``spectrum_quantiles`` of the
    eigenvalues of H; ``assumptions``: one dict per verdict; ``times`` [T + 1].
    """

    pairs: list[dict]
    trajectories: dict[str, np.ndarray]
    run: dict[str, np.ndarray]
    spectrum: np.ndarray
    assumptions: list[dict]
    times: np.ndarray
    spectrum_quantiles: tuple[float, ...] = QUANTILES


def train_twins(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    replacements: Sequence[Replacement],
    *,
    held_out: Tensor | None = None,
    steps: int = 200,
    lr: float | str = 0.1,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
    dynamics: str = "euler",
    null_twin: bool = True,
    observer: Callable | None = None,
) -> TwinResult:
    """Train on S and on every S^(k→z') from one shared initialisation; measure and bound the divergence.

    Full-batch Riemannian descent θ ← θ − lr·G⁻¹∇h on h = (1/n)Σ ℓ(y_i, a_i), each run with its own metric built on
    its own data. Divergence e = y' − y is read on the inputs of S (and on ``held_out``), in units of the outputs.
    Theory: Pehle & Slotine, arXiv 2603.03610, theorem 3, and the ladder of ``stability.bounds`` and
    ``stability.enclosures``.

    Parameters
    ----------
    model: its parameters are the shared initialisation; it is not changed. In eval mode if it has dropout or BatchNorm.
    x [n, d, …], targets [n, p], replacements, held_out [Q, d, …]: in the model's dtype and device.
    lr: step size, or "auto" (half the limit that N blocks and the curvature of the loss guarantee; scale "mean"). With
        ``dynamics="flow"`` the ODE θ̇ = −G⁻¹∇h is integrated instead and read every lr units of time.
    mass, output_metric, scale, blocks: the metric (``nt_kernel.generalized_ntk``); scale "none" is gradient descent.
    loss: "squared" (½‖y − a‖², the loss of the theorem), "mse" (σ = 2/p), "cross_entropy" (targets [n, p] or class indices
        [n]), "logistic", "huber", or a convex function (:func:`stability.resolve_loss`). Where ∇²ℓ is not σI, T0 to T3 are
        NaN, "T2H", "T3H", "T3H_drift" stand in their place (``stability.loss_ladder``), and "not_applicable" says why.
    null_twin: also train S from θ₀ moved by one ulp, to see what rounding does.
    observer: called as ``observer(system, snapshot, eigenvalues of H)`` at every instant, in order; it only looks.

    Raises ValueError/TypeError for bad input, ``StepTooLargeError`` (a ValueError) naming 2/λ_max for a step that S or a
    twin does not bear, ``NumericalError`` where the arithmetic fails.

    >>> model = nn.Linear(2, 1).double()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> twin = Replacement(0, torch.tensor([1.0, 1.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    >>> result = train_twins(model, x, torch.ones(2, 1, dtype=torch.float64), [twin], steps=20)
    >>> pair = result.pairs[0]
    >>> pair["T0"] >= pair["T1"] >= pair["T1c"] >= pair["T2"] >= pair["T3"], pair["T4"] >= pair["measured_l2"]
    (True, True)
    """
    _check_options(steps, lr, dynamics, model, x)
    loss = resolve_loss(loss)
    targets, replacements = data_for(loss, model, x, targets, replacements, held_out)
    system = TwinSystem(
        model, x, targets, replacements, loss=loss, held_out=held_out, mass=mass, output_metric=output_metric, scale=scale,
        blocks=blocks, null_twin=null_twin,
    )  # fmt: skip
    step = auto_step(loss, system.metric, system.block_count, scale, targets) if lr == "auto" else float(lr)
    gap = system.metric_gap()
    monitor = Monitor(system, step, observer)
    with torch.no_grad():
        _run(system, monitor, steps, step, dynamics)
    return _result(model, system, monitor, x, replacements, step, gap, dynamics)


def _run(system: TwinSystem, monitor: Monitor, steps: int, lr: float, dynamics: str) -> None:
    if dynamics == "flow":
        for params in gradient_flow(system.velocity, system.params, [lr * t for t in range(steps + 1)]):
            system.params = params
            monitor.record(system.snapshot(None))
        return
    for t in range(steps + 1):
        snapshot = system.snapshot(lr, f"step {t}: ")
        monitor.record(snapshot)
        if t < steps:
            system.advance(snapshot.velocity, lr)


def _result(
    model, system: TwinSystem, monitor: Monitor, x, replacements, lr: float, gap: Tensor, dynamics: str
) -> TwinResult:
    recorded = monitor.pairs if monitor.ladder is None else monitor.pairs | monitor.ladder.series
    series = {name: torch.stack(values, -1).cpu().double().numpy() for name, values in recorded.items()}
    run = {name: np.array(values) for name, values in monitor.run.items()}
    structural = why_singular(model, x, system.p)
    if structural:  # λ_min = 0 exactly, whatever was computed
        run["xi"][:] = 0.0
    xi = float(run["xi"].min())
    lambda_max = float(run["lambda_max"].max())
    rate = float(run["lambda_max_twin"].max())
    null = float(run["null_sup"].max()) if "null_sup" in run else math.nan
    shared = {
        "parameters": system.parameters, "outputs": system.p, "lr": lr,
        "steps": len(run["xi"]) - 1, "xi": xi, "mu": smallest_mass(system.mass), "lambda_max": lambda_max,
        "lambda_max_twin": rate, "null_sup": null, "train_loss": float(run["train_loss"][-1]),
    }  # fmt: skip
    rungs = [] if monitor.ladder is None else monitor.ladder.rungs(system.loss.name)
    pairs = []
    for j, z in enumerate(replacements):
        row = {"replaced": z.index, **shared, "metric_gap": float(gap[j])}
        row |= {name: float(series[name][j].max()) for name in (*_SUP, *_MEASURED) if name in series}
        row |= bound_ladder(row, system.n, system.sigma) if monitor.ladder is None else rungs[j]
        row["drift_share"] = row["drift"] / row["disturbance"] if row["disturbance"] > 0 else 0.0
        for name in ("sup", "replaced", "others", "heldout"):
            if f"measured_{name}" in series:
                row[f"final_{name}"] = float(series[f"measured_{name}"][j, -1])
        row["twin_train_loss"] = float(series["twin_train_loss"][j, -1])
        row["flags"] = "; ".join(_flags(xi, structural, system, z, x, row))
        pairs.append(row)
    verdicts = judge(
        model,
        {**shared, "flow_defect": float(run["flow_defect"].max())},
        pairs,
        dynamics=dynamics,
        structural=structural,
        loss=system.loss,
    )
    return TwinResult(
        pairs,
        {name: series[name] for name in _SERIES if name in series},
        run,
        torch.stack(monitor.spectrum).double().numpy(),
        [verdict.to_dict() for verdict in verdicts],
        lr * np.arange(len(run["xi"])),
    )


def _flags(xi: float, structural: str, system: TwinSystem, z: Replacement, x: Tensor, row: dict) -> list[str]:
    flags = []
    if xi == 0:
        flags.append(f"xi = 0: {structural or 'λ_min(H) cannot be told from rounding'}")
    if torch.equal(z.x, x[z.index]) and torch.equal(z.target, system.S_targets[z.index]):
        flags.append("the replacement equals the original")
    if row["null_sup"] > NULL_SHARE * row["measured_sup"] > 0:
        flags.append(f"rounding alone (null twin) makes more than {100 * NULL_SHARE:g} % of the divergence")
    return flags


def _check_options(steps, lr, dynamics: str, model: nn.Module, x: Tensor) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    check_lr(lr)
    if dynamics not in ("euler", "flow"):
        raise ValueError(f"dynamics must be 'euler' or 'flow', got {dynamics!r}")
    if dynamics == "flow" and isinstance(x, Tensor) and x.dtype != torch.float64:
        raise TypeError(f"dynamics='flow' integrates to 1e-9 and needs float64, x is {x.dtype}")
    parameter = next(iter(model.parameters()), None)
    if parameter is not None and isinstance(x, Tensor) and (parameter.dtype, parameter.device) != (x.dtype, x.device):
        raise TypeError(
            f"the model is {parameter.dtype} on {parameter.device}, x is {x.dtype} on {x.device}; move one to the other"
        )
