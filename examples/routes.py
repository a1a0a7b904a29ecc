"""Who decays like 1/n, who like 1/√n, who grows: every route to stability on the same twins, with exponents in n.

    python -m examples.routes [FOLDER] [--quick]

Ridge regression on breast cancer, where the theory's O(1/n) has to show; a tanh network on the digits by gradient descent
under a weight decay that lets it learn, and under one that makes it contract; the digits by Woodbury, where theorem 3 and its
ladder are at home. Writes routes.png, .svg and .pdf into FOLDER (results/routes), prints the exponents with 95 % intervals
(bootstrap over seeds) and why a route does not apply.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from examples.options import options
from stability import Replacement, bousquet_elisseeff, parameter_constants, parameter_routes, train_twins
from stability.losses import resolve_loss
from studies.data.datasets import dataset
from studies.data.models import fully_connected
from studies.figures.routes import routes_figure
from studies.figures.style import save_figure
from studies.findings.exponents import Exponent, fit_exponent
from studies.findings.written import number

TWINS, SEEDS = 3, 5
HALF_SQUARES = resolve_loss("squared").value
ROUTES = {
    "contraction in parameters (Kozachkov et al.)": "kozachkov",
    "convex (Hardt–Recht–Singer)": "convex",
    "strongly convex (Hardt–Recht–Singer)": "strongly_convex",
    "smooth, no convexity": "smooth",
}


@dataclass(frozen=True)
class Problem:
    """A model on n samples; ``data`` [rows, d] and [rows, p]; ``model``: a seed's initialisation."""

    title: str
    data: Callable[[], tuple[np.ndarray, np.ndarray]]
    model: Callable[[np.random.SeedSequence], nn.Module]
    sizes: tuple[int, ...]
    lr: float
    steps: int
    decay: float = 0.0
    every: int = 1  # constants are looked at on every so many steps
    woodbury: bool = False


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Standardised features of norm 1 per sample, and the class as ±1."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    return features / np.linalg.norm(features, axis=1, keepdims=True), 2.0 * labels[:, None] - 1


