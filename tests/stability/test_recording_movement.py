"""``record`` and ``certify`` around the inner loop of a minimizing movement, which is a loop of a torch optimizer."""

import pytest
import torch

from optim import RLO, FirstOrder, SquaredEnergy, minimizing_movements
from stability import certify, record, squared_loss
from tests.stability.recorded import data, linear, mlp

TAU, ROUNDS = 0.5, 12
INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.7),
    "RLO": lambda p: RLO(p, lr=0.05, eta=0.4, memory="gradient", direction="identity"),
}


def one_outer_step(model, x, a, make):
    """(record, outer run); F = E + ‖u − u⁰‖²/(2τ) is (1 + 1/τ)/2·‖u − P(u⁰)‖² and a constant."""
    energy, optimizer = SquaredEnergy(a), make(model.parameters())
    target = energy.proximal(model(x).detach(), TAU)
    with record(model, x, optimizer, targets=target, loss=squared_loss(1 + 1 / TAU)) as watched:
        run = minimizing_movements(
            model, x, energy, tau=TAU, steps=1, delta=1e-12, solver=FirstOrder(lambda _: optimizer), inner_steps=ROUNDS
        )
    return watched, run


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("network", [linear, mlp])
def test_twins_of_an_outer_step_are_enclosed(network, name):
    """T5 ≥ the divergence; for a model linear in θ, where A_t is exact, not by much."""
    x, a = data(5, 3, 2)
    other = a.clone()
    other[1] += 0.5
    own, run = one_outer_step(network(3, 2), x, a, INNER[name])
    twin, twin_run = one_outer_step(network(3, 2), x, other, INNER[name])
    assert run.iterations == twin_run.iterations == ROUNDS
    torch.testing.assert_close(own.outputs(ROUNDS), run.trajectory.outputs[1], rtol=1e-12, atol=1e-12)
    found = certify(own, twin, replaced=[1])
    gap = max((twin.outputs(t) - own.outputs(t)).norm(dim=1).max().item() for t in range(ROUNDS + 1))
    assert gap > 1e-3
    assert gap * (1 - 1e-9) <= found["T5"].value
    if network is linear:
        assert found["T5"].value <= gap * 1.5
