"""What a point trains on: which rows of the data set, which replacements, which initialisation.

Three independent streams come from one seed (``numpy.random.SeedSequence.spawn``): data, initialisation, replacements.
Everything is paired: at every n, mass and width of a seed the subsets are nested, S_6 ⊂ S_12 ⊂ …, the same samples k
are replaced by the same z', and equal widths start from the same parameters. A larger n and more replacements extend
these choices. A smaller smallest n draws the k anew, since all of them must lie below it; S, z' and initialisation stay.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from studies.data.datasets import Loaded, load, with_label_noise
from studies.data.models import convolutional, fully_connected, own_model
from studies.definition.points import Point
from studies.definition.training import TrainingStudy

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
    x: "Tensor"  # [n, …]
    targets: "Tensor"  # [n, p]
    replaced: list[int]  # [R], k
    replacement_x: "Tensor"  # [R, …], the inputs of z'
    replacement_targets: "Tensor"  # [R, p]
    replacement_rows: list[int]  # [R], row numbers of z'
    held_out: "Tensor"  # [Q, …]
    held_out_targets: "Tensor"  # [Q, p], without label noise
    classes: int  # 0 for regression


def draw(study: TrainingStudy, point: Point) -> Draw:
    """Data, replacements and initialisation of one point, on the study's device and in its dtype."""
    import torch

    loaded = load(study.data)
    data, initial, swaps, noise = np.random.SeedSequence(point.seed).spawn(4)
    plan = _plan(study, len(loaded.inputs), data, swaps)
    rows = plan.train[: point.n]
    targets = with_label_noise(loaded.targets, loaded.classes, study.data.label_noise, noise)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=getattr(torch, study.dtype), device=study.device)

    # The initialisation depends on seed and width alone, whatever n and mass are.
    initial = np.random.SeedSequence(initial.entropy, spawn_key=(*initial.spawn_key, point.width))
    inputs = shaped(study, loaded)
    return Draw(
        model=network(study, point.width, inputs.shape[1:], targets.shape[1], initial),
        x=tensor(inputs[rows]),
        targets=tensor(targets[rows]),
        replaced=plan.replaced.tolist(),
        replacement_x=tensor(inputs[plan.replacements]),
        replacement_targets=tensor(targets[plan.replacements]),
        replacement_rows=plan.replacements.tolist(),
        held_out=tensor(inputs[plan.held_out]),
        held_out_targets=tensor(loaded.targets[plan.held_out]),
        classes=loaded.classes,
    )


def shaped(study: TrainingStudy, loaded: Loaded) -> np.ndarray:
    """The inputs as the network takes them: rows for "mlp", images for "cnn", as they are for a model of the user's own."""
    inputs = loaded.inputs
    if study.model.architecture == "mlp":
        return inputs.reshape(len(inputs), -1)
    if study.model.architecture != "cnn":
        return inputs
    shape = loaded.image or (inputs.shape[1:] if inputs.ndim == 4 else None)
    if shape is None:
        raise ValueError(
            f"model.architecture = cnn takes images, rows of data.name = {study.data.name} are {inputs.shape[1:]}; expected "
            "[rows, channels, height, width]; write model.architecture=mlp"
        )
    return inputs.reshape(len(inputs), *shape)


def network(
    study: TrainingStudy, width: int, inputs: tuple[int, ...], outputs: int, stream: np.random.SeedSequence
) -> "nn.Module":
    """The study's network at its start."""
    model, place = study.model, {"dtype": study.dtype, "device": study.device}
    if model.architecture == "mlp":
        return fully_connected([inputs[0], *[width] * model.hidden, outputs], model.activation, stream, **place)
    if model.architecture == "cnn":
        return convolutional(inputs, width, model.hidden, outputs, model.activation, stream, **place)
    offered = {"inputs": inputs[0] if len(inputs) == 1 else inputs, "outputs": outputs, "width": width}
    offered |= {"hidden": model.hidden, "activation": model.activation}
    return own_model(model.architecture, offered, model.arguments, stream, **place)


def check_data(study: TrainingStudy) -> None:
    """Raise what is wrong with data and model before anything is trained: too few rows, a model that does not fit."""
    seen = set()
    for point in study.points():
        at = study.at(point)
        settings = json.dumps([at.data.model_dump(), at.model.model_dump(), point.width], sort_keys=True, default=str)
        if settings in seen:
            continue
        seen.add(settings)
        loaded = load(at.data)
        _plan(at, len(loaded.inputs), *np.random.SeedSequence(study.seed).spawn(2))
        inputs = shaped(at, loaded)
        if ":" in at.model.architecture:
            network(at, point.width, inputs.shape[1:], loaded.targets.shape[1], np.random.SeedSequence(0))


def _plan(study: TrainingStudy, rows: int, data: np.random.SeedSequence, swaps: np.random.SeedSequence) -> SubsetPlan:
    return subset_plan(rows, study.grid.n, study.grid.replacements, study.data.held_out, data, swaps)
