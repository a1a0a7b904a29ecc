"""The same twins by what the field uses: TracIn, damped influence functions, leaving a sample out, EK-FAC (kronfluence)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.prediction import relative, train
from benchmarks.prediction_data import draw_study, network
from benchmarks.prediction_figures import scatter_figure
from benchmarks.timing import Settings
from optim import Woodbury
from optim.steps.direction import woodbury_step
from stability.influence_functions import influence
from stability.prediction.predict import predict_twins
from stability.replacement import Replacement
from stability.tracing import tracin

TITLE = "Predicted twins and the rivals"
ABOUT = (
    "Digits, a tanh network with two hidden layers, squared loss, M = I, scale mean, lr 0.1; twins S^(k→z'), k and z' drawn "
    "at random, trained, and predicted by every method. Quantities at the end, on S: `r` and `ρ`, correlation and "
    "rank correlation of predicted and trained sup divergence; `error`: ‖ê − e‖/‖e‖ of the output vectors, median over the "
    "twins; `seconds`: CPU time for all twins, a run on S where the method needs one included; `against training`: CPU "
    "time of training them (`optim.woodbury_step`, or one by one where that is cheaper) over it. TracIn: in the "
    "metric of the optimizer, a checkpoint every fifth step. Influence functions: Gauss–Newton of the whole network at the "
    "end, damped by mass/(steps·lr), the early stopping that matches. Left out: the run on S without k, retrained, for every "
    "k; it does not know z'. kronfluence: EK-FAC with the same damping, the outputs as measurements."
)
METHOD = "Times: CPU seconds of one call each."
# data set, n, width, masses, twins, steps
CASES = [("digits", 24, 64, (1.0, 0.1), 30, 100)]
QUICK = [("digits", 8, 16, (0.5,), 6, 10)]


@dataclass(frozen=True)
class Task:
    """One run on S and the twins asked for."""

    model: nn.Module
    x: Tensor
    a: Tensor
    zs: Sequence[Replacement]
    mass: float
    steps: int

    @property
    def k(self) -> Tensor:
        return torch.tensor([z.index for z in self.zs], device=self.x.device)

    @property
    def others(self) -> tuple[Tensor, Tensor]:
        return torch.stack([z.x for z in self.zs]), torch.stack([z.target for z in self.zs])

    def run(self) -> Iterator[nn.Module]:
        """The network along the run on S: before every step, and at the end."""
        model = deepcopy(self.model)
        opt = Woodbury(model, lr=0.1, mass=self.mass)
        for _ in range(self.steps):
            yield model
            with torch.enable_grad():
                opt.zero_grad()
                (0.5 * (model(self.x) - self.a).square().sum(1).mean()).backward()
                opt.step()
        yield model


def predicted(task: Task, method: str) -> Tensor:
    found = predict_twins(task.model, task.x, task.a, task.zs, steps=task.steps, lr=0.1, mass=task.mass, method=method)
    return found.outputs - found.run_outputs


def traced(task: Task, every: int = 5) -> Tensor:
    """TracIn in the optimizer's metric; its own effect on S, [R, n, p]."""

    def checkpoints():
        for t, model in enumerate(task.run()):
            if t % every == 0 and t < task.steps:
                own = {name: p.detach().clone() for name, p in model.named_parameters()}
                yield own, 0.1 * min(every, task.steps - t)

    effects = tracin(task.model, task.x, task.a, *task.others, checkpoints=checkpoints(), mass=task.mass)
    return effects.replaced(task.k, torch.arange(len(task.zs)))[:, : len(task.x)]


def influenced(task: Task) -> Tensor:
    *_, end = task.run()
    effects = influence(end, task.x, task.a, *task.others, damping=task.mass / (0.1 * task.steps))
    return effects.replaced(task.k, torch.arange(len(task.zs)))[:, : len(task.x)]


def left_out(task: Task) -> Tensor:
    """y_{S without k} − y_S, by training once for every k that is asked for."""
    n, ks = len(task.x), torch.unique(task.k)
    keep = torch.stack([torch.cat([torch.arange(k), torch.arange(k + 1, n)]) for k in ks.tolist()])
    xs, targets = task.x[keep], task.a[keep]
    params = {name: p.detach().expand(len(ks), *p.shape).clone() for name, p in task.model.named_parameters()}
    for _ in range(task.steps):
        params = woodbury_step(task.model, params, xs, lambda y: (y - targets) / (n - 1), lr=0.1, mass=task.mass)
    *_, end = task.run()
    one = torch.func.vmap(lambda p: torch.func.functional_call(task.model, p, (task.x,)))
    return (one(params) - end(task.x))[torch.searchsorted(ks, task.k)]


def ekfac(task: Task) -> Tensor:
    from benchmarks.kronfluence_peer import output_effects

    *_, end = task.run()
    data = (torch.cat([task.x, task.others[0]]), torch.cat([task.a, task.others[1]]))
    per_sample = output_effects(end, task.x, *data, damping=task.mass / (0.1 * task.steps))  # [n + R, n, p]
    n = len(task.x)
    return (per_sample[n:] - per_sample[task.k]) / -n


METHODS: Mapping[str, Callable[[Task], Tensor]] = {
    "strided-path": lambda task: predicted(task, "strided-path"),
    "kernel-path": lambda task: predicted(task, "kernel-path"),
    "TracIn": traced,
    "influence functions": influenced,
    "left out, retrained": left_out,
    "kronfluence, EK-FAC": ekfac,
}


def compete(task: Task) -> tuple[list[str], dict]:
    """The rows of the table, and (trained, predicted) sup divergence of every method."""
    from scipy.stats import spearmanr

    with torch.no_grad():
        e, _, _, seconds = train(task.model, task.x, task.a, task.zs, None, task.steps, task.mass)
        training, true = seconds * task.steps * len(task.zs), e.norm(dim=-1).amax(-1)
        rows, panels = [], {}
        for name, method in METHODS.items():
            start = process_time()
            try:
                found = method(task)
            except ImportError:
                rows.append(f"| {task.mass:g} | {name} | not installed | – | – | – | – |")
                continue
            cost, sup = process_time() - start, found.norm(dim=-1).amax(-1)
            r, rho = np.corrcoef(sup, true)[0, 1], spearmanr(sup, true).statistic
            panels[name] = (true.tolist(), sup.tolist())
            rows.append(
                f"| {task.mass:g} | {name} | {r:.3f} | {rho:.3f} | {relative(found, e).median():.2f} | {cost:.2f} | "
                f"{training / cost:.1f}× |"
            )
    return rows, panels


def report(settings: Settings, cases: Sequence[tuple], stem: Path) -> Iterator[str]:
    """The body of the page, a figure per mass beside it."""
    done = []
    for name, n, width, masses, twins, steps in cases:
        x, a, zs, _ = draw_study(name, n, twins, 0, 1, settings.device)
        model = network((x.shape[1], width, width, a.shape[1]), 1, settings.device)
        lines = [
            f"{name}, n = {n}, width {width}, {twins} twins, {steps} steps\n",
            "| mass | method | r | ρ | error | seconds | against training |",
            "|--:|---|--:|--:|--:|--:|--:|",
        ]
        pictures = []
        for mass in masses:
            rows, panels = compete(Task(model, x, a, zs, mass, steps))
            lines += rows
            path = stem.with_name(f"{stem.name}-mass-{mass:g}.png")
            scatter_figure(panels, path)
            pictures.append(f"![Predicted against trained, mass {mass:g}]({path.name})")
        done.append("\n".join(lines) + "\n\n" + "\n\n".join(pictures))
        yield "\n\n".join(done)
