"""The ways to the sensitivities agree: the chain rule of perceptrons, autograd's engine (batched, an output at a time, several
contracted together), and torch.func. An input that asks for gradients is taken by torch.func: its graph is the caller's."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nt_kernel import empirical_ntk, layer_factors
from nt_kernel.capture import observe, sensitivities
from nt_kernel.capture.contraction import ROWS
from tests.nt_kernel.cases import CASES, F64, Custom, mlp

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu in place": lambda z: F.relu(z, inplace=True),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "log sigmoid": F.logsigmoid,
    "sine": torch.sin,
    "two after each other": lambda z: torch.exp(-torch.tanh(z)),
    "scaled and shifted": lambda z: 2 * torch.tanh(z * torch.linspace(1, 2, z.shape[-1], dtype=z.dtype)) + 0.5,
    "nothing": lambda z: z,
}


@pytest.fixture
def chained(monkeypatch):
    """The answers that the chain rule was given, one for each observation."""
    said = []

    def asked(*args):
        said.append(linear_chain(*args))
        return said[-1]

    linear_chain = observe.linear_chain
    monkeypatch.setattr(observe, "linear_chain", asked)
    return said


def by_transform(model, x):
    return layer_factors(model, x.detach().clone().requires_grad_())


def assert_the_same(model, x, *others):
    y, factors = layer_factors(model, x)
    for outputs, found in others or [by_transform(model, x)]:
        torch.testing.assert_close(y, outputs.detach(), **CLOSE)
        assert list(factors) == list(found)
        for name, f in factors.items():
            torch.testing.assert_close(f.dense(), found[name].dense().detach(), **CLOSE)


def perceptron(phi, *widths):
    layers = {f"l{k}": nn.Linear(a, b, bias=k != 1) for k, (a, b) in enumerate(pairwise(widths))}

    def forward(s, x):
        *inner, last = (getattr(s, name) for name in layers)
        for layer in inner:
            x = phi(layer(x))
        return last(x)

    return Custom(forward, **layers).to(F64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_chain_rule_is_autograds(name, chained):
    torch.manual_seed(0)
    model, x = perceptron(ACTIVATIONS[name], 4, 6, 5, 7, 3), torch.randn(5, 4, dtype=F64)
    assert_the_same(model, x)
    assert chained
    assert all(chained)


def skip(s, x):
    h = torch.tanh(s.a(x))
    return s.c(h + torch.tanh(s.b(h)))


def product(s, x):
    h = s.a(x)
    return s.c(torch.tanh(s.b(torch.tanh(h))) * h)


def grown(s, x):  # one sample at a time in the check, but more entries come out than go in
    return s.c(torch.tanh(s.b(torch.tanh(s.a(x)) + torch.ones(2, 1, 1, dtype=x.dtype))).sum(0))


NO_CHAINS = {
    "skip": skip,
    "product of two": product,
    "softmax": lambda s, x: s.c(torch.softmax(s.b(torch.softmax(s.a(x), -1)), -1)),
    "softmax at the first only": lambda s, x: s.c(torch.tanh(s.b(torch.softmax(s.a(x), -1)))),
    "rolled": lambda s, x: s.c(torch.tanh(s.b(s.a(x).roll(1, -1)))),
    "square by itself": lambda s, x: s.c((lambda h: h * h)(s.b(torch.tanh(s.a(x))))),
    "beside": lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x))))) + s.a(x)[:, :3],
    "an end of its own": lambda s, x: torch.tanh(s.c(torch.tanh(s.b(torch.tanh(s.a(x)))))),
    "grown": grown,
    "cut": lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x)).detach()))),
    "without grad": lambda s, x: s.c(torch.tanh(s.b(no_grad(lambda: torch.tanh(s.a(x)))))),
}


def no_grad(f):
    with torch.no_grad():
        return f()


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain_goes_by_autograd(name, chained):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 3)}
    model, x = Custom(NO_CHAINS[name], **layers).to(F64), torch.randn(5, 4, dtype=F64)
    assert_the_same(model, x)
    assert not any(chained)


def test_an_entry_repeated_breaks_the_chain(chained):
    """A product with constants that makes a vector of a number is of single entries, and yet no φ of z alone."""
    torch.manual_seed(0)
    spread = torch.linspace(1, 2, 6, dtype=F64)
    model = Custom(lambda s, x: s.b(torch.tanh(s.a(x)) * spread), a=nn.Linear(4, 1), b=nn.Linear(6, 3)).to(F64)
    assert_the_same(model, torch.randn(5, 4, dtype=F64))
    assert not any(chained)


def test_a_frozen_layer_breaks_the_chain(chained):
    torch.manual_seed(0)
    model, x = mlp(4, 6, 5, 3).to(F64), torch.randn(5, 4, dtype=F64)
    model[2].weight.requires_grad_(False)
    assert_the_same(model, x)
    model[2].bias.requires_grad_(False)
    assert_the_same(model, x)
    assert not any(chained)


def test_a_chain_that_becomes_none_is_seen_again(chained):
    """The same calls in the same order, and yet a way past the second layer: what was cut is followed after all."""
    torch.manual_seed(0)

    def forward(s, x):
        h = torch.tanh(s.a(x))
        return s.c(torch.tanh(s.b(h)) + (h if s.skip else 0))

    model = Custom(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3)).to(F64)
    model.skip, x = False, torch.randn(5, 4, dtype=F64)
    assert_the_same(model, x)
    assert all(chained)
    model.skip = True
    chained.clear()
    assert_the_same(model, x)
    assert chained == [False]


def test_slopes_are_those_of_every_sample(chained):
    """One sample, one entry: δ = W₂·φ'(z) in closed form."""
    model = mlp(1, 1, 2).to(F64)
    (w, b), (v, _) = model[0].parameters(), model[2].parameters()
    x = torch.tensor([[0.3], [-2.0]], dtype=F64)
    J = layer_factors(model, x)[1]["0"].dense()
    slope = 1 - torch.tanh(x * w + b).square()
    expected = (v.T * slope).detach()  # [N, C]
    torch.testing.assert_close(J, torch.stack([expected * x, expected], -1), **CLOSE)
    assert all(chained)


