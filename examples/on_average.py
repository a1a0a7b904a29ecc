"""The on-average identity on the digits: the generalization gap, and the replace-one stability that it has to equal.

    python -m examples.on_average [FOLDER] [--quick]

For several n, many draws of S: the gap is measured on all images that a draw leaves; the stability is that of twins that were
trained, and of the same twins predicted from the run on S alone. Writes on-average.png, .svg and .pdf into FOLDER
(results/on-average) and prints one row per n.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.options import options
from optim import StackedState, WoodburyStep, stack_parameters, stacked_step
from stability import Replacement, on_average_gap, predict_twins
from stability.on_average import OnAverage, replace_one_losses
from studies.data.datasets import dataset
from studies.data.models import fully_connected
from studies.figures.lines import hue
from studies.figures.style import PAGE, n_axis, new_figure, save_figure, styled

SIZES, DRAWS, TWINS, WIDTH, STEPS, LR, MASS = (6, 12, 24, 48), 20, 6, 64, 60, 1 / 3, 1.0
METHODS = {"predicted": "parameter-path", "predicted, kernel path": "kernel-path"}
LOOKS = {"trained": ("blue", "s"), "predicted": ("vermilion", "D"), "predicted, kernel path": ("sky", "v")}


@dataclass(frozen=True)
class Problem:
    """One draw: S, the candidates (k, z'), the images that neither of them holds, and the start all runs share."""

    model: torch.nn.Module
    x: Tensor
    targets: Tensor
    candidates: list[Replacement]
    rest: tuple[Tensor, Tensor]


def problem(n: int, draw: int, twins: int) -> Problem:
    """Every draw has its own S, z', k (chosen without looking) and initialisation."""
    streams = np.random.SeedSequence([n, draw]).spawn(2)
    images, labels = (torch.tensor(array) for array in dataset("digits"))
    choose = np.random.default_rng(streams[0])
    rows, replaced = torch.tensor(choose.permutation(len(images))), choose.permutation(n)[:twins]
    own, new, rest = rows[:n], rows[n : n + len(replaced)], rows[n + len(replaced) :]
    candidates = [Replacement(int(k), images[j], labels[j]) for k, j in zip(replaced, new, strict=True)]
    model = fully_connected([64, WIDTH, WIDTH, 10], "tanh", streams[1])
    return Problem(model, images[own], labels[own], candidates, (images[rest], labels[rest]))


def trained(p: Problem, steps: int) -> tuple[dict[str, np.ndarray], float, float]:
    """The losses of trained twins, and the loss of the run on S on S and on the rest: all runs in one stack."""
    x, targets = (t.expand(1 + len(p.candidates), *t.shape).clone() for t in (p.x, p.targets))
    for j, z in enumerate(p.candidates):
        x[1 + j, z.index], targets[1 + j, z.index] = z.x, z.target
    half_squares = lambda y, a: 0.5 * (y - a).square().sum() / len(y)  # noqa: E731
    params, state = stack_parameters(p.model, len(x)), StackedState()
    for _ in range(steps):
        params, state = stacked_step(p.model, params, state, x, targets, half_squares, WoodburyStep(LR, mass=MASS))
    at = lambda points: torch.func.vmap(lambda v: torch.func.functional_call(p.model, v, (points,)))(params)  # noqa: E731
    on_S, on_new = at(p.x), at(torch.stack([z.x for z in p.candidates]))
    own = torch.arange(len(p.candidates))
    losses = replace_one_losses(on_S[0], on_new[0], on_S[1:], on_new[1 + own, own], p.targets, p.candidates)
    means = [
        (y - a).square().sum(1).mean().item() / 2 for y, a in ((on_S[0], p.targets), (at(p.rest[0])[0], p.rest[1]))
    ]
    return losses, *means


def predicted(p: Problem, steps: int, method: str) -> dict[str, np.ndarray]:
    found = predict_twins(p.model, p.x, p.targets, p.candidates, steps=steps, lr=LR, mass=MASS, method=method)
    of_run, of_twins = (found.run_outputs, found.run_own_outputs), (found.outputs, found.own_outputs)
    return replace_one_losses(*of_run, *of_twins, p.targets, p.candidates)


def study(n: int, draws: int, twins: int, steps: int) -> tuple[dict[str, OnAverage], dict[str, float]]:
    """The identity at one n by trained and by predicted twins, and the CPU seconds that each took."""
    columns: dict[str, list] = {name: [] for name in LOOKS}
    means: dict[str, list[float]] = {"train": [], "held_out": []}
    seconds = dict.fromkeys(LOOKS, 0.0)
    for draw in range(draws):
        p = problem(n, draw, twins)
        for name in LOOKS:
            start = time.process_time()
            if name == "trained":
                losses, train, held_out = trained(p, steps)
                means["train"].append(train)
                means["held_out"].append(held_out)
            else:
                losses = predicted(p, steps, METHODS[name])
            columns[name].append(losses)
            seconds[name] += time.process_time() - start
    stacked = {name: {key: np.stack([d[key] for d in rows]) for key in rows[0]} for name, rows in columns.items()}
    return {name: on_average_gap(**losses, **means) for name, losses in stacked.items()}, seconds


@styled
def figure(found: dict[int, dict[str, OnAverage]]):
    """Left: gap and stability against n; right: their difference, paired within draws."""
    left, right = new_figure(PAGE, 2.7).subplots(1, 2, width_ratios=(1.15, 1))
    sizes = np.array(list(found), float)

    def draw(ax, shift, intervals, color, marker, label):
        value, low, high = np.array([(i.value, i.low, i.high) for i in intervals]).T
        look = {"color": hue(color), "marker": marker, "linestyle": "none", "elinewidth": 0.9, "capsize": 2}
        ax.errorbar(sizes * shift, value, [value - low, high - value], label=label, markeredgecolor="white", **look)

    draw(
        left,
        0.93,
        [rows["trained"].gap for rows in found.values()],
        "black",
        "o",
        "generalization gap, held-out images",
    )
    for j, (name, (color, marker)) in enumerate(LOOKS.items()):
        shift = 0.93 * 1.06 ** (j + 1)
        label = f"replace-one stability, {name} twins" if "," not in name else "the same by the kernel path"
        draw(left, shift, [rows[name].stability for rows in found.values()], color, marker, label)
        draw(right, shift, [rows[name].difference for rows in found.values()], color, marker, None)
    left.set_ylim(0)
    left.set_ylabel("loss, ½ squared network-output units")
    right.axhline(0, color="black", linewidth=0.8, zorder=1)
    right.set_ylabel("gap − stability")
    for ax in (left, right):
        n_axis(ax, list(found))
    first = next(iter(found.values()))["trained"]
    left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    right.set_title(f"95 % intervals, {first.draws} draws of S, {first.twins} twins each at most", fontsize=7)
    return left.figure


def main(folder: Path, *, quick: bool = False) -> dict[int, dict[str, OnAverage]]:
    sizes, draws, twins, steps = ((4, 6), 3, 2, 10) if quick else (SIZES, DRAWS, TWINS, STEPS)
    found = {}
    for n in sizes:
        found[n], seconds = study(n, draws, min(twins, n), steps)
        print(f"n = {n}: gap {found[n]['trained'].gap}")
        for name, row in found[n].items():
            print(
                f"    {name:23s} stability {row.stability}, gap - stability {row.difference}: "
                f"{'agree' if row.agree else 'DISAGREE'}, {seconds[name]:.1f} CPU s"
            )
    save_figure(figure(found), folder / "on-average")
    return found


if __name__ == "__main__":
    folder, quick = options(__doc__, "on-average")
    main(folder, quick=quick)
