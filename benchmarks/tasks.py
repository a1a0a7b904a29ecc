"""What the training benchmark trains: three small tasks of scikit-learn's own data, split once, with their networks.

Nothing is downloaded: MNIST and CIFAR-10 take part where someone brings them (none of scikit-learn's own sets is larger).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SPLIT = 20_251_101  # the rows of training, validation and test are the same for every seed


@dataclass(frozen=True)
class Split:
    """Inputs [rows, …] and targets: classes [rows], or values [rows, 1]."""

    x: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """A network and its data. ``loss`` is "cross_entropy" or "squared" (½‖y − a‖², a mean over samples)."""

    title: str
    build: Callable[[], nn.Module]
    loss: str
    training: Split
    validation: Split
    test: Split
    batch: int = 64

    def model(self, seed: int) -> nn.Module:
        """The network as torch draws it for this seed; the global random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def batches(self, seed: int, steps: int) -> np.ndarray:
        """Row numbers of every step's mini-batch, [steps, batch]: permutations one after the other, by seed alone."""
        generator, rows = np.random.default_rng(np.random.SeedSequence((SPLIT, seed))), len(self.training.x)
        epochs = -(-steps * self.batch // rows)
        order = np.concatenate([generator.permutation(rows) for _ in range(epochs)])
        return order[: steps * self.batch].reshape(steps, self.batch)

    def loss_of(self, y: Tensor, targets: Tensor) -> Tensor:
        """h, the mean over samples."""
        if self.loss == "cross_entropy":
            return nn.functional.cross_entropy(y, targets)
        return 0.5 * (y - targets).square().sum() / len(y)

    def error_of(self, y: Tensor, targets: Tensor) -> float:
        """Share of wrong classes, or root mean squared error in standard deviations of the training targets.

        >>> TASKS["diabetes"]().error_of(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [0.0]]))
        2.12...
        """
        if self.loss == "cross_entropy":
            return (y.argmax(1) != targets).double().mean().item()
        return (y - targets).square().mean().sqrt().item()


def split(x: np.ndarray, targets: np.ndarray, shares: tuple[float, float] = (0.6, 0.2)) -> tuple[Split, Split, Split]:
    """Training, validation and test rows, in float32; numbers as targets are scaled by the training rows' mean and
    deviation.

    >>> [len(part.x) for part in split(np.zeros((10, 2)), np.arange(10))]
    [6, 2, 2]
    """
    order = np.random.default_rng(SPLIT).permutation(len(x))
    first, second = (round(sum(shares[: k + 1]) * len(x)) for k in range(2))
    parts = np.split(order, [first, second])
    if targets.dtype.kind == "f":
        known = targets[parts[0]]
        targets = ((targets - known.mean()) / known.std()).astype(np.float32)[:, None]
    return tuple(Split(torch.tensor(x[rows], dtype=torch.float32), torch.tensor(targets[rows])) for rows in parts)


def digits() -> Task:
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    return Task(
        "digits, MLP 64-128-128-10 tanh, cross-entropy",
        lambda: nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)),
        "cross_entropy",
        *split(x / 16, labels),
    )


def digit_images() -> Task:
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    return Task(
        "digits as 8×8 images, CNN 1-8-16 (3×3, ReLU, 2×2 max pool), linear 64-10, cross-entropy",
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        ),
        "cross_entropy",
        *split((x / 16).reshape(-1, 1, 8, 8), labels),
    )


def diabetes() -> Task:
    from sklearn.datasets import load_diabetes

    x, values = load_diabetes(return_X_y=True)
    return Task(
        "diabetes, MLP 10-64-64-1 tanh, ½ squared error of the standardised target",
        lambda: nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)),
        "squared",
        *split(x * np.sqrt(len(x)), values.astype(float)),  # columns of unit variance
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "images": digit_images, "diabetes": diabetes}
