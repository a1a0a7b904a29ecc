"""T0 to T3 of two recorded runs that follow metric descent, by the pure functions that twin studies use."""

import math
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from nt_kernel.mass import smallest_mass
from nt_kernel.metric.output_metric import resolve_output_metric
from stability.assumptions.structure import why_singular
from stability.assumptions.verdicts import judge
from stability.bounds import bound_ladder, gronwall_step
from stability.constants import (
    column_norm,
    disturbance,
    gradient_bound,
    jacobian_bound,
    kernel_drift,
    metric_norm,
    spectrum_of,
)
from stability.recording.record import RunRecord
from stability.recording.rung import BOUND, FLOW, NOT_APPLICABLE, STATEMENT, Cost, Rung, worst
from stability.replacement import Replacement
from stability.system import TwinSystem

FORMULAS = {
    "T3": "sup_t ∫₀ᵗ exp(−∫_sᵗ ξ)‖d(s)‖ds",
    "T2": "sup_t ‖d(t)‖/ξ",
    "T1c": "2L·col/ξ",
    "T1": "2hL/(ξ√n)",
    "T0": "2κ²L/(ξμ√n)",
}


def flow_ladder(
    run_S: RunRecord, run_twin: RunRecord, grid: Sequence[int], replaced: Sequence[int], measured: Mapping[str, float]
) -> tuple[dict[str, Rung], tuple[dict, ...]]:
    """T3, T2, T1c, T1, T0 on ‖e‖, and the verdicts on what they assume; nan, with the reason, where they say nothing."""
    start = perf_counter()
    why = why_not(run_S, run_twin, replaced)
    if why:
        rungs = {
            name: Rung(name, "l2", math.nan, measured["l2"], _kind(name), FLOW, formula, NOT_APPLICABLE, why)
            for name, formula in FORMULAS.items()
        }
        return rungs, ()
    constants, series, verdicts = _constants(run_S, run_twin, grid, replaced[0], measured)
    bounds = bound_ladder(constants, len(series["y"]), series["sigma"])
    bounds["T3"] = constants["T3"]
    status, reason = worst(verdicts)
    cost = Cost(perf_counter() - start, series["nbytes"])
    rungs = {
        name: Rung(name, "l2", bounds[name], measured["l2"], _kind(name), FLOW, formula, status, reason, cost)
        for name, formula in FORMULAS.items()
    }
    return rungs, tuple(verdicts)


def why_not(run_S: RunRecord, run_twin: RunRecord, replaced: Sequence[int]) -> str:
    """Why T0 to T3 do not speak of these runs at all; "" where they do."""
    if not run_S.loss.quadratic or run_twin.loss.name != run_S.loss.name:
        return f"the theorem is about (σ/2)‖y − a‖²; the loss is {run_S.loss.name!r}"
    if run_S.targets is None or run_twin.targets is None:
        return "the targets are not known: write record(…, targets=a)"
    if not isinstance(run_S.reader.x, Tensor) or run_S.reader.output is not None:
        return "twin studies take models of one input tensor and one output tensor"
    if len(replaced) != 1:
        return f"S' must differ from S in one sample, it does in {len(replaced)}"
    rules = [*run_S.rules, *run_twin.rules]
    if not all(rule.known for rule in rules):
        return f"{next(r.name for r in rules if not r.known)} is not known to be metric descent"
    for rule in rules:
        if rule.beta or rule.decay or rule.pull:
            return f"{rule.name} has momentum or weight decay; the flow θ̇ = −G⁻¹∇h has neither"
        if rule.still or rule.sign < 0 or rule.metric.shares or (rule.note and not rule.exact):
            return f"{rule.name} is not descent θ⁺ = θ − lr·G⁻¹∇h in a metric of the paper"
    if any(rows is not None for rows in [*run_S.rows, *run_twin.rows]):
        return "mini-batches (or unknown rows): the flow is that of the full batch"
    metric = run_S.rules[0].metric
    if metric.scale == "mean-jacobian":
        return "scale 'mean-jacobian' is not the metric of the theorem"
    if any(rule.metric != metric for rule in rules) or any(
        a.lr != b.lr for a, b in zip(run_S.rules, run_twin.rules, strict=True)
    ):
        return "the runs differ in metric or learning rate"
    if not _same_masses(run_S, run_twin):
        return "the masses change along the run, or differ between the runs"
    if any(not torch.equal(p, run_twin.snapshots.held[0].state[n]) for n, p in run_S.snapshots.held[0].state.items()):
        return "the runs do not start from the same parameters"
    return ""


