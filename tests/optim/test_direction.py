"""Stacked steps: K networks, each with its own data and its own metric, against K dense solves."""

import pytest
import torch
from torch import nn

from nt_kernel.metric.layer_metric import solve_metric
from nt_kernel.metric.output_metric import resolve_output_metric
from optim import woodbury_direction, woodbury_step
from optim.steps.direction import inner_systems
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import Dense, definite_metric, distance, singular_metric, trainable

STACKED = [
    "mlp",
    "no bias",
    "frozen weight",
    "tied weights",
    "tokens, pairs",
    "tokens, summed",
    "layer norm",
    "convolution",
    "root linear",
    "output [N]",
    "bare parameters",
]
OPTIONS = {
    "mean": {"mass": 1e-2},
    "sum": {"scale": "sum"},
    "none": {"scale": "none", "mass": 0.5},
    "softmax": {"output_metric": "cross_entropy", "mass": 1e-2},
    "definite": {"output_metric": definite_metric},
    "singular": {"output_metric": singular_metric, "mass": 0.1},
    "network": {"blocks": "network"},
}


def stack(model, x, K=3):
    """K parameter points and K batches."""
    torch.manual_seed(1)
    params = {
        n: torch.stack([p + 0.3 * k * torch.randn_like(p) for k in range(K)]) for n, p in trainable(model).items()
    }
    return params, torch.stack([x + 0.2 * k * torch.randn_like(x) for k in range(K)])


def load(model, params, k):
    own = dict(model.named_parameters())
    with torch.no_grad():
        for n, p in params.items():
            own[n].copy_(p[k])
    return model


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", STACKED)
def test_every_network_takes_its_own_dense_step(name, option):
    model, x, _ = CASES[name].make()
    options = OPTIONS[option]
    if name == "output [N]" and option == "softmax":
        return
    params, xs = stack(model, x)
    rs = []

    def gradient(y):
        torch.manual_seed(2)
        rs.append(torch.randn_like(y))
        return rs[0]

    stepped = woodbury_step(model, params, xs, gradient, lr=0.5, **options)
    for k in range(3):
        dense = Dense(load(model, params, k), xs[k], **options)
        expected = dense.solve(dense.pull(rs[0][k]))
        moved = {n: (params[n][k] - stepped[n][k]) / 0.5 for n in params}
        assert distance(moved, expected) <= 1e-12 * dense.stiffness()


@pytest.mark.parametrize("option", OPTIONS)
def test_push_through_and_general_form_agree(option):
    from nt_kernel import layer_factors
    from nt_kernel.metric.layer_metric import model_mass, resolve_blocks, scale_factor

    model, x, _ = CASES["mlp"].make()
    options = OPTIONS[option]
    y, factors = layer_factors(model, x)
    blocks = resolve_blocks(factors, options.get("blocks", "layer"))
    mass = model_mass(factors, options.get("mass", 1.0))
    c = scale_factor(options.get("scale", "mean"), len(x))
    inners = inner_systems(blocks, y, mass, c, resolve_output_metric(options.get("output_metric", "identity")))
    r = torch.randn_like(y)
    direction, dense = woodbury_direction(blocks, inners, r, mass), Dense(model, x, **options)
    general = {}
    for name, factor in blocks.items():
        general |= solve_metric(factor, inners[name], factor.vjp(r), mass)
    assert distance(general, direction) <= 1e-12 * dense.stiffness()
    assert distance(direction, dense.solve(dense.pull(r))) <= 1e-12 * dense.stiffness()


def test_the_value_of_the_model_does_not_matter():
    model, x, _ = CASES["mlp"].make()
    params, xs = stack(model, x)
    first = woodbury_step(model, params, xs, lambda y: y, lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    second = woodbury_step(model, params, xs, lambda y: y, lr=0.1)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_stacking_changes_no_more_than_rounding():
    torch.manual_seed(0)
    model = mlp(3, 5, 2).to(F64)
    params, xs = stack(model, torch.randn(4, 3, dtype=F64))
    together = woodbury_step(model, params, xs, lambda y: y / 4, lr=0.1, mass=0.1)
    for k in range(3):
        alone = woodbury_step(
            model, {n: p[k : k + 1] for n, p in params.items()}, xs[k : k + 1], lambda y: y / 4, lr=0.1, mass=0.1
        )
        assert distance({n: p[k] for n, p in together.items()}, {n: p[0] for n, p in alone.items()}) < 1e-14


def test_bad_options_are_named():
    model = nn.Linear(3, 2)
    params = {n: p.detach()[None] for n, p in model.named_parameters()}
    step = lambda **options: woodbury_step(model, params, torch.ones(1, 4, 3), lambda y: y, lr=0.1, **options)  # noqa: E731
    with pytest.raises(ValueError, match=r"did you mean 'mean'\?"):
        step(scale="man")
    with pytest.raises(ValueError, match="must be positive and finite"):
        step(mass=-1)
    with pytest.raises(ValueError, match="blocks must be"):
        step(blocks="x")
