"""What the tests of the optimizer share: options, problems, and one step held against the dense solve."""

import torch

from optim import Woodbury
from tests.nt_kernel.cases import CASES
from tests.reference import Dense, definite_metric, distance, singular_metric, trainable

OPTIONS = {
    "default": {},
    "small mass": {"mass": 1e-3},
    "large mass": {"mass": 1e3},
    "sum": {"scale": "sum", "mass": 0.1},
    "gradient descent": {"scale": "none"},
    "softmax": {"output_metric": "cross_entropy", "mass": 1e-2},
    "definite": {"output_metric": definite_metric, "mass": 0.1},
    "singular": {"output_metric": singular_metric, "mass": 0.1},
    "network": {"blocks": "network", "mass": 0.1},
}
LR = 0.3


def call(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def problem(name="mlp", seed=0):
    """(model, x, loss), the loss a mean over samples with a gradient in every output."""
    model, x, _ = CASES[name].make()
    torch.manual_seed(seed)
    with torch.no_grad():
        a = torch.randn_like(call(model, x))
    return model, x, lambda y, rows=slice(None): 0.5 * (y - a[rows]).square().sum() / len(a)


def optimizer(model, **options):
    """Without the step check, which is tested by itself."""
    return Woodbury(model, LR, check_step=False, **options)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def check_step_is_dense(model, x, opt, **options):
    """The next step moves by −lr·G⁻¹(p.grad), G built densely on x; tolerance as in tests.nt_kernel.test_metric."""
    dense = Dense(model, x, **options)
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    expected = dense.solve(gradients(model))
    opt.step()
    moved = {n: (before[n] - p) / LR for n, p in trainable(model).items()}
    assert distance(moved, expected) <= 1e-12 * dense.stiffness()


def closure_of(model, opt, x, loss, calls=None):
    def closure():
        opt.zero_grad()
        h = loss(model(x))
        h.backward()
        if calls is not None:
            calls.append(h.item())
        return h

    return closure
