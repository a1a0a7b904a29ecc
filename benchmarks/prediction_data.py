"""Small studies that twins are trained for: four data sets that come with scikit-learn, a tanh network each."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from stability.replacement import Replacement

DATASETS = ("digits", "wine", "breast cancer", "diabetes")


@lru_cache
def dataset(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, d] of mean square norm 8, targets [rows, p] one-hot, or one standardised number (diabetes)."""
    from sklearn import datasets

    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; write one of {', '.join(DATASETS)}")
    inputs, answers = getattr(datasets, f"load_{name.replace(' ', '_')}")(return_X_y=True)
    if name != "digits":
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    inputs = inputs * np.sqrt(8 / np.square(inputs).sum(1).mean())
    if name == "diabetes":
        return inputs, ((answers - answers.mean()) / answers.std())[:, None]
    return inputs, np.eye(answers.max() + 1)[answers]


def draw_study(
    name: str, n: int, twins: int, held_out: int, seed: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, list[Replacement], Tensor | None]:
    """S, ``twins`` replacements (k, z') drawn at random, z' from the rows outside S, and held-out inputs.

    z' are drawn without replacement while there are enough rows, and again from the same rows where there are not.
    """
    inputs, targets = dataset(name)
    draw = np.random.default_rng([seed, n])
    order = draw.permutation(len(inputs))
    own, kept, rest = order[:n], order[n : n + held_out], order[n + held_out :]
    new = np.concatenate([draw.permutation(rest) for _ in range(-(-twins // len(rest)))])[:twins]
    x, a = (torch.tensor(array, dtype=torch.float64, device=device) for array in (inputs, targets))
    zs = [Replacement(int(k), x[j], a[j]) for k, j in zip(draw.integers(0, n, twins), new, strict=True)]
    return x[own], a[own], zs, x[kept] if held_out else None


def network(sizes: tuple[int, ...], seed: int = 0, device: str = "cpu") -> nn.Module:
    """A fully connected tanh network, the same on every call; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*layers[:-1]).double().to(device)
