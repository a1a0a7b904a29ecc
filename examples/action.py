"""Gradient descent, momentum, Adam and Woodbury on the digits, all judged by the action principle of one metric.

    python examples/action.py [FOLDER]

writes action.png, .svg and .pdf into FOLDER (results/action) and prints one row per optimizer.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from optim import Woodbury
from stability.action_record import ActionRecord, record_action
from studies.data.datasets import dataset
from studies.data.models import fully_connected
from studies.figures.action import action_figure, excess_action
from studies.figures.style import save_figure

SAMPLES, WIDTH, MASS, TARGET = 60, 32, 0.1, 0.1
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OPTIMIZERS = {
    "gradient descent": lambda model: SGD(model.parameters(), lr=0.05),
    "momentum 0.9": lambda model: SGD(model.parameters(), lr=0.01, momentum=0.9),
    "Adam": lambda model: ADAM(model.parameters(), lr=1e-3),
    "Woodbury": lambda model: Woodbury(model, lr=0.1, mass=MASS),
}


def run(make, *, samples: int = SAMPLES, width: int = WIDTH, target: float = TARGET, most: int = 1000) -> ActionRecord:
    """One optimizer on the first samples, all of them in every step, from the start that all share, down to ``target``."""
    images, labels = (torch.tensor(array[:samples]) for array in dataset("digits"))
    model = fully_connected([64, width, width, 10], "tanh", np.random.SeedSequence(0))
    half_squares = lambda y: 0.5 * (y - labels).square().sum(1)  # noqa: E731
    optimizer = make(model)
    with record_action(model, images, half_squares, optimizer=optimizer, mass=MASS) as action:
        while action.h[-1] > target and len(action) < most:
            optimizer.zero_grad()
            half_squares(model(images)).mean().backward()
            optimizer.step()
    return action


def main(folder: Path) -> None:
    records = {name: run(make) for name, make in OPTIMIZERS.items()}
    frame = pd.concat([record.to_frame().assign(optimizer=name) for name, record in records.items()])
    for name, record in records.items():
        spent, steps = excess_action(record.to_frame()).iloc[-1], record.steps
        print(
            f"{name:17s} {len(record):4d} steps to loss {spent.loss:.3f}, excess {spent.excess:.3f}, "
            f"across {spent.across:.3f}, cosine {steps['alignment'].min():.3f} to {steps['alignment'].max():.3f}, "
            f"|T - V|/(T + V) up to {steps['hamiltonian_relative'].abs().max():.0e}"
        )
    save_figure(action_figure(frame), folder / "action")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/action"))
