"""h and ∂h/∂y of any loss, against autograd on the model itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optim import Woodbury
from optim.steps.risk import risk_at
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import trainable

LABELS = torch.tensor([0, 1, 1, 0])
LOSSES = {
    "half squares of the samples": lambda y: 0.5 * (y - 1).square().sum(1),
    "their mean": lambda y: 0.5 * (y - 1).square().sum(1).mean(),
    "torch's mean": lambda y: F.mse_loss(y, torch.ones_like(y)),
    "cross-entropy of the samples": lambda y: F.cross_entropy(y, LABELS, reduction="none"),
    "cross-entropy": lambda y: F.cross_entropy(y, LABELS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_risk_and_gradient_are_autograds(name):
    model, x, _ = CASES["mlp"].make()
    h, r = risk_at(model, None, x, LOSSES[name])
    y = model(x).detach().requires_grad_()
    expected = LOSSES[name](y).mean()
    (gradient,) = torch.autograd.grad(expected, y)
    torch.testing.assert_close(h, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(r, gradient, rtol=0, atol=0)


def test_other_parameters_outputs_of_any_shape_and_a_chosen_one():
    model, x, _ = CASES["output [N, T, C]"].make()
    moved = {n: p + 1 for n, p in trainable(model).items()}
    h, r = risk_at(model, moved, x, lambda y: y.square().sum((1, 2)))
    y = torch.func.functional_call(model, moved, (x,))
    torch.testing.assert_close(r, 2 * y.flatten(1) / len(x))
    torch.testing.assert_close(h, y.square().sum() / len(x))
    model, x, _ = CASES["output chosen"].make()
    h, r = risk_at(model, None, x, lambda y: y.square().sum(1), output=CASES["output chosen"].output)
    torch.testing.assert_close(h, model(x)["y"].square().sum(1).mean().detach())


def test_it_works_without_grad_and_leaves_no_pass_behind():
    model, x = mlp(3, 4, 2).to(F64), torch.randn(4, 3, dtype=F64)
    opt = Woodbury(model)
    with torch.no_grad():
        _, r = risk_at(model, None, x, LOSSES["their mean"])
    assert not r.requires_grad
    assert not opt._passes.seen
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda y: y, ValueError, r"losses of the 4 samples, \[4\], or their mean, a scalar; got shape \(4, 2\)"),
        (lambda y: y.sum(0), ValueError, r"got shape \(2,\)"),
        (lambda y: 1.0, TypeError, "got float"),
        (lambda y: torch.ones(4), ValueError, "does not depend on the model's outputs"),
        (lambda y: y.detach().sum(), ValueError, "does not depend on the model's outputs"),
    ],
)
def test_losses_that_are_none(loss, error, message):
    with pytest.raises(error, match=message):
        risk_at(mlp(3, 4, 2), None, torch.zeros(4, 3), loss)


def test_the_model_itself_is_not_moved():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = model[1].running_mean.clone()
    risk_at(model, None, torch.randn(5, 2), lambda y: y.square().sum(1))
    assert torch.equal(model[1].running_mean, before)
