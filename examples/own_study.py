"""A study of one's own from Python, in ten lines: own data, own network, two optimizers, results as pandas frames.

``python -m examples.own_study`` trains a few small twins (half a minute) and prints how far they moved apart.
"""

import sys
from pathlib import Path

import numpy as np
from torch import nn

from studies import Study, run_study

TEXT = """
kind = "loops"
optimizer = "adam"
lr = 0.01
steps = 30
[grid]
n = [6]
width = [8]
optimizer = ["adam", "woodbury"]
seeds = 2
replacements = 2
[data]
name = "examples.own_study:circle"
held_out = 20
[model]
architecture = "examples.own_study:network"
"""


def circle(rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Points of the plane, and whether they lie in a circle of radius 1.2."""
    points = np.random.default_rng(0).standard_normal((rows, 2))
    return points, (np.linalg.norm(points, axis=1) < 1.2).astype(int)


def network(inputs: int, outputs: int, width: int) -> nn.Module:
    """Any module will do; the study hands over those of its numbers that the factory asks for."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "own.toml").write_text(TEXT)
    study = Study.from_toml(out / "own.toml", ["workers=1"])
    frames = run_study(study, out / "results", progress=False)
    print(frames.summary.groupby("optimizer")[["measured_replaced", "measured_others", "T5", "gap"]].median())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/own"))
