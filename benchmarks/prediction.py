"""Predicting twins instead of training them: error, correlation and cost of every method, and the error against width."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.prediction_figures import slope, width_figure
from benchmarks.timing import Settings
from optim import Woodbury
from optim.steps.direction import woodbury_step
from stability.prediction.predict import predict_twins
from stability.replacement import Replacement, stack_twins

TITLE = "Predicted twins"
ABOUT = (
    "Digits (scikit-learn), a tanh network with two hidden layers of the given width, one-hot targets, squared loss, M = I, "
    "scale mean, lr 0.1. Twins S^(k→z') with k and z' drawn at random (or one for every k) are predicted from the run on S; "
    "the first of them are trained too. `error`: ‖ê − e‖/‖e‖ of the outputs' divergence at the end, median over the trained "
    "twins, in brackets the largest; `r`: correlation of predicted and trained sup divergence. `ms`: CPU time of the whole "
    "prediction, the run on S included, per twin and step. `against training`: CPU time of training a twin over it, the "
    "cheaper of a stack of all trained twins (`optim.woodbury_step`) and a run by itself (`optim.Woodbury`), both "
    'with solver="auto", with nothing of what train_twins measures. `slope`: of log error on S against log width.'
)
METHOD = "Times: CPU seconds of one call each, at one thread unless the machine's line says otherwise."
ALL = ("kernel-path", "strided-path", "parameter-path, 0 CG steps", "parameter-path, 2 CG steps")
# n, widths, masses, twins (0: one for every k), trained of them, steps, held-out points, methods
CASES = [
    ("20", (32, 64, 128, 256, 512), (1.0, 0.01), 6, 6, 60, 20, ALL),
    ("48", (256,), (1.0, 0.1, 0.01), 5, 5, 200, 20, ALL),
    ("64", (256,), (1.0, 0.1, 0.01), 0, 4, 200, 0, ALL[1:2]),
    ("64", (256,), (0.1,), 0, 3, 4, 0, ALL),
]
QUICK = [("8", (8, 16), (1.0,), 3, 3, 5, 4, ALL)]
VARIANTS = {
    "kernel-path": {"method": "kernel-path"},
    "strided-path": {"method": "strided-path"},
    "parameter-path, 0 CG steps": {"cg_steps": 0},
    "parameter-path, 2 CG steps": {"cg_steps": 2},
}


@dataclass(frozen=True)
class Row:
    """One method on one network."""

    n: int
    width: int
    mass: float
    method: str
    train: Tensor  # errors on S, [R]
    held_out: Tensor  # on the held-out points, [R]
    r: float
    twins: int
    steps: int
    seconds: float  # per twin and step
    ratio: float


def digits(n: int, twins: int, held_out: int, device: str) -> tuple[Tensor, Tensor, list[Replacement], Tensor | None]:
    """S, its candidates and the held-out inputs, from one permutation of the digits."""
    from sklearn.datasets import load_digits

    data, draw = load_digits(), np.random.default_rng(0)
    order, R = draw.permutation(len(data.data)), twins or n
    x = torch.tensor(data.data[order] / 16, device=device)
    a = torch.eye(10, dtype=x.dtype, device=device)[torch.tensor(data.target[order], device=device)]
    k = draw.integers(0, n, R) if twins else np.arange(n)
    zs = [Replacement(int(index), x[n + j], a[n + j]) for j, index in enumerate(k)]
    return x[:n], a[:n], zs, x[n + R : n + R + held_out] if held_out else None


def network(width: int, device: str) -> nn.Module:
    """The network of a width, the same on every call; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
        return nn.Sequential(*layers).double().to(device)


@torch.no_grad()
def train(model: nn.Module, x: Tensor, a: Tensor, zs, held_out: Tensor | None, steps: int, mass: float):
    """(divergence on S [R, n, p], on the held-out points, suprema [R], CPU seconds per twin and step)."""
    n, (own_x, own_a) = len(x), stack_twins(x, a, zs)
    xs, targets = torch.cat([x[None], own_x[:, :n]]), torch.cat([a[None], own_a[:, :n]])
    params = {name: p.expand(len(xs), *p.shape).clone() for name, p in model.named_parameters()}
    forward = torch.func.vmap(lambda p, z: torch.func.functional_call(model, p, (z,)), in_dims=(0, None))
    largest, seconds = torch.zeros(len(zs), dtype=x.dtype, device=x.device), 0.0

    def step(params):
        return woodbury_step(model, params, xs, lambda y: (y - targets) / n, lr=0.1, mass=mass)

    step(params)  # plans and caches
    for t in range(steps + 1):
        y = forward(params, x)
        largest = torch.maximum(largest, (y[1:] - y[0]).norm(dim=-1).amax(-1))
        if t < steps:
            start = process_time()
            params = step(params)
            seconds += process_time() - start
    y_Q = None if held_out is None else forward(params, held_out)
    alone = seconds_alone(model, xs[1], targets[1], steps, mass)
    return y[1:] - y[0], None if y_Q is None else y_Q[1:] - y_Q[0], largest, min(seconds / len(xs), alone) / steps


