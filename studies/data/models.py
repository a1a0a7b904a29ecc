"""The networks that a study trains, with an initialisation that no global random state takes part in."""

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.definition.imported import called, imported, signature_of

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


def convolutional(
    image: tuple[int, ...],
    channels: int,
    layers: int,
    outputs: int,
    activation: str,
    stream: np.random.SeedSequence,
    *,
    dtype: str = "float64",
    device: str = "cpu",
) -> "nn.Sequential":
    """``layers`` convolutions 3 × 3 of ``channels`` channels, all but the first with stride 2, then one linear layer.

    Initialised as :func:`fully_connected`: normal weights of variance 1/fan-in, zero biases.

    >>> model = convolutional((1, 8, 8), 4, 2, 10, "tanh", np.random.SeedSequence(0))
    >>> [tuple(parameter.shape) for parameter in model.parameters()]
    [(4, 1, 3, 3), (4,), (4, 4, 3, 3), (4,), (10, 64), (10,)]
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(int(stream.generate_state(1, np.uint64)[0] >> 1))
    inside, height, width = image
    modules: list[nn.Module] = []
    for index in range(layers):
        stride = 1 if index == 0 else 2
        made = {"stride": stride, "padding": 1, "dtype": getattr(torch, dtype), "device": device}
        modules += [nn.utils.skip_init(nn.Conv2d, inside, channels, 3, **made), getattr(nn, ACTIVATIONS[activation])()]
        inside, height, width = channels, (height - 1) // stride + 1, (width - 1) // stride + 1
    last = nn.utils.skip_init(nn.Linear, inside * height * width, outputs, dtype=getattr(torch, dtype), device=device)
    model = nn.Sequential(*modules, nn.Flatten(), last)
    with torch.no_grad():
        for layer in model:
            if hasattr(layer, "weight"):
                drawn = torch.empty(layer.weight.shape, dtype=torch.float64)
                layer.weight.copy_(drawn.normal_(std=drawn[0].numel() ** -0.5, generator=generator))
                layer.bias.zero_()
    return model


def own_model(
    name: str,
    offered: dict[str, Any],
    arguments: dict[str, Any],
    stream: np.random.SeedSequence,
    *,
    dtype: str,
    device: str,
) -> "nn.Module":
    """The module of a user's factory "package.module:factory".

    The factory gets those of ``offered`` (inputs, outputs, width, hidden, activation, seed) that its signature names, and the
    ``arguments`` of the study. torch's random state is seeded for the call from ``stream``, and put back after it.
    Raises ValueError, with what the factory raised as its cause.
    """
    import torch
    from torch import nn

    key = "model.architecture"
    factory = imported(name, key)
    seed = int(stream.generate_state(1, np.uint64)[0] >> 1)
    signature = signature_of(factory, name, key)
    parameters = signature.parameters if signature else {}
    any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    asked = {of: value for of, value in (offered | {"seed": seed}).items() if of in parameters or any_name}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = called(factory, asked | arguments, name, key)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.architecture = {name} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.to(dtype=getattr(torch, dtype), device=device)