def _same_masses(run_S: RunRecord, run_twin: RunRecord) -> bool:
    first = run_S.masses(0)
    for run in (run_S, run_twin):
        for t in run.times[:-1]:
            other = run.masses(t)
            if other.keys() != first.keys() or any(not _equal(other[n], m) for n, m in first.items()):
                return False
    return True


def _equal(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (isinstance(a, int | float) and a == b)


def _constants(run_S: RunRecord, run_twin: RunRecord, grid, k: int, measured) -> tuple[dict, dict, list[dict]]:
    x, targets = run_S.reader.x, run_S.targets.double()
    z = Replacement(k, run_twin.reader.x[k], run_twin.targets[k].double())
    rule, masses = run_S.rules[0], run_S.masses(0)
    trainable = {n for n, p in run_S.reader.model.named_parameters() if p.requires_grad}
    run_S.load(0)
    system = TwinSystem(
        run_S.reader.model, x, targets, [z], loss=run_S.loss.loss, held_out=None, null_twin=False,
        mass={n: m for n, m in masses.items() if n in trainable},
        output_metric=resolve_output_metric(rule.metric.output_metric), scale=rule.metric.scale, blocks=rule.metric.blocks,
    )  # fmt: skip
    gap, found, flow, rates = system.metric_gap().item(), {}, [], []
    E, most, xi, top = torch.zeros((), dtype=x.dtype), 0.0, 0.0, 0.0
    d = y = pull = None
    for j, t in enumerate(grid):
        ours, theirs = (run.snapshots.held[t].state for run in (run_S, run_twin))
        system.params = {
            n: torch.stack([ours[n], theirs[n], *[ours[n]] * (len(system.x) - 2)]).double() for n in sorted(trainable)
        }
        snapshot = system.snapshot(None)
        after, r = snapshot.outputs[0].flatten(), snapshot.residuals[0, :-1].flatten()
        if j:
            dt = sum(run_S.rules[s].lr for s in range(grid[j - 1], t))
            E = gronwall_step(E, d, system.sigma * xi, dt)
            most = max(most, E.item())
            if pull.norm() > 1e-9 * rates[0]:
                flow.append(((after - y + dt * pull).norm() / (dt * pull).norm()).item())
            flow.append(dt * system.sigma * top / 2)
        values, xi = spectrum_of(snapshot)
        d, y, top, pull = disturbance(snapshot, system).norm(dim=-1)[0], after, values[-1].item(), snapshot.H @ r
        rates.append(pull.norm())
        now = {
            "xi": -xi, "kappa": jacobian_bound(snapshot).item(), "L": gradient_bound(snapshot).item(),
            "h": metric_norm(snapshot).item(), "column": column_norm(snapshot, system).item(), "disturbance": d.item(),
            "drift": kernel_drift(snapshot, system).norm().item(), "lambda_max_twin": snapshot.rate,
        }  # fmt: skip
        found = {name: max(value, found.get(name, -math.inf)) for name, value in now.items()}
    structural = why_singular(run_S.reader.model, x, system.p)
    found["xi"] = 0.0 if structural else -found["xi"]
    found |= {"mu": smallest_mass(system.mass), "T3": most}
    lr = max(rule.lr for rule in run_S.rules)
    pair = {"replaced": k, "drift": found["drift"], "disturbance": found["disturbance"], "metric_gap": gap}
    verdicts = judge(
        run_S.reader.model,
        {"xi": found["xi"], "lr": lr, "lambda_max_twin": found["lambda_max_twin"], "flow_defect": max(flow, default=0.0),
         "null_sup": math.nan},
        [pair | {"measured_sup": measured["sup"]}], dynamics="euler", structural=structural, loss=run_S.loss.loss,
    )  # fmt: skip
    nbytes = 8 * 4 * (x.shape[0] * system.p) ** 2 * system.block_count
    return (
        found,
        {"y": snapshot.outputs[0], "sigma": system.sigma, "nbytes": nbytes},
        [verdict.to_dict() for verdict in verdicts],
    )


def _kind(name: str) -> str:
    return STATEMENT if name == "T0" else BOUND
