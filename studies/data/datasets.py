"""Data sets by name: scikit-learn's, embedded or downloaded where the study allows it, files, and the user's functions.

Everything comes out as inputs [rows, …] and targets [rows, p] in float64, read-only. Whole numbers and words are classes,
and become one-hot rows; other numbers are regression targets. ``Data.inputs`` says what is done to the inputs:

norm          every row scaled to norm √8 (pixels divided by their largest value first)
standardised  every column to mean 0 and variance 1, then all by √(8/d): rows have norm √8 on average
raw           as they are
auto          digits and the downloaded images: norm; scikit-learn's other sets: standardised; the user's own: raw

Regression targets of scikit-learn's sets are standardised too, column by column: their units (a disease score of 25 to 346)
would set the scale of every bound.
"""

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from studies.data.loaders import as_array, from_function, from_sklearn
from studies.definition.digest import digest
from studies.definition.imported import imported
from studies.definition.training import FILES, Data

NORM = np.sqrt(8)
IMAGES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "olivetti_faces": (1, 64, 64)}
OPENML = {"mnist": ("mnist_784", 1, "12 MB"), "cifar10": ("CIFAR_10", 1, "140 MB")}


@dataclass(frozen=True)
class Loaded:
    """``classes``: their number, 0 for regression. ``image``: (channels, height, width) of a row, where it is one."""

    inputs: np.ndarray  # [rows, …]
    targets: np.ndarray  # [rows, p]
    classes: int
    image: tuple[int, ...] | None = None


def dataset(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, d] and targets [rows, p] of a set by its name alone.

    >>> inputs, targets = dataset("digits")
    >>> inputs.shape, targets.shape, float(np.linalg.norm(inputs[0])) ** 2
    ((1797, 64), (1797, 10), 8.0)
    """
    loaded = load(Data(name=name))
    return loaded.inputs, loaded.targets


def load(data: Data) -> Loaded:
    """The data set that a study names; kept in memory. Raises ValueError that says what is wrong with it and what to write.

    >>> diabetes = load(Data(name="diabetes"))
    >>> diabetes.inputs.shape, diabetes.targets.shape, diabetes.classes
    ((442, 10), (442, 1), 0)
    """
    relevant = data.model_dump(include={"name", "target", "inputs", "download", "arguments"})
    source: Any = digest(data.name) if data.name.endswith(FILES) else None
    if ":" in data.name:
        source = imported(data.name, "data.name")  # another one after importlib.reload
    read = _load if isinstance(source, Hashable) else _load.__wrapped__
    return read(json.dumps(relevant, sort_keys=True), source)


def outputs_of(data: Data) -> int:
    """p, the number of outputs that a network needs for this data set."""
    return load(data).targets.shape[1]


@lru_cache(maxsize=4)
def _load(text: str, source: Any) -> Loaded:
    """``source``: what the numbers come from beside the study's own words, the digest of the file or the user's function."""
    data = Data(**json.loads(text))
    x, y, ours = _raw(data, source)
    if data.name.endswith(FILES) and digest(data.name) != source:
        raise ValueError(f"data.name = {data.name} was changed while it was read; start again")
    x, y = as_array(x, "inputs", data), as_array(y, "targets", data)
    if x.ndim < 2 or y.ndim not in (1, 2) or len(x) != len(y) or x.size == 0 or y.size == 0:
        raise ValueError(
            f"data.name = {data.name}: inputs {x.shape} and targets {y.shape}; expected [rows, …] and [rows] or [rows, p]"
        )
    if x.dtype.kind not in "biuf":
        raise ValueError(f"data.name = {data.name}: inputs are {x.dtype}; expected numbers")
    inputs, (targets, classes) = x.astype(np.float64), _targets(y, data.name, standardise=ours)
    treatment = data.inputs
    if treatment == "auto":
        treatment = "raw" if not ours else "norm" if data.name in IMAGES else "standardised"
    if treatment == "norm" and data.name in IMAGES:
        inputs = inputs / (16 if data.name == "digits" else max(float(inputs.max()), 1.0))
    inputs = TREATMENTS[treatment](inputs)
    for what, array in (("inputs", inputs), ("targets", targets)):
        if not np.isfinite(array).all():
            rows = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
            raise ValueError(
                f"data.name = {data.name}: {what} that are no finite number in {len(rows)} rows, the first {rows[0]}"
            )
        array.setflags(write=False)
    return Loaded(inputs, targets, classes, IMAGES.get(data.name))


def _targets(y: np.ndarray, name: str, *, standardise: bool) -> tuple[np.ndarray, int]:
    """[rows, p] and the number of classes, 0 for regression."""
    if y.dtype.kind not in ("biufOSU" if y.ndim == 1 else "biuf"):
        expected = "numbers or words" if y.ndim == 1 else "numbers, or one column of words"
        raise ValueError(f"data.name = {name}: targets {y.shape} are {y.dtype}; expected {expected}")
    if y.dtype.kind != "f" and y.ndim == 1:
        names, labels = np.unique(y.astype(str) if y.dtype.kind == "O" else y, return_inverse=True)
        return np.eye(len(names))[labels], len(names)
    targets = y.astype(np.float64).reshape(len(y), -1)
    if standardise:
        targets = (targets - targets.mean(axis=0)) / targets.std(axis=0)
    return targets, 0


def unit_rows(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x.reshape(len(x), -1), axis=1).reshape(-1, *[1] * (x.ndim - 1))
    return x * (NORM / np.where(norm > 0, norm, 1.0))


def standardised(x: np.ndarray) -> np.ndarray:
    deviation = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0) * (NORM / np.sqrt(x[0].size))


TREATMENTS = {"norm": unit_rows, "standardised": standardised, "raw": lambda x: x}


def _raw(data: Data, source: Any) -> tuple[Any, Any, bool]:
    """(x, y, whether it is a set that we know the scale of)."""
    if data.name.endswith(FILES):
        from studies.data.files import read_file

        return *read_file(data.name, data.target), False
    if ":" in data.name:
        return *from_function(source, data), False
    if data.name in OPENML:
        from studies.data.download import openml

        return *openml(data.name, *OPENML[data.name], allowed=data.download), True
    return *from_sklearn(data), True


def with_label_noise(targets: np.ndarray, classes: int, level: float, stream: np.random.SeedSequence) -> np.ndarray:
    """Wrong labels: each row with probability ``level`` another class, all others equally likely; regression targets get
    normal noise of ``level`` standard deviations. Nested: a row that is wrong at one level is wrong at every higher one.

    >>> clean = np.eye(3)[[0, 1, 2, 0]]
    >>> noisy = with_label_noise(clean, 3, 1.0, np.random.SeedSequence(0))
    >>> bool((noisy.argmax(1) != clean.argmax(1)).all())
    True
    """
    if level == 0:
        return targets
    generator = np.random.default_rng(stream)
    if not classes:
        return targets + level * targets.std(axis=0) * generator.standard_normal(targets.shape)
    wrong = generator.random(len(targets)) < level
    shift = generator.integers(1, max(classes, 2), len(targets))
    return np.eye(classes)[(targets.argmax(1) + np.where(wrong, shift, 0)) % classes]
