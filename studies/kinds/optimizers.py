"""Optimizers by name: this project's, any of torch.optim, or the user's own class; with their arguments from the study."""

import importlib
import re
from typing import TYPE_CHECKING, Any

from studies.definition.config_text import nearest
from studies.definition.fields import IMPORTABLE

if TYPE_CHECKING:
    import torch
    from torch import nn

OURS = {"woodbury": "Woodbury", "rlo": "RLO", "rlolambda": "RLOLambda", "rlolifted": "RLOLifted"}
# torch.optim's, known without importing torch; a newer one is found by its full name, "torch.optim:Name".
TORCH = (
    "sgd adam adamw adamax nadam radam adagrad adadelta rmsprop rprop asgd lbfgs adafactor muon".split()  # noqa: SIM905
)


def check_name(name: str, tables: dict[str, dict]) -> None:
    """ValueError for a name that is neither an optimizer nor one of the study's [optimizers.NAME] tables."""
    wanted = tables.get(name, {}).get("class", name)
    if wanted.lower() in (*OURS, *TORCH) or re.fullmatch(IMPORTABLE, wanted):
        return
    known = [*tables, *OURS, *TORCH]
    guess = nearest(name, known)
    raise ValueError(
        f"should be one of {', '.join(known)}, package.module:Class, or a table [optimizers.{name}] with a class"
        + (f", did you mean {guess}?" if guess else "")
    )


def make_optimizer(
    name: str,
    tables: dict[str, dict],
    model: "nn.Module",
    *,
    lr: float | str,
    shared: dict[str, Any],
    metric: dict[str, Any],
) -> "torch.optim.Optimizer":
    """The optimizer ``name`` of ``model``.

    A table [optimizers.NAME] of the study gives its ``class`` and arguments, ``lr`` among them; ``shared`` (momentum, weight
    decay) are taken by every class that knows them. ``metric`` is for Woodbury: mass, output metric, scale.
    Raises ValueError for a class or an argument that there is not.
    """
    options = dict(tables.get(name, {}))
    wanted = options.pop("class", name)
    found, ours = _class(wanted)
    options = {"lr": options.pop("lr", lr)} | shared | (metric if ours == "Woodbury" else {}) | options
    if options["lr"] == "auto" and ours != "Woodbury":
        raise ValueError(f"lr = auto is a step of the metric and goes with woodbury; write a number for {name}")
    try:
        return found(model if ours == "Woodbury" else model.parameters(), **options)
    except TypeError as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"optimizer {name} ({found.__name__}) does not take {given}: {error}") from error


def _class(wanted: str) -> tuple[type, str]:
    if wanted.lower() in OURS:
        import optim

        return getattr(optim, OURS[wanted.lower()]), OURS[wanted.lower()]
    module, colon, attribute = wanted.partition(":")
    if not colon:
        import torch

        matching = [known for known in dir(torch.optim) if known.lower() == wanted.lower()]
        if not matching:
            raise ValueError(f"optimizer {wanted}: torch {torch.__version__} has no such class in torch.optim")
        return getattr(torch.optim, matching[0]), ""
    try:
        return getattr(importlib.import_module(module), attribute), ""
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer {wanted} cannot be imported: {error}") from error
