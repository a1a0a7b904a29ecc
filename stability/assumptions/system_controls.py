"""Negative controls for the assumptions of the other two systems, as of :mod:`stability.assumptions.controls`."""

import torch
from torch import nn

from optim import RLO, FirstOrder, NaimMonitor, SquaredEnergy, minimizing_movements
from optim.movements.energy import ConvexEnergy
from stability.assumptions.controls import F64, Control, linear
from stability.assumptions.systems import movement_assumptions, naim_assumptions


def _watched(steps: int, loss, told: float | None = None, **options):
    """The record of an RLO on one parameter, w = 1 at first; ``told``: the η that is claimed, if not the true one."""
    w = nn.Parameter(torch.ones(1, dtype=F64))
    optimizer, naim = RLO([w], memory="gradient", **options), NaimMonitor()
    for _ in range(steps):
        optimizer.zero_grad()
        h = loss(w)
        h.backward()
        d = -w.grad
        optimizer.step()
        naim.note_loss(h)
        v = optimizer.state[w].get("velocity", d)
        naim.add([v], [d], eta=told or options["eta"], lr=options["lr"])
    return naim.record()


def _descent(lr: float):
    """½ − lr − 2lr² for L = 1, η = ½: 0 at lr = (√5 − 1)/4 = 0.309."""
    record = _watched(4, lambda w: 0.5 * w.square().sum(), lr=lr, eta=0.5, direction="identity")
    return (record,), {"smoothness": 1.0}


def _told(error: float):
    """η = ½, said to be ½(1 + error)."""
    loss = lambda w: 0.5 * w.square().sum()  # noqa: E731
    return (_watched(6, loss, told=0.5 * (1 + error), lr=0.1, eta=0.5, direction="identity"),), {}


def _constant_force(sign: float):
    """h = 2 + w and d = sign, whatever w: the target stands still, and V falls or rises."""
    w, naim = torch.zeros(1, dtype=F64), NaimMonitor()
    for _ in range(5):
        naim.note_loss(2 + w.sum())
        d = torch.full((1,), sign, dtype=F64)
        naim.add([d], [d], eta=1.0, lr=0.1)
        w += 0.1 * d
    return (naim.record(),), {}


def _wavy(share: float):
    """E = ½u² + share·cos u, whose Hessian at u = 0 is 1 − share. It claims to be convex; the run starts and ends at 0."""
    energy = ConvexEnergy(lambda u: (0.5 * u.square() + share * u.cos()).sum(1))
    run = minimizing_movements(linear(1), torch.ones(1, 1, dtype=F64), SquaredEnergy(torch.zeros(1, 1)), **_FEW)
    return (run, energy), {}


_FEW = {"tau": 1.0, "steps": 2, "delta": 1e-6}


def _little_work(iterations: int):
    """One step of gradient descent with lr = 0.1 takes off a fifth of the way to the proximal point."""
    solver = FirstOrder(lambda params: torch.optim.SGD(params, lr=0.1))
    energy, x = SquaredEnergy(torch.ones(1, 1)), torch.ones(1, 1, dtype=F64)
    options = {"tau": 1.0, "steps": 3, "delta": 1e-2, "solver": solver, "inner_steps": iterations}
    return (minimizing_movements(linear(1), x, energy, **options), energy), {}


def _way(target: float):
    """y = w₁w₂x from w = 1, led to ``target``: σ_min(J) goes from √2 to √(2·target), the ball has the radius ½√2."""
    model, x = nn.Sequential(linear(1), linear(1)), torch.ones(1, 1, dtype=F64)
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1.0)
    energy = SquaredEnergy(torch.full((1, 1), target))
    run = minimizing_movements(model, x, energy, tau=1.0, steps=25, delta=1e-6, keep_parameters=True)
    return (run, energy, model, x), {}


SYSTEM_CONTROLS: tuple[Control, ...] = (
    Control("strict_descent", "lr, L = 1, η = ½", 0.32, 0.3, _descent, naim_assumptions),
    Control("residual_recursion", "η = ½ said to be ½(1 + q), q", 1e-5, 1e-7, _told, naim_assumptions),
    Control("dissipation", "d of h = 2 + w", 1.0, -1.0, _constant_force, naim_assumptions),
    Control("convex_energy", "E = ½u² + q cos u", 1.01, 0.99, _wavy, movement_assumptions),
    Control("inexactness", "inner steps of gradient descent", 10, 20, _little_work, movement_assumptions),
    Control("local_nondegeneracy", "target of y = w₁w₂x, w = 1 at first", 0.24, 0.26, _way, movement_assumptions),
    Control("interior_localisation", "target of y = w₁w₂x, w = 1 at first", 0.48, 0.52, _way, movement_assumptions),
)
"""A setting that violates each assumption of :data:`SYSTEMS`, and one just inside."""
