"""Masses: the positive diagonal D of the layer metric, as one number, rows × columns, or one entry per parameter entry."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from nt_kernel.errors import nearest


@dataclass(frozen=True, eq=False)
class RowColumnMass:
    """D = row ⊗ column: the entry W_{o…} of a weight [o, …] has mass row_o·column_{…}; it keeps a factor's structure.

    ``row`` is [o], ``column`` has the weight's remaining shape […] (flattened, ``resolve_mass`` unfolds it); both positive
    and finite.

    >>> RowColumnMass(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])).full((2, 2))
    tensor([[ 1., 10.],
            [ 2., 20.]])
    """

    row: Tensor
    column: Tensor

    def __post_init__(self):
        for side in ("row", "column"):
            _check_entries(getattr(self, side), f"{side} of a RowColumnMass")

    def full(self, shape: Sequence[int]) -> Tensor:
        """All entries, of the weight's shape."""
        return (self.row[:, None] * self.column.flatten()[None, :]).reshape(tuple(shape))


ParameterMass = float | Tensor | RowColumnMass  # of one parameter; a tensor has the parameter's shape
Masses = dict[str, ParameterMass]  # by full parameter name
Mass = float | RowColumnMass | Mapping[str, ParameterMass] | Sequence[float]


def resolve_mass(
    mass: Mass, layers: Mapping[str, Sequence[str]], shapes: Mapping[str, Sequence[int]] | None = None
) -> Masses:
    """The mass of every parameter, ``{full parameter name: μ > 0}``.

    ``layers`` maps each layer to its parameter names, ``shapes`` each parameter to its shape (checked where given).
    ``mass`` is one number for all, a sequence with one number per layer (in the order of ``layers``), or a dict by layer
    or parameter name; a parameter's own entry beats its layer's, and what a dict leaves out has mass 1. A dict entry of
    a *parameter* may also be a tensor of its shape (a full diagonal) or a :class:`RowColumnMass`.

    Raises ValueError for a mass that is not positive and finite, a sequence or tensor of the wrong shape, an unknown name.

    >>> layers = {"0": ("0.weight", "0.bias"), "2": ("2.weight",)}
    >>> resolve_mass([1.0, 0.1], layers)
    {'0.weight': 1.0, '0.bias': 1.0, '2.weight': 0.1}
    >>> resolve_mass({"0": 0.5, "0.bias": 2.0}, layers)
    {'0.weight': 0.5, '0.bias': 2.0, '2.weight': 1.0}
    """
    if isinstance(mass, Mapping):
        known = set(layers).union(*layers.values())
        for name in mass:
            if name not in known:
                close = nearest(name, sorted(known))
                hint = f"did you mean {close!r}?" if close else f"its layers are {', '.join(map(repr, layers))}"
                raise ValueError(f"mass names {name!r}, which is no layer or parameter of this model; {hint}")
        found: Masses = {}
        for layer, names in layers.items():
            whole = _number(mass[layer], layer) if layer in mass and layer not in names else 1.0
            for p in names:
                found[p] = _of_parameter(mass[p], p, shapes) if p in mass else whole
        return found
    if isinstance(mass, RowColumnMass):
        raise TypeError(
            "a RowColumnMass belongs to one weight: write mass={'layer.weight': RowColumnMass(row, column)}"
        )
    if isinstance(mass, str | bytes) or not isinstance(mass, Sequence | Real | Tensor):
        raise TypeError(f"mass must be a number, a list with one number per layer or a dict by name, got {mass!r}")
    if isinstance(mass, Tensor):
        mass = mass.tolist()
    if isinstance(mass, Real):
        return {p: _number(mass) for names in layers.values() for p in names}
    if len(mass) != len(layers):
        raise ValueError(f"mass has {len(mass)} entries, the model has {len(layers)} layers ({', '.join(layers)})")
    return {p: _number(value, layer) for value, (layer, names) in zip(mass, layers.items(), strict=True) for p in names}


def divide_by_mass(g: Tensor, mass: ParameterMass) -> Tensor:
    """D⁻¹g for g [..., *shape of the parameter]; g itself at mass 1.

    >>> divide_by_mass(torch.ones(2, 2), RowColumnMass(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
    tensor([[1.0000, 0.2500],
            [0.5000, 0.1250]])
    """
    if isinstance(mass, RowColumnMass):
        column = mass.column.to(g)
        return g / column / mass.row.to(g).reshape(-1, *[1] * column.dim())
    if isinstance(mass, Tensor):
        return g / mass.to(g)
    return g if mass == 1 else g / mass


def smallest_mass(masses: Masses) -> float:
    """μ, the smallest entry of D.

    >>> smallest_mass({"0.weight": torch.tensor([[2.0, 0.5]]), "0.bias": 1.0})
    0.5
    """

    def least(mass: ParameterMass) -> float:
        if isinstance(mass, RowColumnMass):
            return (mass.row.min() * mass.column.min()).item()
        return mass.min().item() if isinstance(mass, Tensor) else mass

    return min(map(least, masses.values()))


def _of_parameter(value, name: str, shapes: Mapping[str, Sequence[int]] | None) -> ParameterMass:
    shape = tuple(shapes[name]) if shapes is not None else None
    if isinstance(value, RowColumnMass):
        if shape is not None and (
            len(shape) < 2 or len(value.row) != shape[0] or value.column.numel() != math.prod(shape[1:])
        ):
            raise ValueError(
                f"mass of {name!r} has {len(value.row)} rows and {value.column.numel()} columns; "
                f"the parameter has shape {shape}"
            )
        return value if shape is None else RowColumnMass(value.row, value.column.reshape(shape[1:]))
    if isinstance(value, Tensor) and value.dim() > 0:
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(f"mass of {name!r} has shape {tuple(value.shape)}; the parameter has {shape}")
        _check_entries(value, f"mass of {name!r}")
        return value.detach()
    return _number(value, name)


def _check_entries(value, what: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{what} must be a floating-point tensor, got {value!r}")
    bad = ~((value > 0) & value.isfinite())
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{what} must be positive and finite, got {value[first].item()!r} at {first}")


def _number(value, name: str = "") -> float:
    of = f" of {name!r}" if name else ""
    if isinstance(value, RowColumnMass) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"mass{of} must be one number (tensors and RowColumnMass go by parameter name), got {value!r}")
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"mass{of} must be one number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"mass{of} must be positive and finite, got {float(value)!r}")
    return float(value)
