"""Minimizing movements on nonlinear regression: how near to the exact sequence for how many inner iterations or seconds.

Every solver runs the same outer steps from the same network under the same budget for each outer step, inner iterations or
seconds (:mod:`studies.experiments.clock`), with a δ that nobody reaches: what differs is how far the inner problem is
solved. Learning rates of first-order solvers are tuned on each budget by the result itself, in their favour.
"""

from collections.abc import Callable, Sequence
from time import process_time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

PROBLEMS = ("wave", "diabetes")
# Learning rates tried; the best one at each budget is what counts.
RATES = {"SGD": (0.03, 0.1, 0.3), "SGD, momentum": (0.01, 0.03, 0.1), "Adam": (1e-3, 3e-3, 1e-2)}
ALONG = ("sigma_min", "sigma_max", "displacement", "change")
VERDICTS = ("non-degenerate", "iterates inside", "budget inside")
# A δ that no solver comes to within any budget: all of it is spent.
OUT_OF_REACH = 1e-10
SOLVERS = ("Gauss–Newton", *RATES)
# Columns of an outer step, each beside what bounds it; kept as shares of the way.
LENGTHS = (
    "delta",
    "delta_certificate",
    "tracking",
    "tracking_bound",
    "uniform_bound",
    "distance",
    "distance_bound",
    "ball",
    "path",
    "path_bound",
    "exact_path",
    "budget",
)


def problem(
    name: str, n: int, width: int, seed: int, *, dtype: str = "float64", device: str = "cpu"
) -> "tuple[nn.Module, Tensor, Tensor]":
    """(network d-width-width-1 with tanh, inputs [n, d], targets [n, 1]); drawn in float64 on the CPU, then put in place.

    "wave": y = sin 4x + 0.3·cos 9x on n points of [−1, 1]; "diabetes": n rows of scikit-learn's data set, standardised.
    Raises ValueError for another name, n < 2, more rows than there are, and rows that agree in a column (no deviation).

    >>> model, x, a = problem("wave", 5, 8, 0)
    >>> x.shape, a.shape, sum(p.numel() for p in model.parameters())
    (torch.Size([5, 1]), torch.Size([5, 1]), 97)
    """
    import numpy as np
    import torch

    from studies.data.models import fully_connected

    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}; known are {', '.join(map(repr, PROBLEMS))}")
    if n < 2:
        raise ValueError(f"n = {n}: a problem has at least 2 samples")
    data, start = np.random.SeedSequence([seed, 60527779]).spawn(2)
    if name == "wave":
        x = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
        a = torch.sin(4 * x) + 0.3 * torch.cos(9 * x)
    else:
        from sklearn.datasets import load_diabetes

        features, target = load_diabetes(return_X_y=True)
        if n > len(features):
            raise ValueError(f"n = {n}: diabetes has {len(features)} rows; write n = {len(features)} or fewer")
        rows = np.random.default_rng(data).permutation(len(features))[:n]
        both = torch.from_numpy(np.column_stack([features, target])[rows])
        deviation = both.std(0)
        if not bool((deviation > 0).all()):
            raise ValueError(f"n = {n}: the {n} rows of diabetes that seed {seed} draws agree in a column; take more")
        both = (both - both.mean(0)) / deviation
        x, a = both[:, :-1], both[:, -1:]
    place = {"dtype": getattr(torch, dtype), "device": device}
    model = fully_connected([x.shape[1], width, width, 1], "tanh", start, dtype=dtype, device=device)
    return model, x.to(**place), a.to(**place)


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


def solver_tables(
    model_of: "Callable[[], tuple[nn.Module, Tensor, Tensor]]",
    which: str,
    *,
    iterations: Sequence[int],
    seconds: Sequence[float],
    deltas: Sequence[float],
    most: int,
    tau: float,
    steps: int,
    clock: Callable[[], float] = process_time,
) -> "dict[str, pd.DataFrame]":
    """What one solver does with one problem. ``summary``: a row for each learning rate and budget; ``steps``: every outer step
    at the largest number of iterations.

    ``budget`` is "iterations" or "seconds" (of ``clock``) for each outer step, with a δ out of reach, or "delta": δ as a
    share of the way ‖u⁰ − ū^K‖, ``most`` iterations a step. ``tracking``: max_k ‖u^k − ū^k‖ as a share of it, ``bound`` the
    same of Σ q^{k−1−j}δ_j; ``reached``: outer steps that ended within δ, of ``outer_steps``; ``iterations``, ``seconds``: all
    steps together;
    ``violated``: inequalities of :mod:`optim.movements.tracking` that failed.
    """
    import pandas as pd

    budgets = [("iterations", float(b)) for b in iterations] + [("seconds", b) for b in seconds]
    budgets += [("delta", b) for b in deltas]
    summary, by_step = [], []
    for lr in RATES.get(which, (0.0,)):
        for budget, size in budgets:
            run, way = _run(model_of, solver(which, lr), budget, size, most, tau, steps, clock)
            c = run.columns()
            summary.append(
                {
                    "budget": budget,
                    "per_step": size,
                    "lr": lr,
                    "tracking": max(c["tracking"]) / way,
                    "bound": max(c["tracking_bound"]) / way,
                    "path": c["path"][-1] / way,
                    "path_bound": c["path_bound"][-1] / way,
                    "energy": c["energy"][-1],
                    "exact_energy": c["exact_energy"][-1],
                    "reached": sum(c["reached"]),
                    "outer_steps": steps,
                    "iterations": run.iterations,
                    "seconds": sum(c["seconds"]),
                    "violated": ", ".join(run.violated()),
                }
            )
            if (budget, size) == ("iterations", float(max(iterations))):
                table = pd.DataFrame({"step": c["step"], "lr": lr, "energy": c["energy"]})
                for name in LENGTHS:
                    table[name] = [value / way for value in c[name]]
                by_step.append(table)
    return {"summary": pd.DataFrame(summary), "steps": pd.concat(by_step, ignore_index=True)}