def seconds_alone(model: nn.Module, x: Tensor, a: Tensor, steps: int, mass: float) -> float:
    """CPU seconds of one twin trained by itself."""
    model = deepcopy(model)
    opt = Woodbury(model, lr=0.1, mass=mass)
    with torch.enable_grad():
        start = process_time()
        for _ in range(steps):
            opt.zero_grad()
            (0.5 * (model(x) - a).square().sum(1).mean()).backward()
            opt.step()
    return process_time() - start


def rows_of(case: tuple, settings: Settings) -> list[Row]:
    """All methods on all networks of a case."""
    n, widths, masses, twins, some, steps, Q, methods = case
    x, a, zs, held_out = digits(int(n), twins, Q, settings.device)
    rows = []
    for width in widths:
        model = network(width, settings.device)
        for mass in masses:
            e, e_Q, largest, trained = train(model, x, a, zs[:some], held_out, steps, mass)
            for name in methods:
                predict_twins(model, x, a, zs[:1], steps=1, lr=0.1, mass=mass, **VARIANTS[name])
                start = process_time()
                found = predict_twins(
                    model, x, a, zs, steps=steps, lr=0.1, mass=mass, held_out=held_out, **VARIANTS[name]
                )
                seconds = (process_time() - start) / len(zs) / steps
                train_error = relative((found.outputs - found.run_outputs)[:some], e)
                held_out_error = train_error * float("nan")
                if e_Q is not None:
                    held_out_error = relative((found.held_out_outputs - found.run_held_out_outputs)[:some], e_Q)
                r = float(np.corrcoef(found.column("predicted_sup")[:some], largest.cpu())[0, 1])
                errors = (train_error, held_out_error)
                rows.append(Row(int(n), width, mass, name, *errors, r, len(zs), steps, seconds, trained / seconds))
    return rows


def relative(found: Tensor, true: Tensor) -> Tensor:
    """‖found − true‖/‖true‖ of every twin, [R]."""
    return ((found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).cpu()


def table(rows: Sequence[Row]) -> str:
    """One line per row, and the slopes where there are several widths."""
    lines = [
        "| n | width | mass | twins | steps | method | error on S | error held-out | r | ms | against training |",
        "|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        errors = [_error(e) for e in (row.train, row.held_out)]
        lines.append(
            f"| {row.n} | {row.width} | {row.mass:g} | {row.twins} | {row.steps} | {row.method} | {errors[0]} | {errors[1]} | "
            f"{row.r:.4f} | {row.seconds * 1e3:.2f} | {row.ratio:.1f}× |"
        )
    for mass, name in dict.fromkeys((row.mass, row.method) for row in rows):
        some = [row for row in rows if (row.mass, row.method) == (mass, name)]
        if len({row.width for row in some}) > 1:
            fit = slope([row.width for row in some], [row.train.median().item() for row in some])
            lines.append(f"\nslope at mass {mass:g}, {name}: {fit:.2f}")
    return "\n".join(lines)


def _error(e: Tensor) -> str:
    return "–" if bool(e.isnan().all()) else f"{e.median().item():.1e} ({e.max().item():.1e})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Error on S against width, a line per method with its slope, a panel per mass."""
    panels: dict[str, list] = {}
    for mass, name in dict.fromkeys((row.mass, row.method) for row in rows):
        some = [row for row in rows if (row.mass, row.method) == (mass, name)]
        widths, errors = [row.width for row in some], [row.train.median().item() for row in some]
        panels.setdefault(f"mass {mass:g}", []).append((widths, errors, f"{name}: slope {slope(widths, errors):.2f}"))
    width_figure(panels, path)


def report(settings: Settings, cases: Sequence[tuple], stem: Path) -> Iterator[str]:
    """The body of the page, after each case; cases with several widths get a figure beside it."""
    done: list[str] = []
    for case in cases:
        rows, picture = rows_of(case, settings), ""
        if len(case[1]) > 1:
            path = stem.with_name(f"{stem.name}-width-{case[0]}.png")
            draw(rows, path)
            picture = f"![Error against width]({path.name})\n\n"
        done.append(picture + table(rows))
        yield "\n\n".join(done)
