"""Masses: the positive diagonal D of the layer metric, one number per parameter tensor."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch

from nt_kernel.errors import nearest

Mass = float | Mapping[str, float] | Sequence[float]


def resolve_mass(mass: Mass, layers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The mass of every parameter, ``{full parameter name: μ > 0}``.

    ``layers`` maps each layer to its parameter names. ``mass`` is one number for all, a sequence with one number per
    layer (in the order of ``layers``), or a dict by layer or parameter name; a parameter's own entry beats its
    layer's, and what a dict leaves out has mass 1.

    Raises ValueError for a mass that is not positive and finite, a sequence of the wrong length, an unknown name.

    >>> layers = {"0": ("0.weight", "0.bias"), "2": ("2.weight",)}
    >>> resolve_mass([1.0, 0.1], layers)
    {'0.weight': 1.0, '0.bias': 1.0, '2.weight': 0.1}
    >>> resolve_mass({"0": 0.5, "0.bias": 2.0}, layers)
    {'0.weight': 0.5, '0.bias': 2.0, '2.weight': 1.0}
    """
    if isinstance(mass, Mapping):
        by_name = {name: _positive(value, name) for name, value in mass.items()}
        known = set(layers).union(*layers.values())
        for name in by_name:
            if name not in known:
                close = nearest(name, sorted(known))
                hint = f"did you mean {close!r}?" if close else f"its layers are {', '.join(map(repr, layers))}"
                raise ValueError(f"mass names {name!r}, which is no layer or parameter of this model; {hint}")
        return {p: by_name.get(p, by_name.get(layer, 1.0)) for layer, names in layers.items() for p in names}
    if isinstance(mass, str | bytes) or not isinstance(mass, Sequence | Real | torch.Tensor):
        raise TypeError(f"mass must be a number, a list with one number per layer or a dict by name, got {mass!r}")
    if isinstance(mass, torch.Tensor):
        mass = mass.tolist()
    if isinstance(mass, Real):
        return {p: _positive(mass) for names in layers.values() for p in names}
    if len(mass) != len(layers):
        raise ValueError(f"mass has {len(mass)} entries, the model has {len(layers)} layers ({', '.join(layers)})")
    return {
        p: _positive(value, layer) for value, (layer, names) in zip(mass, layers.items(), strict=True) for p in names
    }


def _positive(value, name: str = "") -> float:
    of = f" of {name!r}" if name else ""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"mass{of} must be one number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"mass{of} must be positive and finite, got {float(value)!r}")
    return float(value)
