"""The masses of a parameter group: which layers they are about, in a checkpoint, and at a step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nt_kernel.mass import Mass, Masses, ParameterMass, RowColumnMass, resolve_mass
from optim.options.second_moment import SecondMomentMass

GroupMass = Mass | SecondMomentMass
Layers = Mapping[str, Sequence[str]]  # {layer: full names of its parameters}


def mass_of_layers(mass: GroupMass, layers: Layers, chosen: Sequence[str]) -> GroupMass:
    """What ``mass`` says of the layers ``chosen``, as a mass of these alone; a copy, checked.

    Raises what :func:`nt_kernel.mass.resolve_mass` raises for a mass that is none of the model's.

    >>> layers = {"0": ("0.weight", "0.bias"), "2": ("2.weight",)}
    >>> mass_of_layers([1.0, 0.1], layers, ["2"]), mass_of_layers({"0.bias": 3.0, "2": 0.5}, layers, ["0"])
    ([0.1], {'0.bias': 3.0})
    """
    if isinstance(mass, SecondMomentMass):
        return mass
    resolve_mass(mass, layers)
    if isinstance(mass, Mapping):
        known = {*chosen, *(p for layer in chosen for p in layers[layer])}
        return {name: _copied(value) for name, value in mass.items() if name in known}
    if isinstance(mass, Tensor):
        mass = mass.tolist()
    if isinstance(mass, Sequence):
        return [value for value, layer in zip(mass, layers, strict=True) if layer in chosen]
    return mass


def current_masses(
    mass: GroupMass, layers: Layers, params: Mapping[str, Tensor], moments: Mapping[str, tuple[Tensor, int]]
) -> Masses:
    """D by parameter name for the ``layers`` of a group; ``moments`` {name: (v, t)} is for a :class:`SecondMomentMass`.

    >>> current_masses(SecondMomentMass(eps=0.5), {".": ("w",)}, {"w": torch.ones(1)}, {"w": (torch.tensor([0.004]), 4)})
    {'w': tensor([1.5...])}
    """
    if isinstance(mass, SecondMomentMass):
        names = [name for own in layers.values() for name in own]
        return {n: mass.diagonal(*moments[n]) if n in moments else mass.unseen(params[n]) for n in names}
    return resolve_mass(mass, layers, {name: params[name].shape for own in layers.values() for name in own})


def damped(mass: ParameterMass, damping: float) -> ParameterMass:
    """damping·D.

    >>> damped(0.5, 4.0)
    2.0
    """
    if damping == 1:
        return mass
    return RowColumnMass(mass.row * damping, mass.column) if isinstance(mass, RowColumnMass) else mass * damping


def saved_mass(mass: GroupMass) -> GroupMass | dict:
    """``mass`` in numbers, lists, dicts and tensors, which ``torch.load(weights_only=True)`` reads; see :func:`loaded_mass`.

    >>> saved_mass(SecondMomentMass())
    {'beta2': 0.999, 'eps': 1e-08, 'scale': 1.0}
    """
    if isinstance(mass, SecondMomentMass):
        return vars(mass).copy()
    if isinstance(mass, Mapping):
        return {
            name: {side: getattr(value, side).tolist() for side in ("row", "column")}
            if isinstance(value, RowColumnMass)
            else value
            for name, value in mass.items()
        }
    return mass


def loaded_mass(saved: GroupMass | dict) -> GroupMass:
    """The mass that :func:`saved_mass` wrote down; a mass stays what it is.

    >>> loaded_mass({"w": {"row": [1.0], "column": [2.0, 3.0]}})["w"].column
    tensor([2., 3.], dtype=torch.float64)
    """
    if not isinstance(saved, Mapping):
        return saved
    if set(saved) == set(vars(SecondMomentMass())):
        return SecondMomentMass(**saved)
    return {name: _read(value) for name, value in saved.items()}


def _read(value):
    if not isinstance(value, Mapping):
        return value
    return RowColumnMass(*(torch.tensor(value[side], dtype=torch.float64) for side in ("row", "column")))


def _copied(value: ParameterMass) -> ParameterMass:
    if isinstance(value, RowColumnMass):
        return RowColumnMass(value.row.detach().clone(), value.column.detach().clone())
    return value.detach().clone() if isinstance(value, Tensor) else value
