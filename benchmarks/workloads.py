"""The networks and inputs that are timed. Every input has norm √8, as in the digits study."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from studies.data import dataset
from studies.models import fully_connected


@dataclass(frozen=True)
class Workload:
    """A fully connected network and where its inputs come from; the last of ``sizes`` is the number of outputs."""

    sizes: tuple[int, ...]
    activation: str
    inputs: str  # "digits" or "random"

    def model(self, dtype: str, device: str) -> nn.Sequential:
        """The network, always with the same initial values."""
        return fully_connected(list(self.sizes), self.activation, np.random.SeedSequence(0), dtype=dtype, device=device)

    def batch(self, n: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
        """(x [n, d], targets [n, C]), always the same; digits have their one-hot labels, cut to the first C.

        >>> x, targets = WORKLOADS["W4"].batch(3, "float64", "cpu")
        >>> x.shape, targets.shape, x.square().sum(1)
        (torch.Size([3, 64]), torch.Size([3, 1]), tensor([8., 8., 8.], dtype=torch.float64))
        """
        draw, outputs = np.random.default_rng(0), self.sizes[-1]
        if self.inputs == "digits":
            inputs, labels = dataset("digits")
            rows = draw.permutation(len(inputs))[:n]
            x, targets = inputs[rows], labels[rows, :outputs]
        else:
            x = draw.standard_normal((n, self.sizes[0]))
            x *= np.sqrt(8) / np.linalg.norm(x, axis=1, keepdims=True)
            targets = np.eye(outputs)[draw.integers(outputs, size=n)]
        options = {"dtype": getattr(torch, dtype), "device": device}
        return torch.tensor(x, **options), torch.tensor(targets, **options)

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))} {self.activation}, {self.inputs}"


# W3 is kept for a convolutional network.
WORKLOADS = {
    "W1": Workload((64, 256, 256, 10), "tanh", "digits"),
    "W2": Workload((784, 512, 512, 10), "relu", "random"),
    "W4": Workload((64, 256, 256, 1), "tanh", "digits"),
}
