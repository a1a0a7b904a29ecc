"""Backpropagation as the critical point of the Lagrangian, by autograd on the Lagrangian itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stability.adjoint import adjoint_states, lagrangian, layer_params
from tests.nt_kernel.cases import F64, mlp


def twice():
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(3, 2))


def of(make, *shape):
    def build():
        torch.manual_seed(0)
        return make().to(F64), torch.randn(4, *shape, dtype=F64)

    return build


CHAINS = {
    "mlp": of(lambda: mlp(3, 5, 4, 2), 3),
    "convolution": of(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), 1, 4, 4),
    "in place": of(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), 3),
    "nested": of(lambda: nn.Sequential(mlp(3, 4, 3), nn.LayerNorm(3), nn.Sequential(nn.Tanh(), nn.Linear(3, 2))), 3),
    "a module twice": of(twice, 3),
    "frozen": of(lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)), 3),
}
LOSSES = {
    "squared": lambda z: 0.5 * (z - 1).square().sum(1),
    "cross_entropy": lambda z: F.cross_entropy(z, torch.tensor([0, 1, 1, 0])),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_adjoint_equations_are_backpropagation(chain, loss):
    layers, x = CHAINS[chain]()
    found = adjoint_states(layers, x, LOSSES[loss])
    copy = x.clone().requires_grad_()
    h = LOSSES[loss](layers(copy)).mean()
    h.backward()
    torch.testing.assert_close(found.h, h.detach(), rtol=0, atol=0)
    torch.testing.assert_close(found.costates[0], copy.grad)
    total = {}
    for layer, gradients in zip(layers, found.gradients, strict=True):
        for name, g in gradients.items():  # a module that comes twice adds up
            p = layer.get_parameter(name)
            total[p] = total.get(p, 0) + g
    assert set(total) == {p for p in layers.parameters() if p.requires_grad}
    for p, g in total.items():
        torch.testing.assert_close(g, p.grad)
    z = x
    for layer, state in zip(layers, found.states[1:], strict=True):
        z = layer(z.clone()).detach()
        torch.testing.assert_close(state, z, rtol=0, atol=0)


def derivatives(layers, found, loss, *, states=None, costates=None):
    """L and its derivatives in z_1 … z_N, in λ_1 … λ_N, in θ."""
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    states = [found.states[0], *map(leaf, states or found.states[1:])]
    costates = [None, *map(leaf, costates or found.costates[1:])]
    theta = [{n: leaf(p) for n, p in params.items()} for params in layer_params(layers)]
    value = lagrangian(layers, theta, states, costates, loss)
    flat = [p for params in theta for p in params.values()]
    got = torch.autograd.grad(value, [*states[1:], *costates[1:], *flat])
    n = len(layers)
    return value.detach(), got[:n], got[n : 2 * n], got[2 * n :]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_lagrangian_is_stationary_there_and_only_there(chain, loss):
    layers, x = CHAINS[chain]()
    found = adjoint_states(layers, x, LOSSES[loss])
    value, in_states, in_costates, in_theta = derivatives(layers, found, LOSSES[loss])
    torch.testing.assert_close(value, found.h)
    assert max(t.abs().max() for t in (*in_states, *in_costates)) <= 1e-15
    expected = [g for gradients in found.gradients for g in gradients.values()]
    torch.testing.assert_close(list(in_theta), expected)
    for k in range(len(layers)):
        moved = [z + 0.01 * (j == k) for j, z in enumerate(found.states[1:])]
        assert derivatives(layers, found, LOSSES[loss], states=moved)[2][k].abs().max() == pytest.approx(0.01)
        moved = [c + 0.01 * (j == k) for j, c in enumerate(found.costates[1:])]
        assert derivatives(layers, found, LOSSES[loss], costates=moved)[1][k].abs().max() == pytest.approx(0.01)


def test_one_sample_of_the_last_costate_is_the_losses_gradient_over_n():
    layers, x = CHAINS["mlp"]()
    found = adjoint_states(layers, x, LOSSES["squared"])
    torch.testing.assert_close(found.costates[-1], (found.states[-1] - 1) / len(x))


def test_indices_have_no_costate_and_other_parameters_may_be_given():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 2)).to(F64)
    x = torch.tensor([[0, 1], [2, 2], [5, 0]])
    theta = tuple({n: 2 * p for n, p in params.items()} for params in layer_params(layers))
    found = adjoint_states(layers, x, LOSSES["squared"], theta)
    assert found.costates[0] is None
    with torch.no_grad():
        for p in layers.parameters():
            p.mul_(2)
    LOSSES["squared"](layers(x)).mean().backward()
    torch.testing.assert_close(found.gradients[0]["weight"], layers[0].weight.grad)
    torch.testing.assert_close(found.gradients[2]["bias"], layers[2].bias.grad)
    with pytest.raises(ValueError, match="one dict for each of the 3 layers, got 2"):
        adjoint_states(layers, x, LOSSES["squared"], theta[:2])
