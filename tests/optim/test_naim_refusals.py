"""What the NAIM diagnostics refuse: numbers, shapes, optimizers whose velocity follows no known target."""

import math

import pytest
import torch
from torch import nn

from optim import Woodbury
from optim.naim import NaimMonitor, contraction_rate, residual_bound
from optim.naim_lyapunov import descent_margin, lyapunov, steady_state
from tests.optim.test_naim import OPTIMIZERS, draw, quadratic


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda w: NaimMonitor(torch.optim.RMSprop([w])), TypeError, "velocity of RMSprop is not known"),
        (lambda w: NaimMonitor(torch.optim.SGD([w], 0.1)), ValueError, "momentum > 0"),
        (lambda w: NaimMonitor(torch.optim.SGD([w], 0.1, momentum=0.9, nesterov=True)), ValueError, "nesterov=False"),
        (lambda w: NaimMonitor(torch.optim.SGD([w], 0.1, momentum=0.9, weight_decay=0.1)), ValueError, "coupled"),
        (lambda w: NaimMonitor(torch.optim.Adam([w], weight_decay=0.1)), ValueError, "coupled"),
        (lambda w: NaimMonitor(torch.optim.AdamW([w], maximize=True)), ValueError, "maximize"),
        (lambda w: NaimMonitor().add([w], []), ValueError, "1 velocities, 0 targets"),
        (lambda w: NaimMonitor().add([], []), ValueError, "no velocities"),
        (lambda w: residual_bound(NaimMonitor().record()), ValueError, "empty record"),
        (lambda w: contraction_rate(NaimMonitor().record(), 1.0), ValueError, r"forced must be in \(0, 1\)"),
        (lambda w: descent_margin(0.1, 0.0, 1.0), ValueError, r"eta must be in \(0, 1\]"),
        (lambda w: steady_state(w, w, eta=0.0, lr=1.0), ValueError, r"eta must be in \(0, 1\], got 0.0"),
        (lambda w: steady_state(w, w, eta=0.5, lr=0.0), ValueError, r"lr must be in \(0, ∞\), got 0.0"),
        (lambda w: steady_state(w[:1], w[:1], eta=0.5, lr=1.0), ValueError, "T ≥ 2"),
        (lambda w: steady_state(-w.abs(), w, eta=0.5, lr=1.0), ValueError, "nonnegative"),
        (lambda w: lyapunov(quadratic(OPTIMIZERS["tanh"]), 1.0), ValueError, "floor must be a lower bound of h"),
        (lambda w: descent_margin(-0.1, 0.5, 1.0), ValueError, r"lr must be in \(0, ∞\), got -0.1"),
        (lambda w: descent_margin(0.1, 0.5, -1.0), ValueError, r"smoothness must be in \[0, ∞\), got -1.0"),
        (lambda w: descent_margin(math.nan, 0.5, 1.0), ValueError, "lr must be in .*, got nan"),
        (lambda w: descent_margin(0.1, math.nan, 1.0), ValueError, "eta must be in .*, got nan"),
        (lambda w: descent_margin(0.1, "x", 1.0), TypeError, "eta must be a number, got 'x'"),
        (lambda w: descent_margin(0.1, 0.5, math.inf), ValueError, "smoothness must be in .*, got inf"),
        (lambda w: steady_state(w**2, w, eta=0.5, lr=math.inf), ValueError, r"lr must be in \(0, ∞\), got inf"),
        (lambda w: steady_state([1.0, 2.0], w, eta=0.5, lr=1.0), TypeError, r"V must be a tensor \[T\], got list"),
        (lambda w: lyapunov(quadratic(OPTIMIZERS["SGD"], 3), math.nan), ValueError, "floor must be in .*, got nan"),
        (lambda w: lyapunov(quadratic(OPTIMIZERS["SGD"], 3), -math.inf), ValueError, r"floor must be in \(−∞, ∞\)"),
        (lambda w: lyapunov(quadratic(OPTIMIZERS["SGD"], 3), c=-1.0), ValueError, r"c must be in \[0, ∞\), got -1.0"),
        (lambda w: contraction_rate(NaimMonitor().record(), "x"), TypeError, "forced must be a number, got 'x'"),
        (lambda w: NaimMonitor(torch.optim.SGD([w], 0.1, momentum=1.0)), ValueError, "below 1.*got momentum=1.0"),
        (lambda w: NaimMonitor(torch.optim.NAdam([w])), TypeError, "velocity of NAdam is not known"),
        (
            lambda w: NaimMonitor(Woodbury(nn.Linear(1, 1), momentum=0.9)),
            TypeError,
            "Woodbury.*momentum_buffer.*section 4",
        ),
    ],
)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make(nn.Parameter(draw(3)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"eta": 2.0}, ValueError, r"eta must be in \(0, 1\], got 2.0"),
        ({"eta": 0.0}, ValueError, r"eta must be in \(0, 1\], got 0.0"),
        ({"eta": [0.5, "x"]}, TypeError, "eta must be a number, got 'x'"),
        ({"eta": [0.5]}, ValueError, "2 velocities, 2 targets, 2 keys, 1 etas, 2 lrs"),
        ({"lr": -1.0}, ValueError, r"lr must be in \[0, ∞\), got -1.0"),
        ({"lr": math.inf}, ValueError, "lr must be in"),
        ({"lr": [0.1]}, ValueError, "2 etas, 1 lrs"),
        ({"points": []}, ValueError, "0 points"),
        ({"targets": [draw(2), draw(4)]}, ValueError, r"velocity and target 1 must be of one shape, got \(3,\) and \(4,\)"),
        ({"targets": [draw(2), draw(1)]}, ValueError, "one shape"),  # would broadcast
        ({"targets": [draw(2), [1.0] * 3]}, TypeError, "target 1 must be a tensor, got list"),
        ({"velocities": [None, draw(3)]}, TypeError, "velocity 0 must be a tensor, got NoneType"),
        ({"velocities": [draw(4), draw(3)], "targets": [draw(4), draw(3)]}, ValueError,
         r"velocity 0 must be \(2,\) as in the step before, got \(4,\)"),
    ],
)  # fmt: skip
def test_a_step_that_is_refused_is_not_recorded(change, error, text):
    fine = {"velocities": [draw(2), draw(3)], "targets": [draw(2, seed=1), draw(3, seed=1)], "eta": 0.5, "lr": 0.1}
    naim, other = NaimMonitor(), NaimMonitor()
    for monitor in (naim, other):
        monitor.add(**fine)
        monitor.note_loss(3.0)
    with pytest.raises(error, match=text):
        naim.add(**{**fine, **change})
    for monitor in (naim, other):
        monitor.add(**fine)
    assert str(naim.record()) == str(other.record())
    naim.add(**{**fine, "eta": math.nan, "lr": math.nan})  # unknown
    assert naim.record().recursion[2].isnan()


def test_a_momentum_taken_away_is_said():
    """SGD then no longer writes its buffer: −b is no velocity."""
    w = nn.Parameter(draw(3))
    opt = torch.optim.SGD([w], 0.1, momentum=0.9)
    with NaimMonitor(opt):
        w.grad = draw(3, seed=1)
        opt.step()
        opt.param_groups[0]["momentum"] = 0.0
        with pytest.raises(ValueError, match=r"momentum > 0 .*got momentum=0.0"):
            opt.step()


def test_a_loss_that_was_not_noted_is_asked_for():
    naim = NaimMonitor()
    naim.note_loss(1.0)
    naim.add([draw(2)], [draw(2)], eta=0.5, lr=0.1)
    naim.add([draw(2)], [draw(2)], eta=0.5, lr=0.1)
    with pytest.raises(ValueError, match="call note_loss"):
        lyapunov(naim.record())
