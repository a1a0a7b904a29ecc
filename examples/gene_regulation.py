"""A gene-regulatory network as a Riemannian module, its rates found from data by the optimizer that trains networks.

Three genes in a ring repress one another (Elowitz & Leibler 2000, Nature 403, without the mRNA): with Hill functions

    ẋ_i = β_i / (1 + (x_{i−1}/K_i)^{n_i}) − γ_i x_i,

production β, threshold K, Hill exponent n and decay γ positive: points of (0, ∞)³ with ds² = Σ dp²/p², in which a change by
10 % is as far at 0.1 as at 10. Two detectors see mixtures of the three proteins, y = W x + b: an ``nn.Linear``. The module is
(ODE from t = 0 to the measured times) ; (readout), and optim.Woodbury, which was written for networks, takes
θ ← exp_θ(−lr·G⁻¹∇h) on it: one metric block for the genes, one for the readout.

    python -m examples.gene_regulation --figure gene_regulation.png
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from optim import Woodbury
from optim.riemannian.manifold import Manifold, positive
from optim.riemannian.ode import ode_module
from optim.riemannian.riemannian_module import RiemannianModule

GENES, CHANNELS = 3, 2
TRUTH = {
    "genes.beta": [3.0, 2.5, 4.0],
    "genes.K": [0.8, 1.2, 1.0],
    "genes.n": [2.0, 3.0, 2.5],
    "genes.gamma": [1.0, 0.7, 1.3],
    "readout.weight": [[1.0, 0.3, 0.0], [0.0, 0.4, 1.2]],
    "readout.bias": [0.1, -0.2],
}
NOISE = 0.02
LONGER = 6  # a Woodbury step takes 4 to 5 times as long as a first-order step (the table's last column)
RUNS = {  # name: (the one number that is tuned, its grid, steps as a multiple of the others')
    "Woodbury, block per module": ("mass", [1.0, 1e-1, 1e-2], 1),
    "Woodbury, one block": ("mass", [1.0, 1e-1, 1e-2], 1),
    "Adam": ("lr", [1e-2, 3e-2, 1e-1], 1),
    "Adam, 6 times the steps": ("lr", [1e-2, 3e-2, 1e-1], LONGER),
    "SGD": ("lr", [1e-2, 3e-2, 1e-1], 1),
}
LOOKS = (("#0173b2", "-"), ("#029e73", "--"), ("#d55e00", "-."), ("#de8f05", (0, (1, 1))), ("#949494", ":"))


def velocity(t: float, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """ẋ [N, 3] at x [N, 3]; every gene is repressed by the one before it."""
    repressor = x.roll(1, -1).clamp_min(1e-9)  # a long step may leave the positive reals
    return p["beta"] / (1 + (repressor / p["K"]) ** p["n"]) - p["gamma"] * x


def system(times: list[float], max_step: float) -> RiemannianModule:
    """x(0) [N, 3] ↦ the two channels at times[1:], [N, T, 2]."""
    rates = {name: positive((GENES,)) for name in ("beta", "K", "n", "gamma")}
    genes = ode_module(velocity, Manifold((GENES,)), rates, times, max_step=max_step, name="genes")
    linear = nn.utils.skip_init(nn.Linear, GENES, CHANNELS, dtype=torch.float64)  # a map; its values are points of θ
    seen = torch.zeros(1, len(times) - 1, GENES, dtype=torch.float64)
    readout = RiemannianModule.from_torch(linear, seen, output_metric="identity", name="readout")
    return genes.sequential(readout)


def truth() -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in TRUTH.items()}


def start(draw: torch.Generator) -> dict[str, Tensor]:
    """Rates wrong by a factor of e^{0.4·normal}, a readout that knows nothing but which channel is which."""
    normal = lambda like: torch.randn(like.shape, generator=draw, dtype=torch.float64)  # noqa: E731
    point = {n: p * (0.4 * normal(p)).exp() for n, p in truth().items() if n.startswith("genes.")}
    weight, bias = truth()["readout.weight"], truth()["readout.bias"]
    return point | {"readout.weight": 0.5 * torch.ones_like(weight), "readout.bias": torch.zeros_like(bias)}


def train(module: RiemannianModule, point, x: Tensor, a: Tensor, name: str, value: float, steps: int) -> dict:
    """One run: risk ½‖y − a‖²/N at every step, the point reached, seconds of one thread per step."""
    model = module.as_torch(point)
    metric = {"output_metric": model.output_metric, "lr": "auto", "check_step": False}
    make: dict[str, Callable] = {
        "Woodbury, block per module": lambda: Woodbury(model, mass=value, **metric),
        "Woodbury, one block": lambda: Woodbury(model, mass=value, blocks="network", **metric),
        "Adam": lambda: torch.optim.Adam(model.parameters(), lr=value),
        "Adam, 6 times the steps": lambda: torch.optim.Adam(model.parameters(), lr=value),
        "SGD": lambda: torch.optim.SGD(model.parameters(), lr=value),
    }
    opt = make[name]()
    risks, began = [], time.process_time()
    for _ in range(steps):
        opt.zero_grad()
        risk = 0.5 * (model(x) - a).square().sum() / len(x)
        risks.append(risk.item())
        if not risk.isfinite():
            break
        risk.backward()
        opt.step()
    spent = (time.process_time() - began) / len(risks)
    with torch.no_grad():
        risks.append((0.5 * (model(x) - a).square().sum() / len(x)).item())
    risks += [math.nan] * (steps + 1 - len(risks))
    return {"name": name, "value": value, "risks": risks, "point": model.point(), "seconds": spent}


def rate_error(point: dict[str, Tensor]) -> float:
    """Distance to the true rates on their manifold, ‖log p − log p*‖ over the 12 rates, root mean square."""
    gaps = [(point[n] / p).log() for n, p in truth().items() if n.startswith("genes.")]
    return torch.cat(gaps).square().mean().sqrt().item()


def integration_error(times: list[float], max_step: float, x: Tensor) -> float:
    """Largest difference of the Runge–Kutta states to an adaptive solution (scipy, DOP853, rtol 1e-11)."""
    from scipy.integrate import solve_ivp

    rates = {name.removeprefix("genes."): p for name, p in truth().items()}
    genes = system(times, max_step).stages[0]
    found = genes(x, truth())
    error = 0.0
    for i, xi in enumerate(x):
        f = lambda t, z: velocity(t, torch.as_tensor(z)[None], rates)[0].numpy()  # noqa: E731
        exact = solve_ivp(f, (times[0], times[-1]), xi.numpy(), "DOP853", t_eval=times[1:], rtol=1e-11, atol=1e-12)
        error = max(error, (torch.as_tensor(exact.y.T) - found[i]).abs().max().item())
    return error


def draw_figure(best: list[dict], x: Tensor, a: Tensor, times, floor: float, path: Path) -> None:
    """Risk against steps, and the data of one experiment with the fit of the run that reached the lowest risk."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(
        {
            "font.size": 8,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for run, (color, dash) in zip(best, LOOKS, strict=True):
            tuned, _, longer = RUNS[run["name"]]
            label = f"{run['name']} ({tuned} {run['value']:g})"
            steps = [k / longer for k in range(len(run["risks"]))]
            left.plot(steps, run["risks"], color=color, linestyle=dash, label=label, linewidth=1.5)
        left.axhline(floor, color="black", linewidth=0.8, label="the true parameters")
        top = 5 * max(run["risks"][0] for run in best)  # a first-order run may pass far above it
        xlabel = f"step (of the longer run: {LONGER} steps)"
        left.set(yscale="log", xlabel=xlabel, ylabel="empirical risk  ½‖y − a‖²/N", ylim=(floor / 2, top))
        fitted = min(best, key=last_risk)
        fine = [times[0] + (times[-1] - times[0]) * k / 100 for k in range(101)]
        fit, true = (system(fine, 0.1)(x[:1], point)[0] for point in (fitted["point"], truth()))
        right.plot([], [], color="0.6", linewidth=2.5, label="truth")
        right.plot([], [], color="0.2", linewidth=1.2, label=f"fit: {fitted['name']}")
        right.plot([], [], "o", color="0.2", markersize=3, label="data")
        for c, color in enumerate(("#0173b2", "#d55e00")):
            right.plot(fine[1:], true[:, c], color="0.6", linewidth=2.5)
            right.plot(fine[1:], fit[:, c], color=color, linewidth=1.2)
            right.plot(times[1:], a[0, :, c], "o", color=color, markersize=3)
        right.set(xlabel="time", ylabel="the two channels, one experiment")
        for ax in (left, right):
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)


