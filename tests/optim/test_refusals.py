"""Calls and hyperparameters that cannot work, each by its message."""

import pytest
import torch
from torch import nn

from optim import Woodbury
from tests.nt_kernel.cases import Custom, mlp
from tests.optim.problems import check_step_is_dense, optimizer, problem
from tests.reference import trainable


def test_without_gradients_nothing_happens():
    model, x, _ = problem()
    opt = optimizer(model)
    before = {n: p.clone() for n, p in trainable(model).items()}
    model(x)
    assert opt.step() is None
    assert all(torch.equal(p, before[n]) for n, p in trainable(model).items())


def test_gradients_without_a_pass():
    model, _, _ = problem()
    opt = optimizer(model)
    sum(p.sum() for p in model.parameters()).backward()
    message = r"found gradients but no forward pass.*run model\(x\), loss\.backward\(\), step\(\) in this order"
    with pytest.raises(ValueError, match=message):
        opt.step()


def test_calls_that_cannot_be_recorded():
    model = nn.Linear(3, 2)
    opt = Woodbury(model)
    with pytest.raises(TypeError, match="positional inputs only; the model was called with input="):
        model(input=torch.ones(2, 3))
    with torch.no_grad():
        model(input=torch.ones(2, 3))  # evaluation may call as it likes
    opt.close()
    tuples = Custom(lambda s, x: (s.a(x), 0), a=nn.Linear(3, 2))
    opt = Woodbury(tuples)
    with pytest.raises(TypeError, match="needs a model that returns one tensor, its outputs; it returned tuple"):
        tuples(torch.ones(2, 3))
    opt.close()


def test_training_mode_is_refused_at_the_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    opt = Woodbury(model)
    model(torch.ones(2, 3)).sum().backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"layer '1' \(Dropout\) draws random masks"):
        opt.step()
    assert torch.equal(model[0].weight, before)


BAD = {
    "parameters": (
        lambda m: Woodbury(list(m.parameters())),
        TypeError,
        "takes the model, not its parameters.*got list",
    ),
    "generator": (lambda m: Woodbury(m.parameters()), TypeError, "got generator"),
    "frozen model": (lambda m: Woodbury(m.requires_grad_(False)), ValueError, "no trainable parameters"),
    "lr zero": (lambda m: Woodbury(m, 0.0), ValueError, r'lr must be positive and finite, or "auto"; got 0\.0'),
    "lr negative": (lambda m: Woodbury(m, -0.1), ValueError, r"got -0\.1"),
    "lr nan": (lambda m: Woodbury(m, float("nan")), ValueError, "got nan"),
    "lr inf": (lambda m: Woodbury(m, float("inf")), ValueError, "got inf"),
    "lr word": (
        lambda m: Woodbury(m, "automatic"),
        TypeError,
        "lr must be a positive number or \"auto\", got 'automatic'",
    ),
    "lr None": (lambda m: Woodbury(m, None), TypeError, "got None"),
    "lr True": (lambda m: Woodbury(m, True), TypeError, "got True"),
    "auto with sum": (
        lambda m: Woodbury(m, "auto", scale="sum"),
        ValueError,
        "needs scale=\"mean\"; with scale='sum' write a number",
    ),
    "auto with none": (lambda m: Woodbury(m, "auto", scale="none"), ValueError, "with scale='none'"),
    "mass zero": (lambda m: Woodbury(m, mass=0.0), ValueError, r"must be positive and finite, got 0\.0"),
    "mass nan": (lambda m: Woodbury(m, mass=float("nan")), ValueError, "got nan"),
    "mass length": (
        lambda m: Woodbury(m, mass=[1.0, 2.0]),
        ValueError,
        r"mass has 2 entries, the model has 3 layers \(0, 2, 4\)",
    ),
    "mass layer": (
        lambda m: Woodbury(m, mass={"2.weigth": 1.0}),
        ValueError,
        r"'2\.weigth'.*did you mean '2\.weight'\?",
    ),
    "metric": (
        lambda m: Woodbury(m, output_metric="cross-entropy"),
        ValueError,
        r"unknown output metric 'cross-entropy'.*did you mean 'cross_entropy'\?",
    ),
    "metric type": (
        lambda m: Woodbury(m, output_metric=torch.eye(2)),
        TypeError,
        "output_metric must be a name or a callable",
    ),
    "scale": (lambda m: Woodbury(m, scale="meam"), ValueError, r"unknown scale 'meam'.*did you mean 'mean'\?"),
    "blocks": (lambda m: Woodbury(m, blocks="all"), ValueError, "blocks must be 'layer' or 'network', got 'all'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_hyperparameters_at_construction(case):
    make, error, message = BAD[case]
    model = mlp(3, 4, 4, 2)
    with pytest.raises(error, match=message):
        make(model)
    assert not model._forward_hooks


def test_a_mass_by_layer_name_with_one_block():
    model, x, loss = problem()
    opt = optimizer(model, mass={"2": 0.1}, blocks="network")
    loss(model(x)).backward()
    masses = {n: 0.1 if n.startswith("2.") else 1.0 for n in trainable(model)}
    check_step_is_dense(model, x, opt, mass=masses, blocks="network")
