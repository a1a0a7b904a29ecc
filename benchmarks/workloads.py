"""The networks and inputs that are timed. Every input of numbers has norm √8, as in the digits study."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import networks
from studies.data.datasets import dataset
from studies.data.models import fully_connected

VOCABULARY = 100


@dataclass(frozen=True)
class Workload:
    """A fully connected network and where its inputs come from; the last of ``sizes`` is the number of outputs."""

    sizes: tuple[int, ...]
    activation: str
    inputs: str  # "digits" or "random"
    network = "mlp"

    @property
    def outputs(self) -> int:
        return self.sizes[-1]

    def model(self, dtype: str, device: str) -> nn.Module:
        """The network, always with the same initial values."""
        return fully_connected(list(self.sizes), self.activation, np.random.SeedSequence(0), dtype=dtype, device=device)

    def batch(self, n: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
        """(x [n, d], targets [n, C]), always the same; digits have their one-hot labels, cut to the first C.

        >>> x, targets = WORKLOADS["W4"].batch(3, "float64", "cpu")
        >>> x.shape, targets.shape, x.square().sum(1)
        (torch.Size([3, 64]), torch.Size([3, 1]), tensor([8., 8., 8.], dtype=torch.float64))
        """
        generator = np.random.default_rng(0)
        if self.inputs == "digits":
            inputs, labels = dataset("digits")
            rows = generator.permutation(len(inputs))[:n]
            x, targets = inputs[rows], labels[rows, : self.outputs]
        else:
            x = generator.standard_normal((n, self.sizes[0]))
            x *= np.sqrt(8) / np.linalg.norm(x, axis=1, keepdims=True)
            targets = np.eye(self.outputs)[generator.integers(self.outputs, size=n)]
        options = {"dtype": getattr(torch, dtype), "device": device}
        return torch.tensor(x, **options), torch.tensor(targets, **options)

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))} {self.activation}, {self.inputs}"


@dataclass(frozen=True)
class Modern:
    """Any other network, on random inputs of the given shape: normal numbers, or tokens below ``VOCABULARY``."""

    network: str  # what the workers in other environments build: "cnn", "resnet" or "transformer"
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: int
    about: str
    activation: str = "relu"

    def model(self, dtype: str, device: str) -> nn.Module:
        """The network, always with the same values. The transformer stays in training mode (without dropout): in eval
        mode torch takes a fused path that neither hooks nor ``vmap`` follow."""
        with torch.random.fork_rng(devices=[]):  # modules draw their own first values, from the global state
            model = self.build()
        model = networks.draw(model).to(device, getattr(torch, dtype))
        return model if self.network == "transformer" else model.eval()

    def batch(self, n: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
        """(x [n, …], targets [n, C]), always the same."""
        generator = np.random.default_rng(0)
        targets = np.eye(self.outputs)[generator.integers(self.outputs, size=n)]
        if self.network == "transformer":
            x = torch.tensor(generator.integers(VOCABULARY, size=(n, *self.shape)), device=device)
        else:
            x = generator.standard_normal((n, *self.shape))
            x *= np.sqrt(8) / np.linalg.norm(x.reshape(n, -1), axis=1).reshape(n, *(1,) * len(self.shape))
            x = torch.tensor(x, dtype=getattr(torch, dtype), device=device)
        return x, torch.tensor(targets, dtype=getattr(torch, dtype), device=device)

    def __str__(self) -> str:
        return self.about


WORKLOADS: dict[str, Workload | Modern] = {
    "W1": Workload((64, 256, 256, 10), "tanh", "digits"),
    "W2": Workload((784, 512, 512, 10), "relu", "random"),
    "W3": Modern(
        "cnn",
        networks.convolutional,
        (1, 28, 28),
        10,
        "conv 1-16-32 (3×3, padding 1), each with ReLU and 2×2 max pool, linear 1568-10; random 28×28",
    ),
    "W4": Workload((64, 256, 256, 1), "tanh", "digits"),
    "R": Modern(
        "resnet",
        networks.residual,
        (3, 32, 32),
        10,
        "ResNet-8: stem 3-16, one block of each width 16, 32, 64 (stride 2), BatchNorm in eval mode, mean, linear 64-10; "
        "random 3×32×32",
    ),
    "T": Modern(
        "transformer",
        networks.Transformer,
        (32,),
        10,
        "2 × nn.TransformerEncoderLayer(64, 4 heads, 128 hidden, ReLU), embeddings of 100 tokens and 32 positions, mean, "
        "linear 64-10; 32 random tokens",
    ),
}


def export(workload: Workload | Modern, n: int, dtype: str, path: Path) -> Path:
    """Write the network's parameters and buffers and the inputs (``x``) as npz, for a worker in another environment."""
    model, (x, _) = workload.model(dtype, "cpu"), workload.batch(n, dtype, "cpu")
    arrays = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    np.savez(path, **{f"parameters/{name}": a for name, a in arrays.items()}, x=x.numpy())
    return path
