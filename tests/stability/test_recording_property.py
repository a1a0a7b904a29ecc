"""measured ≤ T5 ≤ T4 for whatever was recorded: any optimizer, any step, any batches, any replacement."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from nt_kernel.errors import NumericalError
from optim import Woodbury
from stability import certify
from tests.stability.recorded import F64, OPTIMIZERS, data, mlp, trained

SLACK = 1 + 1e-9


def quartic(y, a):
    return ((y - a).pow(4) / 4 + (y - a).square() / 2).sum(1)


def cross_entropy(y, a):
    return -(a.softmax(-1) * y.log_softmax(-1)).sum(-1)


def drawn(seed: int, name: str, lr: float, steps: int, batched: bool, activation, loss, thin: bool):
    """A certificate of a random pair of runs."""
    draw = torch.Generator().manual_seed(seed)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))  # noqa: E731
    n, d, p = integer(2, 5), integer(1, 3), integer(1, 3)
    x, a = data(n, d, p, seed)
    model = mlp(d, p, integer(2, 5), seed, activation)
    k = integer(0, n - 1)
    x2, a2 = x.clone(), a.clone()
    x2[k], a2[k] = (torch.randn(size, generator=draw, dtype=F64) for size in (d, p))
    batches = [torch.randint(0, n, (integer(1, n),), generator=draw) for _ in range(steps)] if batched else None
    options = {"lr": lr, "steps": steps, "batches": batches, "loss": loss[1]}
    if not thin:
        options["memory"] = 2**24
    else:
        parameters = sum(q.numel() for q in model.parameters())
        options["memory"] = 8 * parameters * 6
    try:
        runs = [
            trained(model, OPTIMIZERS[name], *pair, **options, **loss[0](pair[1])) for pair in ((x, a), (x2, a2))
        ]  # fmt: skip
    except NumericalError:  # the optimizer's own: training diverged
        reject()
    try:
        return certify(*runs, ladder=False)
    except NumericalError:
        last = runs[1].outputs(runs[1].times[-1], x), runs[0].outputs(runs[0].times[-1])
        assert any(not (y.abs() < 1e50).all() for y in last), "refused a run that did not diverge"
        reject()


LOSSES = {
    "squared": (lambda a: {}, lambda y, a: 0.5 * (y - a).square().sum(1)),
    "quartic": (lambda a: {"record_loss": quartic}, quartic),
    "cross_entropy": (lambda a: {"record_loss": cross_entropy}, cross_entropy),
}


def holds(found) -> None:
    """Nothing measured leaves its enclosure, and the enclosures keep their order."""
    per_sample, l2 = found.per_sample, found.errors.flatten(1).norm(dim=1)
    room = 1e-12 * max(1.0, l2.max().item())
    T5, T4, path = (found[name].series for name in ("T5_l2", "T4", "path_l2"))
    assert (T5 * SLACK + room >= l2).all()
    assert (T4 * SLACK + room >= T5).all()
    assert (path * SLACK >= l2).all()
    assert (found["T5"].series * SLACK + room >= per_sample.amax(-1)).all()
    assert (found["path_sup"].series * SLACK >= per_sample.amax(-1)).all()
    for name in ("T5_replaced", "T5_others"):
        if name in found.rungs:
            assert found[name].value * SLACK + room >= found[name].measured
    assert found["T5"].value <= found["T5_l2"].value * SLACK


draws = given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    lr=st.sampled_from([0.01, 0.1, 0.5, 1.5]),
    steps=st.integers(1, 9),
    batched=st.booleans(),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.Identity]),
    loss=st.sampled_from(["squared", "squared", "quartic", "cross_entropy"]),
    thin=st.sampled_from([False, False, True]),
)


@draws
@settings(max_examples=60)
def test_nothing_leaves_its_enclosure(seed, name, lr, steps, batched, activation, loss, thin):
    holds(drawn(seed, name, lr, steps, batched, activation, LOSSES[loss], thin))


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["sgd", "woodbury", "woodbury-sum"]),
    lr=st.sampled_from([1e-3, 0.1, 0.4]),
    loss=st.sampled_from(["squared", "mse"]),
)
@settings(max_examples=12)
def test_the_ladder_keeps_its_order(seed, name, lr, loss):
    make = dict(OPTIMIZERS, **{"woodbury-sum": lambda m, lr: Woodbury(m, lr, mass=0.2, scale="sum", check_step=False)})[
        name
    ]
    (x, a), model, sigma = data(3, 2, 2, seed), mlp(2, 2, 4, seed), {"squared": 1.0, "mse": 1.0}[loss]
    x2, a2 = x.clone(), a.clone()
    x2[1], a2[1] = x2[1] + 1, a2[1] - 1
    options = {"lr": lr, "steps": 4, "record_loss": loss, "loss": lambda y, b: sigma * (y - b).square().sum(1) / 2}
    found = certify(trained(model, make, x, a, **options), trained(model, make, x2, a2, **options))
    values = [found[rung].value for rung in ("T0", "T1", "T1c", "T2", "T3")]
    assert all(value > 0 for value in values)
    assert all(high * SLACK >= low for high, low in pairwise(values))
    assert values[-1] < math.inf


@pytest.mark.slow
@draws
@settings(max_examples=600)
def test_nothing_leaves_its_enclosure_in_many_runs(seed, name, lr, steps, batched, activation, loss, thin):
    holds(drawn(seed, name, lr, steps, batched, activation, LOSSES[loss], thin))
