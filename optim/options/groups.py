"""Parameter groups by layer: ``groups=[{"layers": ["0", "blocks.*"], "lr": …}]``."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from nt_kernel.errors import nearest, unknown_name
from optim.options.damping import damping_at
from optim.steps.step_limit import check_lr
from optim.steps.update import Update

HYPERPARAMETERS = ("lr", "mass", "momentum", "dampening", "nesterov", "weight_decay", "decay", "damping")


def layer_groups(groups: Sequence[Mapping] | None, layers: Sequence[str]) -> list[tuple[list[str], dict, str]]:
    """[(layers, own hyperparameters, "groups[i]: " for messages)], the default group first, where it has a layer left.

    A group names its layers by ``fnmatch`` patterns under "layers"; its other keys are ``HYPERPARAMETERS``. Every pattern
    must match a layer and no layer may be in two groups: ValueError or TypeError otherwise, with the nearest valid name.

    >>> layer_groups([{"layers": ["blocks.*"], "lr": 0.1}], ["in", "blocks.0", "blocks.1", "out"])
    [(['in', 'out'], {}, ''), (['blocks.0', 'blocks.1'], {'lr': 0.1}, 'groups[0]: ')]
    """
    if groups is None:
        groups = []
    if not isinstance(groups, Sequence) or isinstance(groups, str | bytes):
        raise TypeError(f'groups must be a list of dicts like {{"layers": ["0"], "lr": 0.1}}, got {groups!r}')
    taken: dict[str, int] = {}
    found = []
    for i, group in enumerate(groups):
        own = _matched(group, layers, f"groups[{i}]")
        for layer in own:
            if layer in taken:
                raise ValueError(f"layer {layer!r} is in two groups, groups[{taken[layer]}] and groups[{i}]")
            taken[layer] = i
        found.append((own, {key: value for key, value in group.items() if key != "layers"}, f"groups[{i}]: "))
    rest = [layer for layer in layers if layer not in taken]
    return [(rest, {}, ""), *found] if rest else found


def checked_group(group: Mapping, auto: Callable[[], float], where: str = "") -> dict:
    """The group, lr="auto" replaced by ``auto()``; raises ValueError or TypeError for a bad hyperparameter (mass apart)."""
    try:
        check_lr(group["lr"])
        group = {**group, "lr": auto() if group["lr"] == "auto" else group["lr"]}
        update_of(group)
        damping_at(group["damping"], 0)
    except (ValueError, TypeError) as error:
        raise type(error)(where + str(error)) from None
    return group


def update_of(group: Mapping) -> Update:
    """The :class:`Update` of a group's entries as they stand."""
    keys = ("momentum", "dampening", "nesterov", "weight_decay", "decay")
    return Update(float(group["lr"]), **{key: group[key] for key in keys})


def _matched(group: Mapping, layers: Sequence[str], where: str) -> list[str]:
    if not isinstance(group, Mapping):
        raise TypeError(f'{where} must be a dict like {{"layers": ["0"], "lr": 0.1}}, got {group!r}')
    for key in group:
        if key not in ("layers", *HYPERPARAMETERS):
            raise ValueError(f"{where}: " + unknown_name("key", key, ("layers", *HYPERPARAMETERS)))
    patterns = group.get("layers")
    if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not patterns:
        raise TypeError(f'{where} needs its layers, a list of names or patterns under "layers", got {patterns!r}')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{where}: layers are named by strings, got {pattern!r}")
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(f"{where}: {pattern!r} matches no trainable layer of the model; {_hint(pattern, layers)}")
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def _hint(pattern: str, layers: Sequence[str]) -> str:
    if any(layer.startswith(pattern + ".") for layer in layers):
        return f"for all layers below it write {pattern + '.*'!r}"
    close = nearest(pattern, layers)
    if close is None and (parameter := next((x for x in layers if pattern.startswith(x + ".")), None)):
        return f"groups go by layer: did you mean {parameter!r}?"
    return f"did you mean {close!r}?" if close else f"its layers are {', '.join(map(repr, layers))}"