MODELS = {name: CASES[name].make for name in CASES}


@pytest.mark.parametrize("name", MODELS)
def test_autograd_and_torch_func_agree(name, monkeypatch):
    """Batched and an output at a time; with a model's own input types where these take no gradient."""
    case = CASES[name]
    model, x, _ = case.make()
    y, factors = layer_factors(model, x, output=case.output)
    monkeypatch.setattr(observe, "_by_autograd", observe._by_transform)
    transformed = layer_factors(model, x, output=case.output)
    monkeypatch.undo()
    monkeypatch.setattr(sensitivities, "ONE_BY_ONE", 0)
    monkeypatch.setattr(observe, "linear_chain", lambda *args: False)
    for outputs, found in (transformed, layer_factors(model, x, output=case.output)):
        torch.testing.assert_close(outputs, y, **CLOSE)
        for layer, f in factors.items():
            torch.testing.assert_close(found[layer].dense(), f.dense(), **CLOSE)


@pytest.mark.parametrize(("features", "outputs"), [(16, 10), (16, 3), (8, 9), (ROWS, 3), (5, 2)])
def test_outputs_contracted_together(features, outputs, monkeypatch):
    """Full groups, a group that is not full, one group that holds all; both formats in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, features, 3, padding=1), nn.Tanh(), nn.Flatten(2), nn.Linear(64, 2), nn.Flatten(), nn.Tanh()
    ).append(nn.Linear(2 * features, outputs))
    model, x = model.to(F64), torch.randn(2, 2, 8, 8, dtype=F64)
    monkeypatch.setattr(sensitivities, "ONE_BY_ONE", 0)
    assert_the_same(model, x, by_transform(model, x), by_transform(model, x.to(memory_format=torch.channels_last)))
    monkeypatch.undo()
    assert_the_same(model, x)


def test_a_derivative_that_cannot_be_batched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).to(F64)
    assert_the_same(model, torch.randn(3, 2, 4, 4, dtype=F64))


def test_in_place_on_results_that_are_views():
    """instance_norm's and those of a linear layer on tokens: autograd gives them another place in the graph then."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(3, affine=True)
    for model, shape in (
        (nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(27, 2)), (2, 4, 4)),
        (
            nn.Sequential(
                nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 2)
            ),
            (2, 4),
        ),
    ):
        model.to(F64)
        assert_the_same(model, torch.randn(3, *shape, dtype=F64))
        kinds = [
            kind
            for f in layer_factors(model, torch.randn(3, *shape, dtype=F64))[1].values()
            for kind in f.kinds.values()
        ]
        assert "explicit" not in kinds


def test_no_parameter_takes_part_in_the_graph():
    model, x = mlp(4, 6, 5, 3).to(F64), torch.randn(5, 4, dtype=F64)
    y, factors = layer_factors(model, x)
    assert not y.requires_grad
    assert not any(f.dense().requires_grad for f in factors.values())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    K = empirical_ntk(model, x)
    with torch.no_grad():
        assert torch.equal(empirical_ntk(model, x), K)


def test_what_was_switched_on_after_the_plan_is_seen():
    torch.manual_seed(0)
    model = Custom(
        lambda s, x: s.out(checkpoint(s.inner, x, use_reentrant=False) if s.saving else s.inner(x)),
        inner=mlp(4, 6, 5),
        out=nn.Linear(5, 3),
    ).to(F64)
    model.saving = False
    x = torch.randn(3, 4, dtype=F64)
    layer_factors(model, x)
    model.saving = True
    with pytest.raises(RuntimeError, match=r"saved tensor hooks \(activation checkpointing\?\)"):
        layer_factors(model, x)
    model.saving = False
    handle = model.inner[0].register_full_backward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"'inner\.0' has full backward hooks"):
        layer_factors(model, x)
    handle.remove()
    layer_factors(model, x)
