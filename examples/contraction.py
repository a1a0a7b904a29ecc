"""Metrics in which momentum contracts: on quadratics against closed forms, and along recorded runs on the digits.

    python -m examples.contraction [FOLDER] [--quick]

Heavy ball and Nesterov on a quadratic expand in the Euclidean norm and contract in the metric that the program finds; the
gain √χ/(1 − ρ) against the condition χ that it is bought with; a network trained with momentum, and what the enclosure of two
twins' divergence is in either norm. Writes contraction.png, .svg and .pdf into FOLDER (results/contraction).
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.options import options
from nt_kernel import generalized_ntk
from optim import Woodbury
from stability import ContractionMetric, contraction_metric, metric_enclosure, momentum_matrices, momentum_metric
from stability import momentum_rate as closed_form
from studies.data.datasets import dataset
from studies.data.models import fully_connected
from studies.figures.lines import hue
from studies.figures.style import PAGE, log_limits, log_y, new_figure, save_figure, styled

EIGENVALUES, LR = torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64), 1.0
MOMENTUM = {"heavy ball": {"momentum": 0.81}, "Nesterov": {"momentum": 0.64, "nesterov": True}}
SHEAR = torch.tensor([[-1.0, 5.0], [0.0, -1.0]], dtype=torch.float64)
SAMPLES, WIDTH, STEPS, STATES = 6, 32, 40, 12
RECORDED = ((0.1, 0.5, False), (0.1, 0.5, True), (0.1, 0.8, False), (0.3, 0.5, False))  # lr, b, nesterov
DRAWN = 2
"""The recorded run that is in the figure."""


@dataclass(frozen=True)
class Quadratic:
    """One kind of momentum on the quadratic of EIGENVALUES: its constant A, the metric found, the transient."""

    rate: float  # closed form
    norm: float  # ‖A‖₂
    fastest: ContractionMetric
    metric: ContractionMetric  # of the smallest gain
    euclidean: Tensor  # ‖x_t‖ from the start of the largest transient, [T + 1]
    weighted: Tensor  # ‖x_t‖_Θ


def quadratic(steps: int = 60, **momentum) -> Quadratic:
    A = momentum_matrices([torch.diag(EIGENVALUES)] * 2, LR, first_step=False, **momentum)[-1]
    fastest, found = (contraction_metric([A], kind="discrete", objective=goal) for goal in ("rate", "gain"))
    powers = torch.stack([torch.linalg.matrix_power(A, t) for t in range(steps + 1)])
    peak = int(torch.linalg.matrix_norm(powers, 2).argmax())
    x = powers @ torch.linalg.svd(powers[peak]).Vh[0]
    rate = closed_form(EIGENVALUES, LR, **momentum).max().item()
    return Quadratic(rate, torch.linalg.matrix_norm(A, 2).item(), fastest, found, x.norm(dim=1), found.norm(x))


def gains(conditions: list[float]) -> tuple[list[float], list[float]]:
    """(χ, gain) of the fastest metric of the shear at every condition that is allowed."""
    found = [contraction_metric([SHEAR], condition=chi) for chi in conditions]
    return [f.condition for f in found if f.feasible], [f.gain for f in found if f.feasible]


@dataclass(frozen=True)
class Recorded:
    """A run of Woodbury with momentum on S, its twin, and what encloses x = (e, f): in Θ_t and in the Euclidean norm."""

    expansion: float  # max_t ‖A_t‖₂
    shared: ContractionMetric  # Θ₂ ⊗ I, for all t
    constant: ContractionMetric  # one Θ of all states, by projection
    varying: ContractionMetric  # Θ_t
    measured: Tensor  # ‖x_t‖, [T + 1]
    enclosure: Tensor  # E⁺ = ρE + ‖w‖_Θ in Θ_t
    euclidean: Tensor  # E⁺ = ‖A_t‖₂E + ‖w‖


def recorded(lr: float, momentum: float, nesterov: bool, *, steps: int = STEPS, width: int = WIDTH) -> Recorded:
    images, labels = (torch.tensor(array) for array in dataset("digits"))
    rows = torch.tensor(np.random.default_rng(0).permutation(len(images)))
    x = images[rows[:SAMPLES]]
    start = fully_connected([64, width, width, 10], "tanh", np.random.SeedSequence(0))
    outputs, kernels = [], []
    for replaced in (False, True):
        model = copy.deepcopy(start)
        opt = Woodbury(model, lr=lr, momentum=momentum, nesterov=nesterov)
        own = rows[[SAMPLES, *range(1, SAMPLES)]] if replaced else rows[:SAMPLES]
        seen = [model(x).detach().flatten()]
        for _ in range(steps):
            if not replaced:
                kernels.append(generalized_ntk(model, x).matrix)
            opt.zero_grad()
            (0.5 * (model(images[own]) - labels[own]).square().sum(1).mean()).backward()
            opt.step()
            seen.append(model(x).detach().flatten())
        outputs.append(torch.stack(seen))
    e = outputs[1] - outputs[0]
    states = torch.cat([e, torch.cat([torch.zeros_like(e[:1]), e.diff(dim=0)])], 1)
    A = momentum_matrices(kernels, lr, momentum, nesterov=nesterov)
    options = {"kind": "discrete", "max_states": STATES}
    varying = contraction_metric(A, time_varying=True, objective="gain", **options)
    norms, euclidean = torch.linalg.matrix_norm(A, 2), [states[0].norm()]
    for t, size in enumerate(norms):
        euclidean.append(size * euclidean[-1] + (states[t + 1] - A[t] @ states[t]).norm())
    return Recorded(
        norms.max().item(), momentum_metric(kernels, lr, momentum, nesterov=nesterov), contraction_metric(A, **options),
        varying, states.norm(dim=1), metric_enclosure(states, A, varying), torch.stack(euclidean),
    )  # fmt: skip


@styled
def figure(quadratics: dict[str, Quadratic], curve: tuple[list[float], list[float]], run: Recorded):
    left, middle, right = new_figure(PAGE, 2.75).subplots(1, 3)
    for (name, q), color in zip(quadratics.items(), ("blue", "vermilion"), strict=True):
        left.plot(q.euclidean / q.euclidean[0], color=hue(color), label=f"{name}: ‖x‖")
        left.plot(q.weighted / q.weighted[0], color=hue(color), linestyle="--", label=f"{name}: ‖x‖ in Θ")
    left.axhline(1, color="black", linewidth=0.6, zorder=1)
    left.set_xlim(0, 30)
    left.set_ylim(0)
    left.set_xlabel("step t")
    left.set_ylabel("norm of x = (e, f) over that at 0")
    left.set_title("two quadratics", fontsize=7.5)

    chi = np.geomspace(6.4, 2e5, 200)
    middle.plot(chi, np.sqrt(chi) / (1 - 2.5 / np.sqrt(chi)), color=hue("grey"), label="closed form √χ/(1 − 2.5/√χ)")
    middle.plot(*curve, "o", color=hue("blue"), markeredgecolor="white", label="fastest metric at χ, certified")
    best = contraction_metric([SHEAR], objective="gain")
    middle.plot(best.condition, best.gain, "*", color=hue("vermilion"), markersize=9, label="smallest gain, searched")
    middle.set_xscale("log")
    log_y(middle, 5, 1000)
    middle.set_xlabel("condition χ of the metric")
    middle.set_ylabel("disturbance gain √χ/λ")
    middle.set_title("the shear [[−1, 5], [0, −1]]", fontsize=7.5)

    right.plot(run.euclidean, color=hue("blue"), label="enclosure, Euclidean norm")
    right.plot(run.enclosure, color=hue("vermilion"), linestyle="--", label="enclosure in Θ(t)")
    right.plot(run.measured, color="black", linewidth=1.9, label="measured ‖x‖ of two twins")
    log_y(right, *log_limits(torch.cat([run.euclidean, run.measured[1:]]).tolist()))
    right.set_xlabel("step t")
    right.set_ylabel("norm of the twins' divergence x")
    lr, b, _ = RECORDED[DRAWN]
    right.set_title(f"digits, lr {lr}, momentum {b}", fontsize=7.5)
    for ax in (left, middle, right):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), handlelength=2.6)
    return left.figure


def main(folder: Path, *, quick: bool = False) -> tuple[dict[str, Quadratic], list[Recorded]]:
    quadratics = {name: quadratic(**momentum) for name, momentum in MOMENTUM.items()}
    for name, q in quadratics.items():
        grown = (q.euclidean.max() / q.euclidean[0]).item()
        print(f"{name}: ‖A‖₂ = {q.norm:.3f}, ‖x‖ grows to {grown:.2f} of its start; closed-form rate {q.rate:.4f}")
        print(f"    fastest: {q.fastest}\n    smallest gain: {q.metric}")
    curve = gains(np.geomspace(7, 1e5, 4 if quick else 12).tolist())
    runs = []
    for lr, b, nesterov in RECORDED[DRAWN : DRAWN + 1] if quick else RECORDED:
        run = recorded(lr, b, nesterov, **({"steps": 8, "width": 8} if quick else {}))
        runs.append(run)
        print(f"digits, lr {lr}, {'Nesterov' if nesterov else 'heavy ball'} {b}: max ‖A_t‖₂ = {run.expansion:.3f}")
        for name in ("shared", "constant", "varying"):
            print(f"    {name:8s} {getattr(run, name)}")
        ends = (run.measured.max().item(), run.enclosure.max().item(), run.euclidean.max().item())
        print("    ‖x‖ of the twins {:.3g}, enclosed by {:.3g} in Θ(t), by {:.3g} in the Euclidean norm".format(*ends))
    save_figure(figure(quadratics, curve, runs[0 if quick else DRAWN]), folder / "contraction")
    return quadratics, runs


if __name__ == "__main__":
    folder, quick = options(__doc__, "contraction")
    main(folder, quick=quick)
