"""What a point trains on: which rows of the data set, which replacements, which initialisation.

Three independent streams come from one seed (``numpy.random.SeedSequence.spawn``): data, initialisation, replacements.
Everything is paired: at every n, mass and width of a seed the subsets are nested, S_6 ⊂ S_12 ⊂ …, the same samples k
are replaced by the same z', and equal widths start from the same parameters. A larger n and more replacements extend
these choices. A smaller smallest n draws the k anew, since all of them must lie below it; S, z' and initialisation stay.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from studies.definition.config import Point, Study

if TYPE_CHECKING:
    from torch import Tensor, nn

# The held-out rows are the same for every seed of every study, so that their numbers compare. Any number would do.
HELD_OUT_ENTROPY = 20_250_601


@dataclass(frozen=True)
class SubsetPlan:
    """Row numbers of the data set. S_n is ``train[:n]``; twin j has ``replacements[j]`` for ``train[replaced[j]]``."""

    train: np.ndarray  # [largest n]
    replaced: np.ndarray  # [R], below the smallest n
    replacements: np.ndarray  # [R]
    held_out: np.ndarray  # [Q]


def subset_plan(
    rows: int,
    sizes: list[int],
    replacements: int,
    held_out: int,
    data: np.random.SeedSequence,
    swaps: np.random.SeedSequence,
) -> SubsetPlan:
    """Choose rows for the subset ``sizes`` and their common ``replacements``; pure, whatever the order of sizes.

    The k are distinct as long as there are enough samples below the smallest n, and then come round again; the z' are
    always distinct, and are in neither the largest subset nor the held-out rows.
    Raises ValueError when ``rows`` are too few.

    >>> plan = subset_plan(100, [6, 12], 4, 20, *np.random.SeedSequence(0).spawn(2))
    >>> len(plan.train), len(set(plan.replaced)), bool(plan.replaced.max() < 6), len(plan.held_out)
    (12, 4, True, 20)
    """
    largest, needed = max(sizes), max(sizes) + replacements + held_out
    if needed > rows:
        most = rows - replacements - held_out
        advice = f"n={most} or less, or fewer held_out" if most > 0 else "fewer replacements or held_out"
        raise ValueError(
            f"the data set has {rows} rows, but n={largest} with {held_out} held-out rows and {replacements} "
            f"replacements needs {needed}; write {advice}"
        )
    shuffled = np.random.default_rng(HELD_OUT_ENTROPY).permutation(rows)
    kept_out, pool = shuffled[:held_out], np.sort(shuffled[held_out:])
    # Subsets grow from the front of the pool and replacements from its back: neither moves when the other grows.
    pool = np.random.default_rng(data).permutation(pool)
    order = np.random.default_rng(swaps).permutation(min(sizes))
    return SubsetPlan(
        train=pool[:largest],
        replaced=np.resize(order, replacements),
        replacements=pool[::-1][:replacements].copy(),
        held_out=np.sort(kept_out),
    )


@dataclass(frozen=True)
class Draw:
    """What one point is trained on. ``plan`` says which rows of the data set these are."""

    model: "nn.Module"
    x: "Tensor"  # [n, d]
    targets: "Tensor"  # [n, p]
    replaced: list[int]  # [R], k
    replacement_x: "Tensor"  # [R, d], the inputs of z'
    replacement_targets: "Tensor"  # [R, p]
    replacement_rows: list[int]  # [R], row numbers of z'
    held_out: "Tensor"  # [Q, d]


def draw(study: Study, point: Point) -> Draw:
    """Data, replacements and initialisation of one point, on the study's device and in its dtype."""
    import torch

    from studies.data.models import fully_connected

    inputs, targets = dataset(study.data.name)
    data, initial, swaps = np.random.SeedSequence(point.seed).spawn(3)
    plan = _plan(study, len(inputs), data, swaps)
    rows = plan.train[: point.n]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=getattr(torch, study.dtype), device=study.device)

    # The initialisation depends on seed and width alone, whatever n and mass are.
    initial = np.random.SeedSequence(initial.entropy, spawn_key=(*initial.spawn_key, point.width))
    sizes = [inputs.shape[1], *[point.width] * study.model.hidden, targets.shape[1]]
    return Draw(
        model=fully_connected(sizes, study.model.activation, initial, dtype=study.dtype, device=study.device),
        x=tensor(inputs[rows]),
        targets=tensor(targets[rows]),
        replaced=plan.replaced.tolist(),
        replacement_x=tensor(inputs[plan.replacements]),
        replacement_targets=tensor(targets[plan.replacements]),
        replacement_rows=plan.replacements.tolist(),
        held_out=tensor(inputs[plan.held_out]),
    )


def check_enough_rows(study: Study) -> None:
    """Raise the ValueError of :func:`subset_plan` before anything is trained."""
    _plan(study, len(dataset(study.data.name)[0]), *np.random.SeedSequence(study.seed).spawn(2))


def _plan(study: Study, rows: int, data: np.random.SeedSequence, swaps: np.random.SeedSequence) -> SubsetPlan:
    return subset_plan(rows, study.grid.n, study.grid.replacements, study.data.held_out, data, swaps)


@lru_cache
def dataset(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, d] and targets [rows, p] in float64, read-only; ``name`` is one that the config allows.

    >>> inputs, targets = dataset("digits")
    >>> inputs.shape, targets.shape, float(np.linalg.norm(inputs[0])) ** 2
    ((1797, 64), (1797, 10), 8.0)
    """
    inputs, targets = {"digits": _digits}[name]()
    for array in (inputs, targets):
        array.setflags(write=False)
    return inputs, targets


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: pixels / 16, then each image scaled to norm √8; labels as one-hot rows."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    return images * (np.sqrt(8) / np.linalg.norm(images, axis=1, keepdims=True)), np.eye(10)[labels]
