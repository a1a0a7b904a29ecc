"""Minimizing movements on nonlinear regression: how near to the exact sequence for how many inner iterations or seconds.

Every solver runs the same outer steps from the same network under the same budget for each outer step, inner iterations or
CPU seconds, with a δ that nobody reaches: what differs is how far the inner problem is solved. Learning rates of first-order
solvers are tuned on each budget by the result itself, in their favour.
"""

from collections.abc import Mapping, Sequence
from time import process_time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

PROBLEMS = ("wave", "diabetes")
# Learning rates tried; the best one at each budget is what counts.
RATES = {"SGD": (0.03, 0.1, 0.3), "SGD, momentum": (0.01, 0.03, 0.1), "Adam": (1e-3, 3e-3, 1e-2)}
SOLVERS = ("Gauss–Newton", *RATES)


def problem(name: str, n: int, width: int, seed: int) -> "tuple[nn.Module, Tensor, Tensor]":
    """(network d-width-width-1 with tanh, inputs [n, d], targets [n, 1]), float64.

    "wave": y = sin 4x + 0.3·cos 9x on n points of [−1, 1]; "diabetes": n rows of scikit-learn's data set, standardised.

    >>> model, x, a = problem("wave", 5, 8, 0)
    >>> x.shape, a.shape, sum(p.numel() for p in model.parameters())
    (torch.Size([5, 1]), torch.Size([5, 1]), 97)
    """
    import numpy as np
    import torch

    from studies.models import fully_connected

    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}; known are {', '.join(map(repr, PROBLEMS))}")
    data, start = np.random.SeedSequence([seed, 60527779]).spawn(2)
    if name == "wave":
        x = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
        a = torch.sin(4 * x) + 0.3 * torch.cos(9 * x)
    else:
        from sklearn.datasets import load_diabetes

        features, target = load_diabetes(return_X_y=True)
        rows = np.random.default_rng(data).permutation(len(features))[:n]
        both = torch.from_numpy(np.column_stack([features, target])[rows])
        both = (both - both.mean(0)) / both.std(0)
        x, a = both[:, :-1], both[:, -1:]
    return fully_connected([x.shape[1], width, width, 1], "tanh", start), x, a


def solver(name: str, lr: float | None = None):
    """The inner solver of that name; first-order ones keep their moments between outer steps (the better choice for them)."""
    import torch

    from optim import FirstOrder, GaussNewton

    if name == "Gauss–Newton":
        return GaussNewton()
    make = {
        "SGD": lambda params: torch.optim.SGD(params, lr),
        "SGD, momentum": lambda params: torch.optim.SGD(params, lr, momentum=0.9),
        "Adam": lambda params: torch.optim.Adam(params, lr),
    }[name]
    return FirstOrder(make, keep=True)


def compare_solvers(
    problems: Mapping[str, tuple[int, int]],
    *,
    seeds: Sequence[int],
    iterations: Sequence[int],
    seconds: Sequence[float],
    tau: float = 0.5,
    steps: int = 6,
    solvers: Sequence[str] = SOLVERS,
    delta: float = 1e-10,
) -> "pd.DataFrame":
    """One row for each problem {name: (n, width)}, seed, solver, learning rate and budget (each outer step's).

    ``tracking``: max_k ‖u^k − ū^k‖/‖u⁰ − ū^K‖, the trajectory error as a share of the way; ``tracking_bound`` in the same
    unit; ``iterations``, ``seconds`` (CPU), all steps together; ``violated``: inequalities that failed (none should).
    """
    import pandas as pd

    rows = []
    budgets = [("iterations", b) for b in iterations] + [("seconds", b) for b in seconds]
    for name, (n, width) in problems.items():
        for seed in seeds:
            for which in solvers:
                for lr in RATES.get(which, (None,)):
                    for kind, budget in budgets:
                        run = _run(name, n, width, seed, solver(which, lr), kind, budget, tau, steps, delta)
                        rows.append({"problem": name, "seed": seed, "solver": which, "lr": lr, "budget": kind, "per_step": budget} | run)
    return pd.DataFrame(rows)


def _run(name, n, width, seed, inner, kind, budget, tau, steps, delta) -> dict:
    from optim import SquaredEnergy, minimizing_movements
    from optim.movements.space import norm

    model, x, a = problem(name, n, width, seed)
    most = {"inner_steps": budget} if kind == "iterations" else {"inner_steps": 10**6, "inner_seconds": budget}
    run = minimizing_movements(
        model, x, SquaredEnergy(a), tau=tau, steps=steps, delta=delta, solver=inner, clock=process_time, **most
    )
    c, way = run.columns(), norm(run.trajectory.outputs[0] - run.trajectory.exact[-1]).item()
    return {
        "tracking": max(c["tracking"]) / way,
        "tracking_bound": max(c["tracking_bound"]) / way,
        "energy": c["energy"][-1],
        "exact_energy": c["exact_energy"][-1],
        "iterations": run.iterations,
        "seconds": sum(c["seconds"]),
        "violated": ", ".join(run.violated()),
    }