def _run(model_of, inner, budget: str, size: float, most: int, tau: float, steps: int, clock):
    """(the run, its way ‖u⁰ − ū^K‖)."""
    from optim import SquaredEnergy, minimizing_movements
    from optim.movements.proximal import proximal_point
    from optim.movements.space import norm

    model, x, a = model_of()
    energy, start = SquaredEnergy(a), model(x).detach()
    exact = start
    for _ in range(steps):
        exact = proximal_point(energy, exact, tau)
    way = norm(start - exact).item()
    limits = {
        "iterations": {"inner_steps": int(size), "delta": OUT_OF_REACH},
        "seconds": {"inner_steps": 10**6, "inner_seconds": size, "delta": OUT_OF_REACH},
        "delta": {"inner_steps": most, "delta": size * way},
    }[budget]
    return minimizing_movements(model, x, energy, tau=tau, steps=steps, solver=inner, clock=clock, **limits), way


def tuned(summary: "pd.DataFrame", keys: Sequence[str] = ("problem", "solver", "budget", "per_step")) -> "pd.DataFrame":
    """The rows of the best learning rate for each of ``keys``: least mean tracking error over seeds; where δ is the budget,
    most steps that reached it first, and between rates with all of them fewest iterations (an inner solver that diverges at
    once needs few as well). A tracking error that is not finite comes last."""
    keys = list(keys)
    tracking = summary["tracking"].where(summary["tracking"].abs() < float("inf"), float("inf"))
    seen = summary.assign(tracking=tracking, missed=summary["outer_steps"] - summary["reached"])
    mean = seen.groupby([*keys, "lr"])[["tracking", "missed", "iterations"]].mean().reset_index()
    by_delta = mean["budget"] == "delta"
    mean["then"] = mean["iterations"].where(by_delta & (mean["missed"] == 0), mean["tracking"])
    mean["missed"] = mean["missed"].where(by_delta, 0)
    best = mean.sort_values(["missed", "then"], kind="stable").groupby(keys).head(1)
    return summary.merge(best[[*keys, "lr"]], on=[*keys, "lr"])


def nondegeneracy(
    problem_of: "Callable[[int], tuple[nn.Module, Tensor, Tensor]]", widths: Sequence[int], tau: float, steps: int
) -> "dict[str, pd.DataFrame]":
    """σ_min(J) along Gauss–Newton runs by width, and the negative controls: an input that occurs twice, too few parameters.

    ``degeneracy``: one row for each run: sigma_start, sigma_least, displacement, the radius R, the length 2ℓ/σ₀ needed,
    outer steps within δ = 10⁻³, and the three verdicts of :meth:`optim.movements.degeneracy.Nondegeneracy.verdicts`.
    ``sigma``: one row for each θ^k of it, k = 0 … steps: sigma_min, sigma_max, displacement ‖θ^k − θ⁰‖, change
    ‖J(θ^k) − J(θ⁰)‖.
    """
    import pandas as pd
    import torch

    from optim import SquaredEnergy, minimizing_movements
    from optim.movements.degeneracy import local_nondegeneracy

    cases = [(f"width {width}", width, False) for width in widths]
    cases += [("an input twice", widths[-1], True), ("width 1", 1, False)] if len(widths) else []
    rows, along = [], []
    for case, width, repeated in cases:
        model, x, a = problem_of(width)
        if repeated:
            x = torch.cat([x[:-1], x[:1]])
        run = minimizing_movements(
            model, x, SquaredEnergy(a), tau=tau, steps=steps, delta=1e-3, inner_steps=40, keep_parameters=True
        )
        seen = local_nondegeneracy(model, x, run)
        verdicts = seen.verdicts()
        rows.append(
            {
                "case": case,
                "sigma_start": seen.sigma_min[0].item(),
                "sigma_least": seen.sigma_min.min().item(),
                "displacement": seen.displacement.max().item(),
                "radius": seen.radius,
                "needed": seen.needed,
                "reached": sum(one.reached for one in run.inner),
                **dict(zip(VERDICTS, (v.verdict for v in verdicts), strict=True)),
                "reason": "; ".join(dict.fromkeys(v.reason for v in verdicts)),
            }
        )
        columns = {name: getattr(seen, name).tolist() for name in ALONG}
        along += [
            {"case": case, "step": k} | dict(zip(columns, v, strict=True))
            for k, v in enumerate(zip(*columns.values(), strict=True))
        ]
    columns = ["case", "sigma_start", "sigma_least", "displacement", "radius", "needed", "reached", *VERDICTS, "reason"]
    return {
        "degeneracy": pd.DataFrame(rows, columns=columns),
        "sigma": pd.DataFrame(along, columns=["case", "step", *ALONG]),
    }
