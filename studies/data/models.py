"""The networks that a study trains, with an initialisation that no global random state takes part in."""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = {
    "tanh": "Tanh",
    "softplus": "Softplus",
    "gelu": "GELU",
    "silu": "SiLU",
    "sigmoid": "Sigmoid",
    "relu": "ReLU",
}


def fully_connected(
    sizes: list[int], activation: str, stream: np.random.SeedSequence, *, dtype: str = "float64", device: str = "cpu"
) -> "nn.Sequential":
    """``sizes[0]`` - … - ``sizes[-1]`` with the activation between the layers, drawn from ``stream``.

    Weights are normal with variance 1/fan-in, biases zero (LeCun): signals keep their size through tanh layers, and the
    kernel starts ten times further from singular than with ``torch.nn.Linear``'s own draw. They are drawn in float64 on the
    CPU whatever dtype and device are, so that runs on different machines start at the same place up to rounding.

    >>> model = fully_connected([64, 16, 10], "tanh", np.random.SeedSequence(0))
    >>> [tuple(parameter.shape) for parameter in model.parameters()]
    [(16, 64), (16,), (10, 16), (10,)]
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(int(stream.generate_state(1, np.uint64)[0] >> 1))
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=getattr(torch, dtype), device=device)
        drawn = torch.empty(layer.weight.shape, dtype=torch.float64).normal_(std=fan_in**-0.5, generator=generator)
        with torch.no_grad():
            layer.weight.copy_(drawn)
            layer.bias.zero_()
        layers += [layer, getattr(nn, ACTIVATIONS[activation])()]
    return nn.Sequential(*layers[:-1])
