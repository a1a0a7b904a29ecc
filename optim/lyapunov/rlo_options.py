"""The options of a Riemannian Lyapunov optimizer: what is refused, by name, and what follows from them."""

import math
from numbers import Real

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from optim.lyapunov.retraction import embedded_manifold
from optim.lyapunov.rlo_rules import BETAS, DIRECTIONS, too_small


def checked_options(options: dict) -> dict:
    """The options of a group with what follows from them: ``lr``, ``eta`` numbers, ``eta_schedule``, ``lifted``, ``steps``."""
    options = checked_rule(options)
    eta = options["eta"]
    schedule = eta if callable(eta) else options.get("eta_schedule")
    first = checked_eta({"eta": eta, "eta_schedule": schedule, "lifted": True, "steps": 0})
    lifted = schedule is not None or first != 1
    return {**options, "eta": first, "eta_schedule": schedule, "lifted": lifted, "steps": options.get("steps", 0)}


def checked_rule(options: dict) -> dict:
    """All that is not η: ``lr`` a number, ``betas`` given; ValueError/TypeError for what is out of range or unknown."""
    options = {**options, "lr": checked_lr(options["lr"])}
    for name in ("eps", "scale", "weight_decay"):
        check_number(name, options[name], open_below=name == "scale")
    if not isinstance(options["memory"], str) or options["memory"] not in BETAS:
        raise ValueError(unknown_name("memory", options["memory"], BETAS))
    phi = options["direction"]
    if not callable(phi) and phi not in DIRECTIONS:
        raise ValueError(unknown_name("direction", phi, DIRECTIONS))
    if options["betas"] is None:
        options["betas"] = BETAS[options["memory"]]
    if not isinstance(options["betas"], tuple | list) or len(options["betas"]) != 2:
        raise TypeError(f"betas must be a pair (β₁, β₂), got {options['betas']!r}")
    for i, beta in enumerate(options["betas"]):
        check_number(f"betas[{i}]", beta, 1)
    if not isinstance(options["normalize"], bool):
        raise TypeError(f"normalize must be True or False, got {options['normalize']!r}")
    name = embedded_manifold(options["manifold"]).name
    if name != "euclidean" and options["weight_decay"]:
        raise ValueError(
            f"weight_decay={options['weight_decay']!r} on the manifold {name!r}: θ is normal to it there, so nothing would "
            "decay; give these parameters a group with weight_decay=0"
        )
    return options


def checked_lr(lr) -> float:
    """lr as a number, out of a tensor of one entry too; TypeError for what is none, ValueError outside [0, ∞)."""
    lr = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    check_number("lr", lr)
    return lr


def checked_eta(group: dict) -> float:
    """η of the group's next step; ValueError outside (0, 1], or below 1 where no velocity is kept."""
    eta = group["eta_schedule"](group["steps"]) if group["eta_schedule"] else group["eta"]
    if isinstance(eta, bool) or not isinstance(eta, Real):
        raise TypeError(f"eta must be a number in (0, 1] or a function of the step that returns one, got {eta!r}")
    if not 0 < eta <= 1:
        where = f" of its schedule at step {group['steps']}" if group["eta_schedule"] else ""
        raise ValueError(f"eta must be in (0, 1], got {eta!r}{where}")
    if eta != 1 and not group["lifted"]:
        raise ValueError(f"eta={eta!r}, but this group was made with eta=1 and keeps no velocity; use RLOLifted")
    return float(eta)


def check_params(params: list, options: dict) -> None:
    """Raise unless every parameter is real floating point, of a type that the scale of tanh fits in, and on the manifold.

    What is no tensor is torch's to refuse.
    """
    rest = {name: options[name] for name in ("scale", "memory", "betas", "eps")}
    manifold = embedded_manifold(options["manifold"])
    for i, p in enumerate(p[1] if isinstance(p, tuple) else p for p in params):
        if not isinstance(p, Tensor):
            continue
        if not p.is_floating_point():
            raise TypeError(f"RLO moves real floating-point parameters; parameter {i} of the group is {p.dtype}")
        option = too_small(options["direction"], p.dtype, **rest)
        if option:
            raise ValueError(
                f"{option}={options[option]!r} is too small for parameter {i} of the group, {p.dtype}: "
                + {
                    "scale": "2/scale overflows there, or eps times scale underflows, and a zero gradient would give NaN; "
                    "expected a larger scale, or direction='sign', its limit",
                    "eps": "(1 − β₁)·eps underflows there, and a zero gradient would give 0/0; expected a larger one",
                }[option]
            )
        with torch.no_grad():
            manifold.check(p, f"parameter {i} of the group")


def check_number(
    name: str,
    value,
    most: float = math.inf,
    *,
    least: float = 0.0,
    open_below: bool = False,
    closed_above: bool = False,
) -> None:
    """TypeError for what is no real number, ValueError outside the interval from ``least`` to ``most`` (∞ is never in it).

    >>> check_number("eta", 1.5, 1, open_below=True, closed_above=True)
    Traceback (most recent call last):
    ...
    ValueError: eta must be in (0, 1], got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    open_below = open_below or least == -math.inf
    above = value > least if open_below else value >= least
    below = value <= most if closed_above else value < most
    if not (above and below):
        start, end = ("(" if open_below else "["), ("]" if closed_above else ")")
        low, high = ({math.inf: "∞", -math.inf: "−∞"}.get(x, f"{x:g}") for x in (least, most))
        raise ValueError(f"{name} must be in {start}{low}, {high}{end}, got {value!r}")
