"""``check_assumptions``: everything theorem 3 takes for granted, measured on one model, its data and its optimizer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nt_kernel.capture.plan import trainable_layers
from nt_kernel.errors import NumericalError, unknown_name
from nt_kernel.metric.output_metric import resolve_output_metric
from optim.steps.step_limit import StepTooLargeError, auto_lr, check_lr
from stability.assumptions.activations import smooth_activations
from stability.assumptions.alone import FLOWS, determinism, followed, run_alone, same_bits
from stability.assumptions.along import Watch, bounded
from stability.assumptions.catalogue import CATALOGUE, KEY_OF, limits_of, theorem_keys
from stability.assumptions.loss import Loss, curvature, squared_loss
from stability.assumptions.optimizer import Steps, steps_of
from stability.assumptions.own import Seen, own_verdicts
from stability.assumptions.report import AssumptionReport
from stability.assumptions.structure import full_row_rank, metric_floor, why_singular
from stability.assumptions.verdict import Assumption
from stability.assumptions.verdicts import (
    float_sufficiency,
    no_kernel_drift,
    one_metric,
    positive_rate,
    resolved_by_floats,
    step_limit,
    undecided,
)
from stability.replacement import Replacement, check_data
from stability.twins import TwinResult, train_twins


def check_assumptions(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    optimizer=None,
    *,
    replacements: Sequence[Replacement] | None = None,
    steps: int = 100,
    loss: Loss = "squared",
    limits: Mapping[str, float] | None = None,
    skip: Iterable[str] = (),
    flow: str = "halving",
) -> AssumptionReport:
    """Train on S and on its twins for ``steps`` steps, and give a verdict on every assumption (``docs/assumptions.md``).

    Parameters
    ----------
    model: its parameters are the initialisation; it is not changed. data: (x [n, d, …], targets [n, p]) in its dtype.
    optimizer: {"lr", "mass", "output_metric", "scale", "blocks"} as for :class:`optim.Woodbury` (what is missing: lr "auto",
        mass 1, identity, "mean", "layer"), a ``Woodbury``, or a ``torch.optim.SGD`` (scale "none").
    replacements: the twins, as for :func:`stability.train_twins`. Without them the last sample leaves S, and takes the
        place of sample 0 in the one twin.
    loss: "squared" (½‖y − a‖²), "cross_entropy", "logistic", "huber", or a function (y [1, p], a [1, p]) → ℓ. Twins are
        trained under multiples of the squared loss only; under another the verdicts that need a run are *undecided*.
    limits: {assumption: limit} in place of those of the catalogue, e.g. {"no_kernel_drift": 0.5}; skip: assumptions left out.
    flow: what gradient flow is compared by, "halving" (the run of half the step) or "ode" (float64, slower, the flow itself).

    Costs one ``train_twins``, and of the run on S alone two for determinism and two for the flow. Raises ValueError/TypeError
    for bad input; a step that is too large, or arithmetic that fails on the way, is a verdict and not an error.

    >>> model = nn.Linear(3, 1).double()
    >>> x, targets = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    >>> report = check_assumptions(model, (x, targets), {"lr": 0.01, "scale": "none"}, steps=20)
    >>> report.verdict, report["no_kernel_drift"].verdict, report["step_limit"].value < 0.02
    ('holds', 'holds', True)
    """
    x, targets, twins = _twins_of(data, replacements)
    bounds, skip, moves = limits_of(limits), theorem_keys(skip, "skip"), steps_of(optimizer)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    if flow not in FLOWS:
        raise ValueError(unknown_name("flow", flow, FLOWS))
    check_lr(moves.lr)
    run = _Check(deepcopy(model), x, targets, twins, moves, steps, loss, bounds, frozenset(skip), flow)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if x.is_cuda else []):  # a dropout draws
        found = run.verdicts()
    order = list(CATALOGUE)
    found = sorted(
        (v for v in found if KEY_OF[v.assumption] not in skip), key=lambda v: order.index(KEY_OF[v.assumption])
    )
    return AssumptionReport(tuple(found), run.context())


@dataclass
class _Check:
    model: nn.Module
    x: Tensor
    targets: Tensor
    twins: list[Replacement]
    moves: Steps
    steps: int
    loss: Loss
    limits: dict[str, float]
    skip: frozenset[str]
    flow: str
    lr: float = math.nan
    sigma: float = 1.0  # curvature of the loss: it steps like the squared loss at lr·σ

    def verdicts(self) -> list[Assumption]:
        model, x, limits = self.model, self.x, self.limits
        still = determinism(model, x)
        found = [still, smooth_activations(model, x)]
        if still.verdict == "violated":
            return found + self._open(found, "not measured: the model is not deterministic")
        y = model(x).detach().reshape(len(x), -1)
        if y.shape != self.targets.shape:
            raise ValueError(f"the model gives {tuple(y.shape)} outputs, targets are {tuple(self.targets.shape)}")
        found.append(squared_loss(self.loss, y, self.targets, limits["squared_loss"]))
        self.lr = self._rate(y)
        if found[-1].verdict != "holds":
            self._at_points(found, {0: None})
            found += self._own(None)
            return found + self._open(found, "twins are trained under squared loss only")
        sigma = curvature(self.loss, y, self.targets)
        self.sigma = 1.0 if abs(sigma - 1) < 1e-9 else sigma
        if self.moves.lr == "auto":
            self.lr /= self.sigma  # λ_max(ΛHΛᵀ) = σλ_max(H) ≤ σN
        result, watch, failure = self._study()
        alone = self._alone(found, failure)
        if result is not None:
            found += self._along(result, watch)
        if isinstance(failure, StepTooLargeError):
            at = {"step": watch.instants if result is None else result.pairs[0]["steps"] + 1}
            found.append(step_limit(self.lr, 2 * self.sigma / failure.limit, limits["step_limit"], **at))
        self._at_points(found, {0: None} if alone is None else {0: None, len(alone.outputs) - 1: alone.end})
        found += self._own(result if failure is None else None)
        return found + self._open(found, f"the run stopped: {failure}")

    def context(self) -> dict:
        m = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        n, p = self.targets.shape
        about = {"n": n, "outputs": p, "parameters": m, "twins": len(self.twins), "steps": self.steps}
        dtype = str(self.x.dtype).removeprefix("torch.")
        return about | self.moves.described() | {"lr": self.lr, "dtype": dtype, "device": str(self.x.device)}

    def _rate(self, y: Tensor) -> float:
        if self.moves.lr != "auto":
            return float(self.moves.lr)
        if self.moves.scale != "none" and resolve_output_metric(self.moves.output_metric).factor(y) is not None:
            raise ValueError('lr="auto" rests on λ_max(H) ≤ N, which needs M = I; write a number')
        return auto_lr(len(trainable_layers(self.model)) if self.moves.blocks == "layer" else 1, self.moves.scale)

    def _study(self) -> tuple[TwinResult | None, Watch, Exception | None]:
        """The twin study, as far as it goes: where a step fails, that of the steps before it."""
        count, failure = self.steps, None
        while True:
            watch = Watch()
            try:
                options = {"steps": count, "lr": self.lr * self.sigma, "observer": watch, **self.moves.metric}
                return train_twins(self.model, self.x, self.targets, self.twins, **options), watch, failure
            except (StepTooLargeError, NumericalError) as error:
                first, failure = failure, failure or error
                if first is not None or watch.instants < 2:
                    return None, watch, failure
                count = watch.instants - 1

    def _alone(self, found: list[Assumption], failure: Exception | None):
        """Determinism of the run and its distance to the flow, into ``found``; the run."""
        if failure is not None or self.skip >= {"determinism", "gradient_flow"}:
            return None
        data = (self.model, self.x, self.targets, self.moves, self.lr * self.sigma)
        try:
            first = run_alone(*data, self.steps)
            if "determinism" not in self.skip:
                found[0] = same_bits(first, run_alone(*data, self.steps))
            if "gradient_flow" not in self.skip:
                found.append(followed(*data, first, self.limits["gradient_flow"], self.flow))
        except NumericalError as error:
            found += self._open(found, f"the run stopped: {error}", only=["gradient_flow"])
            return None
        return first

    def _along(self, result: TwinResult, watch: Watch) -> list[Assumption]:
        limits, run, places = self.limits, result.run, watch.places
        structural = why_singular(self.model, self.x, self.targets.shape[1])
        layer = {"layer": watch.kappa_layer(self.model)}
        rate = run["lambda_max_twin"]
        xi = float(run["xi"].min())
        found = [
            positive_rate(xi, structural, limits["positive_rate"], **places["xi"]),
            bounded("bounded_jacobian", watch.kappa, limits["bounded_jacobian"], places["kappa"] | layer),
            bounded("bounded_gradients", [self.sigma * L for L in watch.L], limits["bounded_gradients"], places["L"]),
            self._step(rate, run["lambda_max"]),
        ]
        if structural:
            found += self._open(found, f"λ_min(H) is 0 in any dtype: {structural}", only=["float_sufficiency"])
        else:
            share = max(watch.rounding)
            found.append(float_sufficiency(share, limits["float_sufficiency"], **places["rounding"]))
        series = result.trajectories
        for j, pair in enumerate(result.pairs):
            k, null, measured = pair["replaced"], pair["null_sup"], pair["measured_sup"]
            peak = {name: int(series[name][j].argmax()) for name in ("drift", "measured_sup")}
            drift, gap = limits["no_kernel_drift"], limits["one_metric"]
            found.append(no_kernel_drift(pair["drift"], pair["disturbance"], k, drift, step=peak["drift"]))
            found.append(one_metric(pair["metric_gap"], k, gap, step=0))
            found.append(resolved_by_floats(null, measured, k, limits["resolved_by_floats"], step=peak["measured_sup"]))
        return found

    def _step(self, bounds, known) -> Assumption:
        limit, at = self.limits["step_limit"], int(bounds.argmax())
        found = step_limit(self.lr, self.sigma * float(bounds.max()), limit, self.sigma * float(known.max()), step=at)
        return found if found.verdict != "violated" else replace(found, step=int(known.argmax()))

    def _own(self, twins: TwinResult | None) -> list[Assumption]:
        x, targets = self.x.clone(), self.targets.clone()  # the caller's, whatever a measure does to them
        seen = Seen(deepcopy(self.model), x, targets, self.lr, self.moves.metric, twins)
        return own_verdicts(seen, self.limits, self.skip)

    def _at_points(self, found: list[Assumption], points: dict) -> None:
        structural = why_singular(self.model, self.x, self.targets.shape[1])
        found.append(full_row_rank(self.model, self.x, points, structural))
        found.append(metric_floor(self.model, self.x, points, self.limits["metric_floor"], **self.moves.metric))

    def _open(self, found: list[Assumption], reason: str, only: Iterable[str] = CATALOGUE) -> list[Assumption]:
        """Undecided, for one reason, whatever has no verdict yet."""
        seen = {KEY_OF[v.assumption] for v in found}
        return [undecided(key, self.limits[key], reason) for key in only if key not in seen]


def _twins_of(data, replacements) -> tuple[Tensor, Tensor, list[Replacement]]:
    if not isinstance(data, Sequence) or isinstance(data, Tensor) or len(data) != 2:
        raise TypeError(f"data must be (x, targets), two tensors; got {type(data).__name__}")
    x, targets = data
    for name, value in (("x", x), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} of data must be a tensor, got {type(value).__name__}")
    if replacements is None:
        if len(x) < 3 or len(x) != len(targets):
            raise ValueError(
                f"data has {len(x)} inputs and {len(targets)} targets; without replacements the last sample takes the "
                "place of sample 0 in the twin, which needs as many of both, three or more"
            )
        replacements = [Replacement(0, x[-1], targets[-1])]
        x, targets = x[:-1], targets[:-1]
    check_data(x, targets, replacements, None)
    return x, targets, list(replacements)
