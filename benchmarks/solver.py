"""What solver="auto" is worth: the step of one layer by Cholesky, by conjugate gradients, and by the choice between them.

Regret is the time of the choice over that of the better solver; 1 is never wrong. The error of each is that of its v,
‖v − S⁻¹r‖/‖r‖ against a float64 Cholesky solve.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Settings, interleaved
from benchmarks.workloads import WORKLOADS
from nt_kernel import layer_factors
from nt_kernel.factors import Factor
from nt_kernel.metric.layer_metric import inner_system, step_system
from nt_kernel.metric.output_metric import resolve_output_metric

TITLE = "Inner systems: Cholesky or conjugate gradients"
ABOUT = (
    "S v = r, S = I + cK with c = 1/n, of one layer, from its factor to v: Gram matrix included for Cholesky, "
    'preconditioner included for CG; tolerances 1e-12 (float64), 1e-4 (float32). `auto` is `solver="auto"`; steps are '
    "CG's, and in brackets those that auto spent before it turned to Cholesky. `regret`: time of auto / time of the "
    "better of the two (medians over rounds)."
)
# Workload, samples, mass, type. The networks are trained for a moment: at its initial values a network flatters CG.
CASES = [
    *product(("W1",), (8, 32, 64, 128, 256), (1.0, 1e-2, 1e-4), ("float32", "float64")),
    *product(("W2",), (16, 64, 128), (1.0, 1e-3), ("float32",)),
    *product(("W4",), (128, 512), (1.0, 1e-3), ("float32", "float64")),
]
QUICK = [("W1", 8, 1.0, "float32"), ("W1", 64, 1e-2, "float32"), ("W4", 64, 1.0, "float64")]
WARM_UP = 50  # steps of Adam
SOLVERS = ("cholesky", "cg", "auto")


@dataclass(frozen=True)
class Row:
    """One layer of one case: seconds, error and steps by solver, and the regret of the choice."""

    case: str
    layer: str
    size: int
    seconds: dict[str, float]
    errors: dict[str, float]
    steps: dict[str, int]
    chosen: str
    regret: float


def trained(workload: str, n: int, dtype: str, device: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The network after ``WARM_UP`` steps of Adam, its inputs and ∂h/∂y there."""
    model = WORKLOADS[workload].model(dtype, device)
    x, targets = WORKLOADS[workload].batch(n, dtype, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(WARM_UP):
        optimizer.zero_grad()
        (0.5 * (model(x) - targets).square().sum() / n).backward()
        optimizer.step()
    return model, x, ((model(x) - targets) / n).detach()


def reference(factor: Factor, mass: dict, r: Tensor) -> Tensor:
    """S⁻¹r in float64."""
    n = len(r)
    exact, y = factor.to(torch.float64), r.double()
    return inner_system(exact, n, mass, 1 / n, resolve_output_metric("identity"), y)[0].dual(y)


def rows(settings: Settings, cases: Sequence[tuple[str, int, float, str]] = CASES) -> list[Row]:
    """Every layer of every case, timed."""
    found, metric = [], resolve_output_metric("identity")
    for workload, n, mu, dtype in cases:
        model, x, r = trained(workload, n, dtype, settings.device)
        y, factors = layer_factors(model, x)
        for name, factor in factors.items():
            mass = factor.resolved_mass(mu)
            solved, systems = reference(factor, mass, r), {}

            def run(solver, factor=factor, mass=mass, n=n, y=y, r=r, systems=systems):
                systems[solver] = step_system(factor, n, mass, "mean", metric, y, solver=solver)
                return systems[solver].dual(r)

            runs = {solver: partial(run, solver) for solver in SOLVERS}
            values = {solver: once() for solver, once in runs.items()}
            errors = {s: ((v.double() - solved).norm() / r.double().norm()).item() for s, v in values.items()}
            last = {solver: system.last for solver, system in systems.items()}
            times = interleaved(runs, settings)
            seconds = {solver: float(np.median(t)) for solver, t in times.items()}
            found.append(
                Row(
                    f"{workload}, n = {n}, mass {mu:g}, {dtype}",
                    name,
                    n if factor.decouples(mass) else n * y.shape[1],
                    seconds,
                    errors,
                    {solver: one.iterations for solver, one in last.items()},
                    last["auto"].solver,
                    seconds["auto"] / min(seconds["cholesky"], seconds["cg"]),
                )
            )
    return found


def table(found: Sequence[Row]) -> str:
    """A Markdown table of the rows, and the regret over all of them."""
    lines = [
        "| case | layer | S | Cholesky, ms | CG, ms | steps | auto, ms | auto took | regret | error Cholesky | error CG |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in found:
        ms = {solver: f"{seconds * 1e3:.2f}" for solver, seconds in row.seconds.items()}
        spent = f" ({row.steps['auto']})" if row.chosen == "cholesky" and row.steps["auto"] else ""
        lines.append(
            f"| {row.case} | {row.layer} | {row.size} | {ms['cholesky']} | {ms['cg']} | {row.steps['cg']} | {ms['auto']} | "
            f"{row.chosen}{spent} | {row.regret:.2f} | {row.errors['cholesky']:.1e} | {row.errors['cg']:.1e} |"
        )
    regrets = [row.regret for row in found]
    return "\n".join(lines) + (
        f"\n\nRegret: median {np.median(regrets):.2f}, 90 % {np.percentile(regrets, 90):.2f}, largest {max(regrets):.2f}. "
        + ", ".join(f"always {s}: median {np.median(r):.2f}, largest {max(r):.1f}" for s, r in _fixed(found).items())
        + "."
    )


def _fixed(found: Sequence[Row]) -> dict[str, list[float]]:
    """The regret of one solver for all."""
    return {s: [row.seconds[s] / min(row.seconds["cholesky"], row.seconds["cg"]) for row in found] for s in SOLVERS[:2]}


def report(settings: Settings, cases: Sequence[tuple[str, int, float, str]], stem: Path) -> Iterator[str]:
    """The body of the page after each case."""
    found: list[Row] = []
    for case in cases:
        found += rows(settings, [case])
        yield table(found)
