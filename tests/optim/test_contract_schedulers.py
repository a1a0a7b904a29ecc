"""LR schedulers, alone and chained, for every entry of the table: held against learning rates written by hand."""

import copy
import warnings

import pytest
from torch.optim import lr_scheduler

from tests.optim.contract import LR, entries, network, run, same, values
from tests.thinned import thinned

# Each is held against a loop that writes the same learning rates by hand.
CHAINS = {
    "StepLR": lambda o: [lr_scheduler.StepLR(o, 2, gamma=0.5)],
    "CosineAnnealingLR": lambda o: [lr_scheduler.CosineAnnealingLR(o, 5)],
    "OneCycleLR": lambda o: [lr_scheduler.OneCycleLR(o, max_lr=LR, total_steps=8, cycle_momentum=False)],
    "LinearLR then ExponentialLR": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2])
    ],
    "ChainedScheduler": lambda o: [
        lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)])
    ],
    "StepLR and ExponentialLR": lambda o: [lr_scheduler.StepLR(o, 2, gamma=0.5), lr_scheduler.ExponentialLR(o, 0.9)],
    "ReduceLROnPlateau": lambda o: [lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0)],
}


@pytest.mark.parametrize("chain", thinned(CHAINS, 2))
@entries()
def test_schedulers(entry, chain):
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    schedulers, rates = CHAINS[chain](opt), []
    for _ in range(4):
        rates.append([group["lr"] for group in opt.param_groups])
        (loss,) = run(opt, model, 1)
        for scheduler in schedulers:
            scheduler.step(loss) if chain == "ReduceLROnPlateau" else scheduler.step()
    assert len({tuple(rate) for rate in rates}) > 1
    for rate in rates:
        for group, lr in zip(second.param_groups, rate, strict=True):
            group["lr"] = lr
        run(second, other, 1)
    assert same(values(model), values(other))


@entries()
def test_one_cycle_drives_the_momentum_too(entry):
    """cycle_momentum writes group["momentum"] at every step, and the steps follow it."""
    if "momentum" not in entry.hyper or not entry.options.get("momentum"):
        pytest.skip("has no momentum to drive")
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    scheduler = lr_scheduler.OneCycleLR(opt, max_lr=LR, total_steps=6, base_momentum=0.5, max_momentum=0.8)
    seen = []
    for _ in range(4):
        seen.append([(group["lr"], group["momentum"]) for group in opt.param_groups])
        run(opt, model, 1)
        scheduler.step()
    assert len({tuple(rate) for rate in seen}) == 4
    for rates in seen:
        for group, (lr, momentum) in zip(second.param_groups, rates, strict=True):
            group["lr"], group["momentum"] = lr, momentum
        run(second, other, 1)
    assert same(values(model), values(other))
    plain = network()
    run(entry(plain, momentum=0.8), plain, 4)
    assert not same(values(plain), values(model))


@entries()
def test_a_scheduler_resumes_with_its_optimizer(entry):
    model, other = network(), network()
    opt = entry(model)
    scheduler = lr_scheduler.CosineAnnealingLR(opt, 8)
    for _ in range(3):
        run(opt, model, 1)
        scheduler.step()
    second = entry(other)
    again = lr_scheduler.CosineAnnealingLR(second, 8)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        run(opt, model, 1)
        run(second, other, 1)
        scheduler.step()
        again.step()
    assert same(values(model), values(other))


@entries()
def test_a_schedulers_warning_about_the_order_of_calls(entry):
    """torch warns when the scheduler comes before the first step, and only then."""
    model = network()
    opt = entry(model)
    scheduler = lr_scheduler.StepLR(opt, 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    opt = entry(model)
    scheduler = lr_scheduler.StepLR(opt, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(opt, model, 1)
        scheduler.step()