def zero_start(stream: np.random.SeedSequence) -> nn.Module:
    model = fully_connected([30, 1], "tanh", stream)
    nn.init.zeros_(model[0].weight)
    return model


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits at 4 × 4 pixels and norm 1: a network of 442 parameters learns them, and its whole Hessian is looked at."""
    images, labels = dataset("digits")
    pooled = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True), labels


def network(sizes: list[int], stream: np.random.SeedSequence) -> nn.Module:
    return fully_connected(sizes, "tanh", stream)


SMALL = partial(network, [16, 16, 10])
PROBLEMS = {
    "ridge": Problem("ridge, breast cancer, decay 0.1", breast_cancer, zero_start, (16, 32, 64, 128, 256), 0.8, 60, 0.1),
    "strong": Problem("digits, network, decay 2", small_digits, SMALL, (16, 32, 64, 128, 256), 0.15, 200, 2.0, 40),
    "useful": Problem("digits, network, decay 0.003", small_digits, SMALL, (16, 32, 64, 128, 256), 0.15, 300, 0.003, 60),
    "woodbury": Problem(
        "digits, Woodbury, mass 1", partial(dataset, "digits"), partial(network, [64, 64, 64, 10]), (6, 12, 24, 48), 0.25, 80,
        woodbury=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One seed: the start, rows shuffled, the replaced k (below the smallest n) and the rows of their z' (the last ones)."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    replaced: list[int]

    def twins(self, n: int) -> tuple[Tensor, Tensor, list[Replacement]]:
        new = range(len(self.inputs) - len(self.replaced), len(self.inputs))
        candidates = [Replacement(k, self.inputs[j], self.targets[j]) for k, j in zip(self.replaced, new, strict=True)]
        return self.inputs[:n], self.targets[:n], candidates


def drawn(problem: Problem, seed: int, twins: int) -> Drawn:
    initial, data = np.random.SeedSequence(seed).spawn(2)
    inputs, targets = problem.data()
    choose = np.random.default_rng(data)
    rows = choose.permutation(len(inputs))
    replaced = choose.permutation(min(problem.sizes))[:twins].tolist()
    return Drawn(problem.model(initial), torch.tensor(inputs[rows]), torch.tensor(targets[rows]), replaced)


def descend(problem: Problem, d: Drawn, n: int) -> tuple[list[dict[str, Tensor]], Tensor, Tensor, list[Replacement]]:
    """Parameters {name: [1 + R, …]} of S and twins at every step of θ ← θ − lr(∇h + wθ), one stack."""
    x, targets, candidates = d.twins(n)
    xs, ts = (t.expand(1 + len(candidates), *t.shape).clone() for t in (x, targets))
    for j, z in enumerate(candidates):
        xs[1 + j, z.index], ts[1 + j, z.index] = z.x, z.target

    def h(params, points, wanted):
        return HALF_SQUARES(torch.func.functional_call(d.model, params, (points,)), wanted).mean()

    gradient = torch.func.vmap(torch.func.grad(h))
    params = {name: p.detach().expand(len(xs), *p.shape).clone() for name, p in d.model.named_parameters()}
    path = [params]
    for _ in range(problem.steps):
        g = gradient(params, xs, ts)
        params = {name: p - problem.lr * (g[name] + problem.decay * p) for name, p in params.items()}
        path.append(params)
    return path, x, targets, candidates


def by_parameters(problem: Problem, d: Drawn, n: int) -> tuple[list[dict], dict[str, str]]:
    """Rows of one (seed, n): measured ε and gap, and what every route in the parameters makes of the constants."""
    path, x, targets, candidates = descend(problem, d, n)
    rest = slice(n, None)  # ε is a supremum over all samples: L_θ has to be one too, and then it does not grow with n
    look = sorted({*range(0, problem.steps, problem.every), problem.steps})
    runs = [[({k: p[j] for k, p in path[t].items()}, problem.lr) for t in look] for j in range(1 + len(candidates))]
    losses = torch.func.vmap(
        lambda params: HALF_SQUARES(torch.func.functional_call(d.model, params, (d.inputs,)), d.targets)
    )(path[-1])
    largest = losses.max().item()
    rows, reasons = [], {}
    for j, z in enumerate(candidates):
        c = parameter_constants(
            d.model, x, targets, d.inputs[rest], d.targets[rest], runs[0], twins=[runs[1 + j]],
            weight_decay=problem.decay, curvature_every=3,
        )  # fmt: skip
        c = replace(c, lrs=(problem.lr,) * problem.steps)
        row = {"replaced": z.index, "replacement": j, "rate": c.curvature, "loss": losses[0, :n].mean().item()}
        row["measured"] = (losses[1 + j] - losses[0]).abs().max().item()
        row["gap"] = (losses[0, n:].mean() - losses[0, :n].mean()).abs().item()
        for route in parameter_routes(c, loss_bound=largest):
            name = ROUTES.get(route.route)
            if name is None:
                continue
            row[name] = route.value if route.applicable else np.nan
            reasons[name] = route.to_dict()["status"] + (f": {route.reason}" if route.reason else "")
        for name, epsilon in (("corollary", row["measured"]), ("corollary_bound", row["kozachkov"])):
            row[name] = bousquet_elisseeff(epsilon, n, largest).value if epsilon >= 0 else np.nan  # nan: not applicable
        rows.append(row)
    return rows, reasons


def by_outputs(problem: Problem, d: Drawn, n: int) -> tuple[list[dict], dict[str, str]]:
    """Rows of one (seed, n) of Woodbury: theorem 3, its ladder and T5 beside the measured divergence of the outputs."""
    x, targets, candidates = d.twins(n)
    rest = slice(n, n + 200)
    found = train_twins(
        d.model, x, targets, candidates, held_out=d.inputs[rest], steps=problem.steps, lr=problem.lr, null_twin=False
    )
    rows = []
    for j, pair in enumerate(found.pairs):
        row = {"replaced": pair["replaced"], "replacement": j, "loss": pair["train_loss"]}
        row |= {name: pair[name] for name in ("T0", "T1", "T2", "T3", "T5")}
        row |= {"measured": pair["measured_sup"], "measured_heldout": pair["measured_heldout"]}
        rows.append(row)
    moving = "not applicable: one constant metric: G = D + c·JᵀMJ moves with θ and with the data"
    return rows, dict.fromkeys(("kozachkov", "convex", "strongly_convex", "smooth"), moving)


def study(
    problem: Problem, *, seeds: int = SEEDS, twins: int = TWINS
) -> tuple[pd.DataFrame, dict[int, dict[str, str]]]:
    rows, reasons = [], {}
    for seed in range(seeds):
        d = drawn(problem, seed, twins)
        for n in problem.sizes:
            found, reasons[n] = (by_outputs if problem.woodbury else by_parameters)(problem, d, n)
            rows += [row | {"n": n, "seed": seed} for row in found]
    return pd.DataFrame(rows), reasons


def exponents(frame: pd.DataFrame) -> dict[str, Exponent]:
    columns = [c for c in frame.columns if c not in ("n", "seed", "replaced", "replacement", "rate", "loss")]
    return {c: fit_exponent(frame, c) for c in columns if frame[c].notna().any()}


def main(folder: Path, *, quick: bool = False) -> dict[str, tuple[pd.DataFrame, dict[str, Exponent]]]:
    results = {}
    for key, problem in PROBLEMS.items():
        if quick:
            problem = replace(problem, sizes=(4, 6, 8) if problem.woodbury else (8, 12, 16), steps=6)
        frame, reasons = study(problem, **({"seeds": 2, "twins": 1} if quick else {}))
        found = exponents(frame)
        results[key] = (frame, found)
        print(f"{problem.title}: training loss {number(frame['loss'].median())}")
        if "rate" in frame:
            print(f"    rate γ + w along the runs: {number(frame['rate'].min())} to {number(frame['rate'].max())}")
        last = frame[frame["n"] == frame["n"].max()]
        for name, exponent in found.items():
            said = f"n^{exponent}" if exponent.fitted else f"no exponent ({exponent})"
            print(f"    {name:18s} {said}, median at n = {frame['n'].max()}: {number(last[name].median())}")
        for name, reason in reasons[max(problem.sizes)].items():
            print(f"    {name}: {reason}")
    save_figure(routes_figure({PROBLEMS[k].title: r for k, r in results.items()}), folder / "routes")
    return results


if __name__ == "__main__":
    folder, quick = options(__doc__, "routes")
    main(folder, quick=quick)
