"""The step rules of this project's optimizers, Woodbury with everything it knows of and the RLO family, and of one's own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.options.damping import LevenbergMarquardt
from optim.options.group_mass import current_masses, damped
from optim.options.second_moment import SecondMomentMass
from optim.rlo import RLO, RLOLambda, RLOLifted
from optim.woodbury import Woodbury
from stability.recording.step_rule import (
    Held,
    Metric,
    StepRule,
    agree,
    inverse_mass,
    number,
    rates,
    same,
    uniform,
    unknown,
)
from stability.recording.torch_rules import Read, read_torch

CONSTANT = ("identity", "squared")  # output metrics that do not look at the outputs


def read_rule(optimizer: torch.optim.Optimizer, held: Sequence[Held]) -> Read:
    """(rule, masses) of the step that ``optimizer`` has just made on the parameters ``held``.

    An optimizer that has a method ``step_rule(held)`` says it itself. A rule that is wrong costs tightness of T4 and T5, not
    their validity. What it raises comes through; it says that it knows nothing by ``StepRule(name, known=False)``. Raises
    TypeError where it returns anything else.
    """
    name = type(optimizer).__name__
    if not held:
        return StepRule(name, still=True, note="nothing was moved"), {}
    # not in the try: a KeyError of the user's is an error of theirs
    if callable(getattr(optimizer, "step_rule", None)):
        return _said(optimizer.step_rule(held), name)
    try:
        if type(optimizer) is Woodbury:
            return _woodbury(optimizer, held)
        if type(optimizer) in (RLO, RLOLambda, RLOLifted):
            return _rlo(held, name)
        return read_torch(optimizer, held)
    except LookupError as error:
        return unknown(name, str(error).strip("'\""))


def _said(found, name: str) -> Read:
    if not (
        isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], StepRule) and isinstance(found[1], dict)
    ):
        raise TypeError(f"{name}.step_rule must return (StepRule, masses by parameter name), got {found!r}")
    return found


def _woodbury(optimizer: Woodbury, held: Sequence[Held]) -> Read:
    if not optimizer.output_metric.pointwise:
        return unknown(
            "Woodbury", f"its output metric {optimizer.output_metric.name!r} belongs to the samples it was made for"
        )
    group = agree(held, "momentum", "dampening", "nesterov", "decay")
    lr, shares = rates(held)
    by_layer = {h.name.rpartition(".")[0] or ".": shares[h.name] for h in held}
    if optimizer.blocks == "network" and len(set(by_layer.values())) > 1:
        return unknown("Woodbury", "one block for all layers, and groups of different lr")
    b, riemannian = group["momentum"], group["decay"] == "riemannian"
    fresh = same(held, lambda h: h.was_fresh, "whether they have a momentum buffer") if b else True
    trust = isinstance(optimizer.damping, LevenbergMarquardt)
    if trust:
        fresh = fresh or len(optimizer.trials) > 1  # a second trial leaves the momentum out
        if not optimizer.trials[-1].taken:
            return StepRule("Woodbury", still=True, exact=True, note="a trust region refused a step"), {}
    memory = {"beta": b, "gamma": 1.0 if fresh else 1 - group["dampening"], "fresh": fresh} if b else {}
    if group["nesterov"]:
        memory |= {"eta": 1.0, "zeta": b}
    decays = {h.name: h.group["weight_decay"] for h in held}
    decoupled = uniform({h.name: number(h.group["lr"]) * decays[h.name] for h in held})
    follows = optimizer.output_metric.name in CONSTANT or optimizer.scale == "none"
    moments = {h.name: (h.state["exp_avg_sq"], h.state["step"]) for h in held if "exp_avg_sq" in h.state}
    rule = StepRule(
        "Woodbury", lr, decay=0.0 if riemannian else decoupled, pull=uniform(decays) if riemannian else 0.0,
        metric=Metric(optimizer.output_metric, optimizer.scale, optimizer.blocks, _shares(by_layer)),
        exact=follows and not moments and not (riemannian and any(decays.values()) and optimizer.scale != "none"),
        note="" if follows and not moments else "metric of the S run, frozen at each step", **memory,
    )  # fmt: skip
    return rule, _woodbury_masses(optimizer, moments, optimizer.trials[-1].damping if trust else None)


def _woodbury_masses(optimizer: Woodbury, moments: dict, damping: float | None) -> dict:
    everything, found = dict(optimizer.model.named_parameters()), {}
    for group in optimizer.param_groups:
        factor = group["damping"] if damping is None else damping
        own = current_masses(group["mass"], optimizer._layers_of(group), everything, moments)
        if isinstance(group["mass"], SecondMomentMass):
            own = {name: mass.detach().clone() for name, mass in own.items()}
        found |= {name: damped(mass, factor) for name, mass in own.items()}
    return found


def _shares(by_layer: dict[str, float]) -> dict[str, float]:
    return {} if all(share == 1 for share in by_layer.values()) else by_layer


def _rlo(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "memory", "direction", "betas", "eta", "lifted", "scale", "eps", "normalize", "manifold")
    phi, memory, (beta1, beta2), eta = group["direction"], group["memory"], group["betas"], group["eta"]
    if group["manifold"] != "euclidean":
        return unknown(name, "outputs of points on a manifold are not followed")
    if group["normalize"] or phi not in ("identity", "tanh", "sign"):
        return unknown(name, "its direction is normalised, or a function of the user's")
    lr, shares = rates(held)
    decay = uniform({h.name: number(h.group["lr"]) * number(h.group["weight_decay"]) for h in held})
    if phi == "sign":
        return StepRule(name, lr, decay=decay, still=True, note="signs: derivative 0, A_t holds weight decay alone"), {}
    if group["lifted"] and memory != "gradient":
        return unknown(name, f"it has two memories, a velocity and {memory!r}; the state (e, f) holds one")
    fresh = same(held, lambda h: h.was_fresh, "whether they have moved before")
    steps = int(same(held, lambda h: h.state["step"], "the number of steps taken"))
    rule = {"lifted": {"beta": 1 - eta, "gamma": eta}, "gradient": {}}["lifted" if group["lifted"] else "gradient"]
    if memory == "ema":
        rule = {"beta": beta1, "gamma": 1 - beta1}
    elif memory == "lion":  # u = β₁v + (1 − β₁)g with the old v, v = (v⁺ − (1 − β₂)g)/β₂
        if beta2 == 0:
            return unknown(name, "a lion memory with β₂ = 0")
        rule = {"beta": beta2, "gamma": 1 - beta2, "zeta": beta1 / beta2}
        rule["eta"] = 1 - beta1 - rule["zeta"] * rule["gamma"]
    elif memory == "adam":
        rule = {"beta": beta1, "gamma": 1 - beta1, "zeta": 1 / (1 - beta1**steps)}
    P = {h.name: shares[h.name] * _slope(h, group, steps) for h in held}
    exact = memory != "adam" and phi == "identity"
    note = "" if exact else "slope of Φ and denominator of the S run, frozen at each step"
    return StepRule(name, lr, decay=decay, fresh=fresh, exact=exact, note=note, **rule), {
        name: inverse_mass(value) for name, value in P.items()
    }


def _slope(h: Held, group: dict, steps: int) -> Tensor | float:
    """∂(−d)/∂(gradient, or its mean): Φ' over the denominator of the memory, at the signal of this step."""
    memory, (beta1, beta2) = group["memory"], group["betas"]
    slope, u = 1.0, None
    if memory == "gradient":
        u = h.p.grad.detach().double()
    elif memory == "ema":
        u = h.state["mean"].double()
    elif memory == "lion":
        g = h.p.grad.detach().double()
        u = beta1 * (h.state["mean"].double() - (1 - beta2) * g) / beta2 + (1 - beta1) * g
    else:
        slope = 1 / ((h.state["square"].double() / (1 - beta2**steps)).sqrt() + group["eps"])
        u = h.state["mean"].double() / (1 - beta1**steps) * slope
    if group["direction"] == "identity":
        return slope
    return slope * (1 - torch.tanh(u / group["scale"]).square()) / group["scale"]
