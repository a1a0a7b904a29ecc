"""What stacked training refuses: steps too large for one of the networks, stacks and data that do not fit, bad options."""

import dataclasses

import pytest
import torch
from torch import nn

from optim import StepTooLargeError
from optim.stacks.first_order import adam, gradient_descent
from optim.stacks.stacked import StackedState, stack_parameters, stacked_step
from optim.stacks.stacked_woodbury import WoodburyStep
from tests.nt_kernel.cases import F64
from tests.optim.stacks import half_square, network, networks, train
from tests.reference import Dense, definite_metric, trainable

LIMITS = {  # lr·λ_max at which the recursion z² − … of one mode has the root −1, by hand
    "plain": ({}, 2.0),
    "heavy ball": ({"momentum": 0.5}, 3.0),
    "dampened": ({"momentum": 0.5, "dampening": 0.25}, 4.0),
    "nesterov": ({"momentum": 0.5, "nesterov": True}, 1.5),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("metric", ["identity", definite_metric])
@pytest.mark.parametrize("scale", ["mean", "none"])
def test_a_step_too_large_for_one_network_is_refused(metric, scale, limit):
    """The limit is that of the worst network: 2/max_k λ_max(L H_k Lᵀ), with momentum what LIMITS says in the place of 2."""
    model, params, x, targets = networks("mlp")
    momentum, most = LIMITS[limit]
    options = {"output_metric": metric, "scale": scale}
    each = [Dense(network(model, params, k), x[0][k], **options).lambda_max() for k in range(3)]
    assert max(each) > 1.01 * min(each)
    below, above = (WoodburyStep(share * most / max(each), **options, **momentum) for share in (0.999, 1.001))
    train(model, params, x, targets, below, 1)
    with pytest.raises(StepTooLargeError, match="the step needs lr < ") as caught:
        train(model, params, x, targets, above, 1, chunk=1)
    assert caught.value.limit == pytest.approx(most / max(each))
    train(model, params, x, targets, dataclasses.replace(above, check_step=False), 1)


def test_weight_decay_takes_its_share_of_the_limit():
    model, params, x, targets = networks("mlp")
    w, mass = 0.8, 0.5
    largest = max(Dense(network(model, params, k), x[0][k], mass=mass, scale="none").lambda_max() for k in range(3))
    for decay, limit in (("decoupled", 1 / (largest / 2 + w / 2)), ("riemannian", 2 / (largest + w / mass))):
        options = {"mass": mass, "scale": "none", "weight_decay": w, "decay": decay}
        train(model, params, x, targets, WoodburyStep(0.999 * limit, **options), 1)
        with pytest.raises(StepTooLargeError) as caught:
            train(model, params, x, targets, WoodburyStep(1.001 * limit, **options), 1)
        assert caught.value.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": {}}, ValueError, "'0.bias', '0.weight'.* are in one of them only"),
        ({"params": "one missing"}, ValueError, "'0.bias' is in one of them only"),
        ({"params": "not stacked"}, ValueError, r"must be \[K, \*shape of the parameter\].*0.weight \(5, 3\)"),
        ({"params": "of two heights"}, ValueError, "with one K >= 1"),
        ({"x": torch.zeros(2, 4, 3, dtype=F64)}, ValueError, r"with K = 3; got x \(2, 4, 3\)"),
        ({"targets": torch.zeros(4, 2, dtype=F64)}, ValueError, r"targets \(4, 2\); for \[N, …\] write shared=True"),
        ({"method": "adam"}, TypeError, "WoodburyStep or a rule"),
        ({"chunk": 0}, ValueError, "chunk must be an int of at least 1"),
        ({"state": StackedState(1, {"mean": {"w": torch.zeros(1, 2)}})}, ValueError, r"its 'mean' holds w \(1, 2\)"),
        ({"method": lambda p, g, m, t: ({}, {})}, ValueError, "the rule returned the parameters"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    model, params, x, targets = networks("mlp")
    special = {
        "one missing": {n: p for n, p in params.items() if n != "0.bias"},
        "not stacked": trainable(model),
        "of two heights": params | {"0.bias": params["0.bias"][:2]},
    }
    given = {"params": params, "state": StackedState(), "x": x[0], "targets": targets, "method": adam(), "chunk": None}
    given |= change
    if isinstance(given["params"], str):
        given["params"] = special[given["params"]]
    with pytest.raises(error, match=message):
        stacked_step(model, **given, loss=half_square)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WoodburyStep(-1.0), "lr must be positive"),
        (lambda: WoodburyStep(scale="man"), r"did you mean 'mean'\?"),
        (lambda: WoodburyStep(solver="lu"), "unknown solver"),
        (lambda: WoodburyStep(blocks="x"), "blocks must be"),
        (lambda: WoodburyStep("auto", scale="sum"), 'lr="auto" rests on'),
        (lambda: WoodburyStep(momentum=1.0), "momentum must be in"),
        (lambda: WoodburyStep(nesterov=True), "needs momentum"),
        (lambda: stack_parameters(nn.Linear(1, 1), 0), "K must be an int of at least 1"),
        (lambda: adam(-1.0), "lr must be a number in"),
        (lambda: adam(betas=(1.0, 0.9)), r"betas\[0\] must be a number in \[0, 1\)"),
        (lambda: adam(eps=float("nan")), "eps must be a number"),
        (lambda: gradient_descent(0.1, decay="l2"), "unknown decay"),
    ],
)
def test_bad_hyperparameters_are_refused_when_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dropout_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(F64)
    params, x, targets = stack_parameters(model, 2), torch.ones(2, 4, 3, dtype=F64), torch.ones(2, 4, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"layer '1' \(Dropout\)"):
        train(model, params, x, targets, WoodburyStep(), 1)
    with pytest.raises(RuntimeError, match="random operation"):
        train(model, params, x, targets, adam(), 1)
