"""The contract of an optimizer in a training loop, for every entry of the table."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.optim.contract import (
    F64,
    LR,
    NAMES,
    assert_close,
    data,
    entries,
    network,
    points,
    run,
    same,
    squared,
    state_tensors,
    steps_from,
    values,
)

F32 = torch.float32


@entries()
def test_descends_on_a_quadratic(entry):
    x, a = data()
    model = nn.Linear(3, 2).to(F64)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    best = squared(design @ torch.linalg.lstsq(design, a).solution, a).item()
    start = squared(model(x), a).item() - best
    own = {"groups": [{"layers": ["."], "lr": 0.3}]} if "groups" in entry.options else {}
    losses = run(entry(model, lr=0.3, **own), model, 61, x, a)
    assert losses[1] < losses[0]
    assert 0 <= losses[-1] - best < entry.settles * start


@entries()
def test_the_first_step_goes_downhill(entry):
    """⟨gradient, move⟩ < 0: the metric is positive definite."""
    model = network()
    opt = entry(model)
    before = values(model)
    run(opt, model, 1)
    assert sum((p.grad * (p.detach() - before[n])).sum() for n, p in model.named_parameters()) < 0


@entries(lacking=["closure"])
def test_a_closure_does_what_the_loop_does(entry):
    x, a = data()
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    losses = run(opt, model, 4)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        second.zero_grad()
        loss = squared(other(x), a)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        returned = [second.step(closure).item() for _ in range(4)]
    assert calls == returned == losses
    assert same(values(other), values(model))


@entries(lacking=["closure"])
@pytest.mark.parametrize("how", ["model.zero_grad()", "p.grad = None", "zeros"])
def test_gradients_cleared_without_the_optimizer(entry, how):
    """The loops that do not call opt.zero_grad(): the same steps, on the samples of each step alone."""
    x, a = data()
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    for _ in range(3):
        if how == "p.grad = None":
            for p in model.parameters():
                p.grad = None
        else:
            model.zero_grad(set_to_none=how != "zeros")
        squared(model(x), a).backward()
        opt.step()
    run(second, other, 3)
    assert same(values(model), values(other))


@entries(lacking=["closure"])
@pytest.mark.parametrize("parts", [[4, 4], [5, 1, 2]])
def test_accumulated_micro_batches_are_one_batch(entry, parts):
    x, a = data()
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    run(opt, model, 2)
    for _ in range(2):
        second.zero_grad()
        for xs, targets in zip(x.split(parts), a.split(parts), strict=True):
            (squared(other(xs), targets) * len(xs) / len(x)).backward()
        second.step()
    assert_close(values(other), values(model))


@entries(lacking=["closure"])
def test_a_parameter_without_gradient_stays(entry):
    """As in torch: no step, no state, no decay; the step of the other layers is what it is anyway."""
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    x, a = data()
    for m in (model, other):
        squared(m(x), a).backward()
    for p in other[2].parameters():
        p.grad = None
    before = values(other)
    opt.step()
    second.step()
    for n in before:
        if n.startswith("2."):
            assert torch.equal(values(other)[n], before[n])
        elif "layerwise" in entry.traits:
            torch.testing.assert_close(values(other)[n], values(model)[n], rtol=0, atol=1e-13)
        else:
            assert not torch.equal(values(other)[n], before[n])
    assert not any(second.state.get(p) for p in other[2].parameters())


@entries(lacking=["closure"])
def test_no_gradient_at_all_is_no_step(entry):
    model = network()
    opt = entry(model)
    before = values(model)
    assert opt.step() is None
    opt.zero_grad()
    with torch.no_grad():
        model(data()[0])
    assert opt.step() is None
    assert same(values(model), before)
    assert not opt.state_dict()["state"]


@entries()
def test_layers_frozen_from_the_start(entry):
    """They are in no group, and the others move as if they were constants."""
    model = network()
    model[2].requires_grad_(False)
    opt = entry(model)
    before = values(model)
    losses = run(opt, model, 4)
    assert all(later < earlier for earlier, later in pairwise(losses))
    for n, p in values(model).items():
        assert torch.equal(p, before[n]) == n.startswith("2.")
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model[2].parameters()}


@entries()
def test_layers_frozen_and_thawed_in_between(entry):
    model = network()
    opt = entry(model)
    run(opt, model, 2)
    opt.zero_grad()
    model[2].requires_grad_(False)
    before = values(model)
    run(opt, model, 2)
    frozen = values(model)
    assert all(torch.equal(p, before[n]) == n.startswith("2.") for n, p in frozen.items())
    model[2].requires_grad_(True)
    run(opt, model, 1)
    assert all(not torch.equal(p, frozen[n]) for n, p in values(model).items())


@entries()
def test_in_place_activations(entry):
    """The same step as with activations that write elsewhere."""

    def made(inplace):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            layers = [nn.Linear(3, 6), nn.ReLU(inplace), nn.Linear(6, 4), nn.ELU(inplace=inplace), nn.Linear(4, 2)]
            return nn.Sequential(*layers, nn.LeakyReLU(0.1, inplace)).to(F64)

    model, other = made(False), made(True)
    assert run(entry(other), other, 4) == pytest.approx(run(entry(model), model, 4), rel=1e-13)
    assert_close(values(other), values(model), 1e-13)


@entries(lacking=["closure"])
def test_autocast(entry):
    """A forward pass in bfloat16 on float32 parameters; the step is taken in float32, close to the one without."""
    x, a = data(F32)
    model, other = network(dtype=F32), network(dtype=F32)
    opt, second = entry(model), entry(other)
    for _ in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        squared(y.float(), a).backward()
        opt.step()
    run(second, other, 3)
    assert all(p.dtype == F32 for p in values(model).values())
    assert all(v.dtype == F32 for v in state_tensors(opt))
    start, found, expected = (
        torch.cat([p.flatten() for p in held.values()])
        for held in (values(network(dtype=F32)), values(model), values(other))
    )
    assert (found - expected).norm() < 0.2 * (
        expected - start
    ).norm()  # bfloat16 carries 2 to 3 digits, Adam takes signs


@entries(lacking=["closure"])
def test_a_step_inside_autocast_is_not_autocast(entry):
    x, a = data(F32)
    model, other = network(dtype=F32), network(dtype=F32)
    opt, second = entry(model), entry(other)
    for m in (model, other):
        squared(m(x), a).backward()
    opt.step()
    with torch.autocast("cpu", torch.bfloat16):
        second.step()
        assert torch.is_autocast_enabled("cpu")
    assert_close(values(other), values(model), 1e-6)


@entries(lacking=["closure"])
def test_grad_scaler_changes_nothing(entry):
    """Gradients scaled by 2¹⁶ and unscaled before the step: the same step, to rounding."""
    x, a = data(F32)
    model, other = network(dtype=F32), network(dtype=F32)
    opt, second, scaler = entry(model), entry(other), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    start = values(model)
    run(second, other, 1)
    opt.zero_grad()
    scaler.scale(squared(model(x), a)).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    for n, p in values(model).items():
        assert (p - values(other)[n]).norm() < 1e-5 * (values(other)[n] - start[n]).norm()


@entries(lacking=["closure"])
@pytest.mark.parametrize("clears", ["the optimizer's zero_grad", "the model's zero_grad"])
def test_grad_scaler_skips_a_step_on_inf(entry, clears):
    """The skipped batch leaves no trace: parameters, state, and the samples of the next step."""
    x, a = data(F32)
    model, other = network(dtype=F32), network(dtype=F32)
    opt, second, scaler = entry(model), entry(other), torch.amp.GradScaler("cpu", init_scale=4.0)
    run(opt, model, 1)
    run(second, other, 1)
    before, state = values(model), copy.deepcopy(opt.state_dict()["state"])
    opt.zero_grad()
    scaler.scale(squared(model(x), a) * float("inf")).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert same(values(model), before)
    held = opt.state_dict()["state"]
    assert held.keys() == state.keys()
    for i, own in state.items():
        assert all(torch.equal(torch.as_tensor(held[i][key]), torch.as_tensor(v)) for key, v in own.items())
    if clears == "the optimizer's zero_grad":
        opt.zero_grad()
    else:
        model.zero_grad()
    squared(model(x), a).backward()
    opt.step()
    run(second, other, 1)
    assert_close(values(model), values(other), 1e-6)


@entries()
def test_two_optimizers_on_one_model(entry):
    """In turns: each has its own state and samples, and moves as it would alone."""
    thetas = points(4)
    model = network()
    first, second = entry(model), entry(model)
    reached = [steps_from(opt, model, [theta])[0] for opt, theta in zip((first, second) * 2, thetas, strict=True)]
    for turn in (0, 1):
        alone = network()
        expected = steps_from(entry(alone), alone, thetas[turn::2])
        assert all(same(found, wanted) for found, wanted in zip(reached[turn::2], expected, strict=True))


@entries("model", lacking=["closure"])
def test_a_part_of_a_network_beside_another_optimizer(entry):
    """One loss, one backward; the samples of the part are its own inputs."""
    x, a = data()
    model = nn.Sequential(network(), nn.Linear(2, 2).to(F64))
    other = copy.deepcopy(model)
    ours, theirs = entry(model[0]), NAMES["SGD"](model[1])
    expected = entry(other[0])
    for m in (model, other):
        squared(m(x), a).backward()
    before = values(model[1])
    for opt in (ours, theirs, expected):
        opt.step()
    assert same(values(model[0]), values(other[0]))
    assert_close(values(model[1]), {n: before[n] - LR * p.grad for n, p in model[1].named_parameters()}, 1e-14)


@entries(lacking=["closure"])
def test_two_models_with_an_optimizer_each(entry):
    x, a = data()
    models = network(), network(1)
    opts = [entry(m) for m in models]
    for _ in range(3):
        for opt in opts:
            opt.zero_grad()
        (squared(models[0](x), a) + 2 * squared(models[1](3 * x), a)).backward()
        for opt in opts:
            opt.step()
    alone = network()
    run(entry(alone), alone, 3)
    assert same(values(models[0]), values(alone))
    alone = network(1)
    opt = entry(alone)
    for _ in range(3):
        opt.zero_grad()
        (2 * squared(alone(3 * x), a)).backward()
        opt.step()
    assert_close(values(models[1]), values(alone), 1e-13)
