"""The step rules of torch.optim: what the closed loop of each of its optimizers is made of, read after a step.

An adaptive denominator is taken as it stands in the S run (*frozen*): D_t = √v̂_t + ε for Adam and its kin, so that
A_t = I − lr·(1/b) J D_t⁻¹J_Bᵀ∇²ℓ with the first moment as momentum. That the denominator of the twin differs is part of w_t.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stability.recording.step_rule import Held, StepRule, agree, inverse_mass, number, rates, same, uniform, unknown

Read = tuple[StepRule, dict]


def _sgd(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "momentum", "dampening", "nesterov", "maximize")
    lr, shares = rates(held)
    b = number(group["momentum"])
    fresh = same(held, lambda h: h.was_fresh, "whether they have a momentum buffer") if b else True
    # torch does not dampen the first gradient
    memory = {"beta": b, "gamma": 1.0 if fresh else 1 - number(group["dampening"]), "fresh": fresh} if b else {}
    if group["nesterov"]:
        memory |= {"eta": 1.0, "zeta": b}
    pull = uniform({h.name: number(h.group["weight_decay"]) for h in held})
    return StepRule(name, lr, pull=pull, sign=_sign(group), exact=True, **memory), _masses(held, shares)


def _asgd(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "lr", "lambd", "alpha", "maximize", "weight_decay")
    first = torch.as_tensor(number(group["lr"])).item()  # torch keeps it in its default dtype
    eta = same(held, lambda h: h.before.get("eta", first), "the step they have come to")
    pull, decay = number(group["weight_decay"]), number(group["lambd"]) * eta
    rule = StepRule(name, eta, decay=decay, pull=pull, sign=_sign(group), exact=True)
    return rule, _masses(held, dict.fromkeys((h.name for h in held), 1.0))


def _adam(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "betas", "eps", "maximize", "amsgrad")
    t, (beta1, beta2) = _count(held), map(number, group["betas"])
    key = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    denominators = {h.name: (_double(h.state[key]) / (1 - beta2**t)).sqrt() + group["eps"] for h in held}
    decoupled = group.get("decoupled_weight_decay", name == "AdamW")
    return _moments(held, name, beta1, 1 / (1 - beta1**t), 0.0, denominators, decoupled)


def _nadam(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "betas", "eps", "maximize", "momentum_decay")
    t, (beta1, beta2) = _count(held), map(number, group["betas"])
    mu, after = (beta1 * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (t, t + 1))
    product = number(held[0].state["mu_product"])
    denominators = {h.name: (_double(h.state["exp_avg_sq"]) / (1 - beta2**t)).sqrt() + group["eps"] for h in held}
    direct, through = (1 - mu) / (1 - product), after / (1 - product * after)
    return _moments(held, name, beta1, through, direct, denominators, group.get("decoupled_weight_decay", False))


def _radam(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "betas", "eps", "maximize")
    t, (beta1, beta2) = _count(held), map(number, group["betas"])
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        rectified = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
        scale = rectified * (1 - beta2**t) ** 0.5
        denominators = {h.name: (_double(h.state["exp_avg_sq"]).sqrt() + group["eps"]) / scale for h in held}
    else:
        denominators = {h.name: 1.0 for h in held}
    decoupled = group.get("decoupled_weight_decay", False)
    return _moments(held, name, beta1, 1 / (1 - beta1**t), 0.0, denominators, decoupled)


def _adamax(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "betas", "maximize")
    t, beta1 = _count(held), number(group["betas"][0])
    denominators = {h.name: _double(h.state["exp_inf"]) for h in held}
    return _moments(held, name, beta1, 1 / (1 - beta1**t), 0.0, denominators, False)


def _rmsprop(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "momentum", "eps", "maximize", "centered")

    def denominator(state) -> Tensor:
        square = _double(state["square_avg"])
        if group["centered"]:
            square = (square - _double(state["grad_avg"]).square()).clamp_min(0)
        return square.sqrt() + group["eps"]

    denominators = {h.name: denominator(h.state) for h in held}
    b = number(group["momentum"])
    fresh = same(held, lambda h: h.was_fresh, "whether they have moved before")
    return _frozen(held, name, denominators, group, beta=b, fresh=fresh)


def _adagrad(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "eps", "lr_decay", "maximize")
    slow = 1 + (_count(held) - 1) * group["lr_decay"]
    denominators = {h.name: (_double(h.state["sum"]).sqrt() + group["eps"]) * slow for h in held}
    return _frozen(held, name, denominators, group)


def _adadelta(held: Sequence[Held], name: str) -> Read:
    group = agree(held, "eps", "maximize")

    def denominator(state) -> Tensor:
        square, moved = _double(state["square_avg"]), _double(state["acc_delta"])
        return ((square + group["eps"]) / (moved + group["eps"])).sqrt()

    return _frozen(held, name, {h.name: denominator(h.state) for h in held}, group)


def _rprop(held: Sequence[Held], name: str) -> Read:
    note = "moves by signs, whose derivative is 0: A_t holds weight decay alone"
    return StepRule(name, rates(held)[0], still=True, note=note), {}


def _moments(held, name: str, beta1: float, zeta: float, eta: float, denominators, decoupled: bool) -> Read:
    """Adam's family: v the first moment, the denominators applied to it."""
    group = held[0].group
    fresh = same(held, lambda h: h.was_fresh, "whether they have moved before")
    memory = {"beta": beta1, "gamma": 1 - beta1, "eta": eta, "zeta": zeta, "fresh": fresh}
    return _frozen(held, name, denominators, group, decoupled, **memory)


def _frozen(held, name: str, denominators, group, decoupled: bool = False, **memory) -> Read:
    lr, shares = rates(held)
    decays = {h.name: number(h.group["weight_decay"]) for h in held}
    applied = {h.name: number(h.group["lr"]) * decays[h.name] for h in held}
    rule = StepRule(
        name, lr, decay=uniform(applied) if decoupled else 0.0, pull=0.0 if decoupled else uniform(decays),
        sign=_sign(group), note="denominator of the S run, frozen at each step", **memory,
    )  # fmt: skip
    return rule, {h.name: _divided(denominators[h.name], shares[h.name]) for h in held}


def _divided(denominator: Tensor | float, share: float) -> Tensor | float:
    return inverse_mass(share / denominator)


def _masses(held: Sequence[Held], shares: dict[str, float]) -> dict:
    return {h.name: inverse_mass(shares[h.name]) for h in held}


def _count(held: Sequence[Held]) -> int:
    return int(same(held, lambda h: number(h.state["step"]), "the number of steps taken"))


def _sign(group: dict) -> float:
    return -1.0 if group.get("maximize") else 1.0


def _double(t: Tensor) -> Tensor:
    return t.detach().double()


READERS: dict[type, Callable[[Sequence[Held], str], Read]] = {
    torch.optim.SGD: _sgd,
    torch.optim.ASGD: _asgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adadelta: _adadelta,
    torch.optim.Rprop: _rprop,
}


def read_torch(optimizer: torch.optim.Optimizer, held: Sequence[Held]) -> Read:
    """The rule of one of torch's optimizers; unknown for LBFGS, Muon, Adafactor, SparseAdam and subclasses of the user's."""
    name, reader = type(optimizer).__name__, READERS.get(type(optimizer))
    if reader is None:
        return unknown(name, f"no closed loop is known for {name}")
    return reader(held, name)
