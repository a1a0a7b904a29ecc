"""The control: a model linear in θ, plain gradient metric, on the flow. There the paper's proof is complete."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from stability import Replacement, train_twins
from tests.stability.dense import F64
from tests.thinned import thinned


def linear_problem(seed, n=4, p=2, d=9):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    model = nn.Linear(d, p, bias=bool(seed % 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(randn(*parameter.shape))
    return model, randn(n, d), randn(n, p), [Replacement(j, randn(d), randn(p)) for j in range(2)]


@pytest.mark.parametrize("seed", thinned(range(6), 3))
def test_on_the_flow_every_bound_of_the_ladder_holds(seed):
    model, x, a, zs = linear_problem(seed)
    result = train_twins(model, x, a, zs, steps=150, lr=0.02, scale="none", dynamics="flow", null_twin=False)
    for j, pair in enumerate(result.pairs):
        measured, T3 = result.trajectories["measured_l2"][j], result.trajectories["T3"][j]
        # d is sampled at the left end of each interval; ‖d‖ falls along these flows, so the sum is an upper one.
        assert (measured * (1 - 1e-6) - 1e-9 <= T3).all()
        rungs = [pair[name] for name in ("T0", "T1", "T1c", "T2", "T3")] + [pair["measured_l2"] * (1 - 1e-6)]
        assert all(above * (1 + 1e-9) >= below > 0 for above, below in pairwise(rungs))
        assert pair["drift"] < 1e-9 * pair["disturbance"]
        assert pair["metric_gap"] == 0.0
    verdicts = {v["assumption"]: v["verdict"] for v in result.assumptions}
    assert verdicts == {
        "positive rate": "holds",
        "gradient flow": "holds",
        "squared loss": "holds",
        "C¹ activations": "holds",
        "no kernel drift": "holds",
        "one metric": "holds",
    }


def one_dimensional(step):
    """y = w·a with one sample: e obeys one scalar equation, and T3 on the flow is an equality."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.3)
    one = lambda value: torch.tensor([value], dtype=F64)  # noqa: E731
    z = Replacement(0, one(0.8), one(3.0))
    x, a = torch.tensor([[1.2]], dtype=F64), torch.tensor([[1.0]], dtype=F64)
    return model, x, a, [z], round(2.0 / step)


def test_on_the_flow_the_bound_is_attained_in_one_dimension():
    model, x, a, zs, steps = one_dimensional(0.002)
    result = train_twins(model, x, a, zs, steps=steps, lr=0.002, scale="none", dynamics="flow", null_twin=False)
    measured, T3 = result.trajectories["measured_l2"][0], result.trajectories["T3"][0]
    np.testing.assert_allclose(T3[1:], measured[1:], rtol=5e-3)


def test_euler_steps_break_the_bound_by_an_excess_linear_in_the_step():
    steps, gaps = np.array([0.2, 0.1, 0.05, 0.025, 0.0125]), []
    for step in steps:
        model, x, a, zs, count = one_dimensional(step)
        result = train_twins(model, x, a, zs, steps=count, lr=float(step), scale="none", null_twin=False)
        excess = result.trajectories["measured_l2"][0] - result.trajectories["T3"][0]
        gaps.append(excess.max())
    assert min(gaps) > 0  # T3 speaks of the flow: Euler steps do exceed it
    slope = np.polyfit(np.log(steps), np.log(gaps), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.1)
