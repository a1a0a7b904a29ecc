"""Optimizers by name: this project's, any of torch.optim, or the user's own class; with their arguments from the study."""

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from studies.definition.config_text import nearest
from studies.definition.fields import IMPORTABLE
from studies.definition.imported import imported

if TYPE_CHECKING:
    import torch
    from torch import nn

OURS = {"woodbury": "Woodbury", "rlo": "RLO", "rlolambda": "RLOLambda", "rlolifted": "RLOLifted"}
# torch.optim's, known without importing torch; a newer one is found by its full name, "torch.optim:Name".
TORCH = (
    "sgd adam adamw adamax nadam radam adagrad adadelta rmsprop rprop asgd lbfgs adafactor muon".split()  # noqa: SIM905
)
# Names for a class with arguments, as a study's own table [optimizers.NAME] would give them; such a table goes first.
PRESETS: dict[str, dict[str, Any]] = {
    "momentum": {"class": "SGD", "momentum": 0.9},
    "rlo-lambda": {"class": "rlolambda"},
    "rlo-lifted": {"class": "rlolifted"},
    "lion": {"class": "rlolambda", "memory": "lion", "direction": "sign", "normalize": False},
}


def check_name(name: str, tables: Mapping[str, dict]) -> None:
    """ValueError for a name that is neither an optimizer nor one of the study's [optimizers.NAME] tables; one without a class
    adds to the preset or the optimizer of its name.

    >>> check_name("lion", {})
    >>> check_name("momentum", {"momentum": {"nesterov": True}})
    """
    wanted = (PRESETS.get(name, {}) | tables.get(name, {})).get("class", name)
    wanted_class = wanted.lower() if isinstance(wanted, str) else None
    if wanted_class in (*OURS, *TORCH) or (wanted_class and re.fullmatch(IMPORTABLE, wanted)):
        return
    if "class" in tables.get(name, {}):
        guess = nearest(wanted, [*OURS, *TORCH]) if wanted_class else None
        raise ValueError(
            f"is the table [optimizers.{name}], whose class = {wanted!r} should be one of {', '.join([*OURS, *TORCH])}, or "
            "package.module:Class" + (f", did you mean {guess}?" if guess else "")
        )
    known = [of for of in dict.fromkeys([*tables, *OURS, *PRESETS, *TORCH]) if of != name]
    guess = nearest(name, known)
    raise ValueError(
        f"should be one of {', '.join(known)}, package.module:Class, or a table [optimizers.{name}] with a class"
        + (f", did you mean {guess}?" if guess else "")
    )


def make_optimizer(
    name: str,
    model: "nn.Module",
    *,
    lr: float | str,
    tables: Mapping[str, dict] | None = None,
    shared: Mapping[str, Any] | None = None,
    ours: Mapping[str, Mapping[str, Any]] | None = None,
) -> "torch.optim.Optimizer":
    """The optimizer ``name`` of ``model``.

    ``tables``: [optimizers.NAME] of the study, a ``class`` and its arguments, ``lr`` among them; they count most.
    ``shared`` (momentum, weight decay) goes to every class, a 0 only to those that know it. ``ours`` are arguments by class of
    this project, {"Woodbury": {"mass": …}, "RLO": {"eta": …}}; those of a preset ("lion") count more.
    Raises ValueError for a class or an argument that there is not.

    >>> import torch
    >>> made = make_optimizer("lion", torch.nn.Linear(2, 2), lr=0.1, ours={"RLOLambda": {"direction": "tanh"}})
    >>> type(made).__name__, made.param_groups[0]["direction"]
    ('RLOLambda', 'sign')
    """
    preset, table = dict(PRESETS.get(name, {})), dict((tables or {}).get(name, {}))
    if "class" in table:
        preset = {}
    wanted = (preset | table).get("class", name)
    found, own = _class(wanted)
    options = {"lr": lr} | dict((ours or {}).get(own, {})) | preset | _known(found, shared or {}) | table
    options.pop("class", None)
    if options["lr"] == "auto" and own != "Woodbury":
        raise ValueError(f"lr = auto is a step of the metric and goes with woodbury; write a number for {name}")
    try:
        return found(model if own == "Woodbury" else model.parameters(), **options)
    except TypeError as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"optimizer {name} ({found.__name__}) does not take {given}: {error}") from error


def needs_closure(optimizer: "torch.optim.Optimizer") -> bool:
    """Whether ``step`` asks for a function that evaluates the loss (LBFGS).

    >>> import torch
    >>> weights = [torch.nn.Parameter(torch.zeros(1))]
    >>> needs_closure(torch.optim.LBFGS(weights)), needs_closure(torch.optim.SGD(weights, lr=0.1))
    (True, False)
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure", inspect.Parameter)
    return closure.default is inspect.Parameter.empty


def _known(found: type, shared: Mapping[str, Any]) -> dict[str, Any]:
    """``shared`` without the zeros that ``found`` has no argument for."""
    arguments = inspect.signature(found).parameters
    every = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    return {key: value for key, value in shared.items() if value or every or key in arguments}


def _class(wanted: str) -> tuple[type, str]:
    if wanted.lower() in OURS:
        import optim

        return getattr(optim, OURS[wanted.lower()]), OURS[wanted.lower()]
    if ":" not in wanted:
        import torch

        matching = [known for known in dir(torch.optim) if known.lower() == wanted.lower()]
        if not matching:
            raise ValueError(f"optimizer {wanted}: torch {torch.__version__} has no such class in torch.optim")
        return getattr(torch.optim, matching[0]), ""
    return imported(wanted, "optimizer"), ""
