"""An optimizer made from a model: groups by layer, a record of its training passes, checkpoints and copies."""

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nt_kernel.capture.plan import trainable_layers
from nt_kernel.errors import unknown_name
from optim.options.group_mass import GroupMass, loaded_mass, mass_of_layers, saved_mass
from optim.options.groups import HYPERPARAMETERS, checked_group, layer_groups
from optim.steps.passes import Passes


class ModelOptimizer(torch.optim.Optimizer):
    """``torch.optim.Optimizer`` over the trainable parameters of ``model``; what moves them is up to the subclass.

    ``defaults`` holds the ``HYPERPARAMETERS`` of the default group and any further entries; ``groups`` as for
    :class:`optim.Woodbury`. A group's entry "mass" speaks of its own layers only, "layers" names them. Deep copies and
    pickles carry the model (a copy of it, unless it is copied along) and the attributes named in ``_carried``; the record
    of passes starts empty in them.

    Raises TypeError for anything but a model, ValueError for one without trainable parameters, and what
    :mod:`optim.options.groups` and :mod:`nt_kernel.mass` raise.
    """

    _carried: tuple[str, ...] = ("model", "mass")

    def __init__(self, model: nn.Module, defaults: Mapping, groups: Sequence[Mapping] | None):
        kind = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{kind} takes the model, not its parameters (it needs the forward pass); got {type(model).__name__}"
            )
        layers = trainable_layers(model)
        if not layers:
            raise ValueError("the model has no trainable parameters (all have requires_grad=False)")
        self.model = model
        self.mass = mass_of_layers(defaults["mass"], layers, list(layers))
        defaults = checked_group(defaults, self._auto_lr)
        params, made = dict(model.named_parameters()), []
        for chosen, own, where in layer_groups(groups, list(layers)):
            group = checked_group({**defaults, **own}, self._auto_lr, where)
            own_layers = {layer: layers[layer] for layer in chosen}
            group["mass"] = (
                _checked_mass(own["mass"], own_layers, where)
                if "mass" in own
                else mass_of_layers(self.mass, layers, chosen)
            )
            made.append({"params": [params[n] for own in own_layers.values() for n in own], **group, "layers": chosen})
        super().__init__(made, {**defaults, "mass": self.mass, "layers": []})
        self._start()

    def _auto_lr(self) -> float:
        """What lr="auto" stands for."""
        raise ValueError(f'{type(self).__name__} has no lr="auto"; write a number')

    def _start(self) -> None:
        """What every copy makes for itself."""
        ref = weakref.ref(self)

        def parameters() -> list[Tensor]:
            optimizer = ref()  # a graph that is still held keeps the record, and outlives the optimizer
            return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

        self._passes = Passes(self.model, parameters)

    def close(self) -> None:
        """Stop recording the model's forward passes (the optimizer is done)."""
        self._passes.close()
        self._passes.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the passes behind the gradients that go are forgotten with them."""
        self._passes.clear()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """A group for parameters of the model that became trainable: {"params": […]} or {"layers": patterns}, and its own
        hyperparameters; the others are the constructor's.

        Raises ValueError for parameters that are not the model's, and what construction raises.
        """
        if not hasattr(self, "_passes") or not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # under construction; or torch's words for what is no group
        own = {key: value for key, value in param_group.items() if key not in ("params", "layers")}
        for key in own:
            if key not in HYPERPARAMETERS:
                raise ValueError(unknown_name("key of a group", key, ("params", *HYPERPARAMETERS)))
        params = self._of_layers(param_group) if "params" not in param_group else param_group["params"]
        if isinstance(params, set | frozenset):
            return super().add_param_group(param_group)
        params = [params] if isinstance(params, Tensor) else list(params)
        names = {id(p): name for name, p in self.model.named_parameters()}
        if any(isinstance(p, Tensor) and p.is_leaf and id(p) not in names for p in params):
            raise ValueError(
                f"{type(self).__name__} moves the parameters of its model; a group holds one that is not a parameter of it"
            )
        held = {id(p) for group in self.param_groups for p in group["params"]}
        if all(isinstance(p, Tensor) and id(p) in names and id(p) not in held for p in params):
            layers = _by_layer(params, names)
            group = checked_group({**self.defaults, **self._progress(), **own}, self._auto_lr)
            group["mass"] = _checked_mass(own["mass"], layers) if "mass" in own else self._mass_of_new(layers)
            return super().add_param_group({**group, "params": params, "layers": list(layers)})
        return super().add_param_group({**own, "params": params})

    def _progress(self) -> dict:
        """Entries that a group added later takes over from the first."""
        return {}

    def _of_layers(self, param_group: Mapping) -> list[Tensor]:
        held = {id(p) for group in self.param_groups for p in group["params"]}
        params = dict(self.model.named_parameters())
        layers = {
            layer: [n for n in names if id(params[n]) not in held]
            for layer, names in trainable_layers(self.model).items()
        }
        layers = {layer: names for layer, names in layers.items() if names}
        *_, (chosen, _, _) = layer_groups([{"layers": param_group.get("layers")}], list(layers))
        return [params[n] for layer in chosen for n in layers[layer]]

    def _mass_of_new(self, layers: Mapping[str, Sequence[str]]) -> GroupMass:
        if isinstance(self.mass, list):
            raise ValueError(
                f"mass was given as a list for the layers there were; write the mass of {', '.join(map(repr, layers))} "
                "into the new group"
            )
        if isinstance(self.mass, Mapping):
            known = {*layers, *(name for own in layers.values() for name in own)}
            return {name: value for name, value in self.mass.items() if name in known}
        return self.mass

    def _group_of(self, params: Mapping[str, Tensor]) -> dict[str, dict]:
        """{name: its group} for the trainable ``params`` of the model; ValueError for one that is in none."""
        by_id = {id(p): group for group in self.param_groups for p in group["params"]}
        for name, p in params.items():
            if id(p) not in by_id:
                raise ValueError(
                    f"parameter {name!r} became trainable after {type(self).__name__} was made; "
                    f'add it, add_param_group({{"params": […]}}), or make the optimizer again'
                )
        return {name: by_id[id(p)] for name, p in params.items()}

    def _layers_of(self, group: Mapping) -> dict[str, list[str]]:
        """{layer: names} of the parameters in a group, frozen ones included."""
        return _by_layer(group["params"], {id(p): name for name, p in self.model.named_parameters()})

    def state_dict(self) -> dict:
        """As in torch; masses in numbers, lists and tensors, so that ``torch.load(weights_only=True)`` reads them."""
        saved = super().state_dict()
        groups = [{**group, "mass": saved_mass(group["mass"])} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._carried}}

    def __setstate__(self, state: dict) -> None:
        # load_state_dict comes here with state and groups alone; what the checkpoint does not say of a group stays.
        before = None if "model" in state else self.param_groups
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            for key, value in before[i].items() if before else ():
                group.setdefault(key, value)
            group["mass"] = loaded_mass(group["mass"])
            if before:
                group["layers"] = before[i]["layers"]
        if before is None:
            self._start()


def _by_layer(params: Sequence[Tensor], names: Mapping[int, str]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for p in params:
        if id(p) in names:
            layers.setdefault(names[id(p)].rpartition(".")[0] or ".", []).append(names[id(p)])
    return layers


def _checked_mass(mass: GroupMass, layers: Mapping[str, Sequence[str]], where: str = "") -> GroupMass:
    try:
        return mass_of_layers(mass, layers, list(layers))
    except (ValueError, TypeError) as error:
        raise type(error)(where + str(error)) from None