def tuned(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of the learning rate with the least mean tracking error over seeds, for each problem, solver and budget."""
    keys = ["problem", "solver", "budget", "per_step"]
    frame = frame.assign(lr=frame["lr"].astype(float).fillna(0.0))
    mean = frame.groupby([*keys, "lr"])["tracking"].mean()
    best = mean.groupby(level=keys).idxmin()
    chosen = set(best)
    return frame[[tuple(row) in chosen for row in frame[[*keys, "lr"]].itertuples(index=False)]].reset_index(drop=True)


def iterations_to_reach(
    problems: Mapping[str, tuple[int, int]],
    *,
    seeds: Sequence[int],
    deltas: Sequence[float],
    most: int,
    tau: float = 0.5,
    steps: int = 6,
    solvers: Sequence[str] = SOLVERS,
) -> "pd.DataFrame":
    """Inner iterations and CPU seconds until every outer step is within δ (as a share of the way), ``most`` each at most."""
    import pandas as pd

    from optim import SquaredEnergy, minimizing_movements
    from optim.movements.proximal import proximal_point
    from optim.movements.space import norm

    rows = []
    for name, (n, width) in problems.items():
        for seed in seeds:
            for which in solvers:
                for lr in RATES.get(which, (None,)):
                    for share in deltas:
                        model, x, a = problem(name, n, width, seed)
                        energy, u = SquaredEnergy(a), model(x).detach()
                        exact = u
                        for _ in range(steps):
                            exact = proximal_point(energy, exact, tau)
                        delta = share * norm(u - exact).item()
                        run = minimizing_movements(
                            model, x, energy, tau=tau, steps=steps, delta=delta, solver=solver(which, lr),
                            inner_steps=most, clock=process_time,
                        )  # fmt: skip
                        rows.append(
                            {
                                "problem": name,
                                "seed": seed,
                                "solver": which,
                                "lr": lr,
                                "delta_share": share,
                                "reached": run.reached,
                                "steps_reached": sum(one.reached for one in run.inner),
                                "iterations": run.iterations,
                                "seconds": sum(one.seconds for one in run.inner),
                            }
                        )
    return pd.DataFrame(rows)


def best_reach(frame: "pd.DataFrame") -> "pd.DataFrame":
    """For each problem, solver and δ: the learning rate that reached it most often, of these the one with fewest iterations."""
    keys = ["problem", "solver", "delta_share"]
    grouped = frame.assign(lr=frame["lr"].astype(float).fillna(0.0)).groupby([*keys, "lr"])
    table = grouped.agg(
        reached=("reached", "mean"), steps_reached=("steps_reached", "mean"), iterations=("iterations", "median"),
        seconds=("seconds", "median"),
    ).reset_index()  # fmt: skip
    table = table.sort_values([*keys, "steps_reached", "iterations"], ascending=[True, True, True, False, True])
    return table.groupby(keys, sort=False).head(1).reset_index(drop=True)


def nondegeneracy(
    *, n: int = 30, widths: Sequence[int] = (8, 64, 512), seeds: Sequence[int] = (0,), tau: float = 0.5, steps: int = 6
) -> "pd.DataFrame":
    """σ_min(J) along runs on "wave", by width, and the negative controls: a repeated input, too few parameters.

    One row for each run: sigma_start, sigma_least, displacement, radius R, needed 2ℓ/σ₀, and the three verdicts.
    """
    import pandas as pd
    import torch

    from optim import SquaredEnergy, minimizing_movements
    from optim.movements.degeneracy import local_nondegeneracy

    cases = [(f"width {w}", w, False) for w in widths] + [("repeated input", widths[-1], True), ("width 2", 2, False)]
    rows = []
    for seed in seeds:
        for label, width, repeated in cases:
            model, x, a = problem("wave", n, width, seed)
            if repeated:
                x = torch.cat([x[:-1], x[:1]])
            run = minimizing_movements(
                model, x, SquaredEnergy(a), tau=tau, steps=steps, delta=1e-3, inner_steps=40, keep_parameters=True
            )
            seen = local_nondegeneracy(model, x, run)
            on_run, localised, budget = (v.verdict for v in seen.verdicts())
            rows.append(
                {
                    "case": label,
                    "seed": seed,
                    "sigma_start": seen.sigma_min[0].item(),
                    "sigma_least": seen.sigma_min.min().item(),
                    "displacement": seen.displacement.max().item(),
                    "radius": seen.radius,
                    "needed": seen.needed,
                    "reached": sum(one.reached for one in run.inner),
                    "non-degenerate": on_run,
                    "iterates inside": localised,
                    "budget inside": budget,
                    "reason": "; ".join(dict.fromkeys(v.reason for v in seen.verdicts())),
                }
            )
    return pd.DataFrame(rows)