def last_risk(run: dict) -> float:
    """The risk at the end, inf where the run diverged."""
    return math.inf if math.isnan(run["risks"][-1]) else run["risks"][-1]


def main(quick: bool = False, figure: Path | None = None) -> list[dict]:
    """Draws data, trains with every optimizer at every value of its grid, prints a table; the best run of each."""
    steps, experiments, T, max_step = (10, 4, 6, 0.25) if quick else (100, 8, 12, 0.2)
    draw = torch.Generator().manual_seed(0)
    times = [8.0 * k / T for k in range(T + 1)]
    module, point = system(times, max_step), truth()
    x = 0.2 + 3 * torch.rand(experiments, GENES, generator=draw, dtype=torch.float64)
    clean = module(x, point)
    a = clean + NOISE * torch.randn(clean.shape, generator=draw, dtype=torch.float64)
    floor = (0.5 * (clean - a).square().sum() / len(x)).item()
    first = start(draw)
    error = integration_error(times, max_step, x)
    print(f"{experiments} experiments, {T} times, {steps} steps; Runge–Kutta error {error:.1e}, noise {NOISE:g}")
    print(f"risk of the true parameters {floor:.3g}; rates at the start wrong by {rate_error(first):.2f} (rms of log)")
    print(f"{'optimizer':28}{'tuned':>14}{'risk':>10}{'rates wrong by':>16}{'ms/step':>9}")
    best = []
    for name, (tuned, grid, longer) in RUNS.items():
        runs = [train(module, first, x, a, name, value, longer * steps) for value in (grid[1:2] if quick else grid)]
        run = min(runs, key=last_risk)
        best.append(run)
        what = f"{tuned} {run['value']:g}"
        print(
            f"{name:28}{what:>14}{run['risks'][-1]:>10.3g}{rate_error(run['point']):>16.3f}{1e3 * run['seconds']:>9.1f}"
        )
    if figure is not None:
        draw_figure(best, x, a, times, floor, figure)
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--figure", type=Path, help="where to save the figure (.png, .pdf, .svg)")
    options = parser.parse_args()
    main(options.quick, options.figure)
