"""What PyTorch's own suite expects of every optimizer, as far as it applies, for every entry of the table.

After test/optim/test_optim.py of PyTorch (test_lrscheduler.py: see test_contract_schedulers.py). Not offered here, and
refused by name: maximize, foreach, fused, capturable, differentiable. Not applicable: sparse gradients, swapped tensors.
"""

import copy
import inspect
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optim import Woodbury
from tests.optim.contract import (
    F64,
    NAMES,
    assert_close,
    data,
    entries,
    network,
    run,
    same,
    squared,
    values,
)


class Rosenbrock(nn.Module):
    """½‖y‖² of its outputs y(a) = a·(10(v − u²), 1 − u) is ½(100(v − u²)² + (1 − u)²) at a = 1; the least is at (1, 1)."""

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.tensor([1.5, 1.5], dtype=F64))

    def forward(self, a):
        u, v = self.point
        return a * torch.stack([10 * (v - u.square()), 1 - u])


@entries(every=8)
def test_rosenbrock(entry):
    """From (1.5, 1.5) down to the valley v = u², and along it to (1, 1) as far as 200 steps of this kind go."""
    if "groups" in entry.options:
        pytest.skip("its groups name other layers")
    model = Rosenbrock()
    opt = entry(model, lr=entry.pace)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.999)
    x, a = torch.ones(1, 1, dtype=F64), torch.zeros(1, 2, dtype=F64)
    losses = []
    for _ in range(200):
        losses += run(opt, model, 1, x, a)
        scheduler.step()
    assert losses[-1] < 0.01 * losses[0]


@entries()
def test_it_is_an_optimizer(entry):
    opt = entry(network())
    assert isinstance(opt, Optimizer)
    assert {"state", "param_groups"} == set(opt.state_dict())
    assert all({"params", "lr"} <= set(group) for group in opt.param_groups)
    assert "lr" in opt.defaults


@entries()
def test_repr_shows_every_group_and_its_entries(entry):
    opt = entry(network())
    text = repr(opt)
    assert text.startswith(type(opt).__name__ + " (")
    assert text.count("Parameter Group") == len(opt.param_groups)
    for group in opt.param_groups:
        assert f"lr: {group['lr']}" in text
    assert "params" not in text
    assert len(text) < 2000


@entries()
def test_pickled_alone_it_keeps_its_state_and_hyperparameters(entry):
    """As torch's: a copy on parameters of its own; hooks on it, which may be local functions, are not carried."""
    model = network()
    opt = entry(model)
    run(opt, model, 2)
    opt.register_step_post_hook(lambda *_: None)
    thawed = pickle.loads(pickle.dumps(opt))
    assert type(thawed) is type(opt)
    assert repr(thawed) == repr(opt)
    found, expected = thawed.state_dict(), opt.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    for i, held in expected["state"].items():
        assert all(torch.equal(torch.as_tensor(found["state"][i][key]), torch.as_tensor(v)) for key, v in held.items())


@entries()
def test_step_hooks(entry):
    """On the optimizer and on all optimizers: called once around every step, in order, and no more once removed."""
    model, seen = network(), []
    opt = entry(model)
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all before")),
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("before" if o is opt else "other")),
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after" if o is opt else "other")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all after")),
    ]
    try:
        run(opt, model, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["all before", "before", "after", "all after"] * 2
    run(opt, model, 1)
    assert len(seen) == 8


@entries()
def test_a_pre_hook_may_change_the_arguments(entry):
    model, calls = network(), []
    opt = entry(model)
    x, a = data()

    def closure():
        opt.zero_grad()
        loss = squared(model(x), a)
        loss.backward()
        calls.append(loss.item())
        return loss

    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert opt.step().item() == calls[0]


@entries()
def test_state_dict_hooks(entry):
    model = network()
    opt = entry(model)
    run(opt, model, 1)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    saved = opt.state_dict()
    assert seen == ["pre"]
    assert saved["mine"] == 1
    other = entry(network())
    other.register_load_state_dict_pre_hook(lambda o, d: seen.append(d["mine"]))
    other.register_load_state_dict_post_hook(lambda o: seen.append(o is other))
    other.load_state_dict(saved)
    assert seen == ["pre", 1, True]


@entries()
def test_a_loading_hook_may_replace_the_checkpoint(entry):
    model = network()
    opt = entry(model)

    def halved(o, saved):
        groups = [{**group, "lr": group["lr"] / 2} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    opt.register_load_state_dict_pre_hook(halved)
    before = [group["lr"] for group in opt.param_groups]
    opt.load_state_dict(opt.state_dict())
    assert [group["lr"] for group in opt.param_groups] == [lr / 2 for lr in before]


@entries(every=5)
def test_the_profiler_sees_step_and_zero_grad(entry):
    model = network()
    opt = entry(model)
    with torch.autograd.profiler.profile() as profile:
        run(opt, model, 1)
    names = {event.name for event in profile.function_events}
    kind = type(opt).__name__
    assert {f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"} <= names


@entries()
def test_deep_copies_of_a_state_dict_go_on_alike(entry):
    """In the same process, three optimizers from one checkpoint do the same and do not disturb each other."""
    model = network()
    opt = entry(model)
    run(opt, model, 3)
    saved, theta = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    run(opt, model, 3)
    for _ in range(2):
        other = network(7)
        second = entry(other)
        other.load_state_dict(theta)
        second.load_state_dict(copy.deepcopy(saved))
        run(second, other, 3)
        assert same(values(other), values(model))


@entries()
def test_step_counts(entry):
    """Where a state counts steps, it counts each once."""
    model = network()
    opt = entry(model)
    run(opt, model, 5)
    counts = [float(held["step"]) for held in opt.state_dict()["state"].values() if "step" in held]
    assert set(counts) <= {5.0}
    assert ("Adam" not in entry.name) or counts


@entries()
def test_parameters_that_are_not_contiguous(entry):
    """A transposed weight with a transposed gradient moves as a contiguous one does, and stays as it lies in memory."""
    model, other = network(), network()
    with torch.no_grad():
        model[2].weight = nn.Parameter(model[2].weight.t().contiguous().t())
    opt, second = entry(model), entry(other)
    assert not model[2].weight.is_contiguous()
    run(opt, model, 3)
    run(second, other, 3)
    assert not model[2].weight.is_contiguous()
    assert_close(values(model), values(other), 1e-13)


class WithEmpty(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.none = network(), nn.Parameter(torch.empty(0, dtype=F64))

    def forward(self, x):
        return self.first(x) + self.none.sum()


@entries()
def test_parameters_without_entries(entry):
    """A parameter of shape [0] that has a gradient: nothing to move, no error, and the others move as without it."""
    if "groups" in entry.options:
        pytest.skip("its groups name other layers")
    model, other = WithEmpty(), network()
    model.first.load_state_dict(other.state_dict())
    run(entry(model), model, 2)
    run(entry(other), other, 2)
    assert_close(values(model.first), values(other), 1e-12)


@entries()
def test_scalar_parameters(entry):
    """A parameter of shape []: its step is that of the same number in a vector."""
    if "groups" in entry.options:
        pytest.skip("its groups name other layers")

    class Scaled(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.scale = nn.Parameter(torch.full(shape, 0.7, dtype=F64))

        def forward(self, x):
            return self.scale * x[:, :2]

    model, other = Scaled(()), Scaled((1,))
    run(entry(model), model, 3)
    run(entry(other), other, 3)
    assert model.scale.shape == ()
    torch.testing.assert_close(model.scale.detach(), other.scale.detach()[0], rtol=0, atol=1e-12)


@entries("model", lacking=["closure"])
def test_complex_parameters_are_refused_by_name(entry):
    """J of a complex network is no real linear map of its parameters: the metric does not exist."""
    if "groups" in entry.options:
        pytest.skip("its groups name other layers")
    model = nn.Linear(3, 2, dtype=torch.complex128)

    def whole():
        opt = entry(model)
        model(torch.ones(4, 3, dtype=torch.complex128)).abs().square().mean().backward()
        opt.step()

    before = model.weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match="complex"):
        whole()
    assert torch.equal(model.weight.detach(), before)


@entries()
def test_tensor_learning_rates(entry):
    """lr as a 0-dimensional tensor, which schedulers keep as one: the same steps as with the number."""
    model, other = network(), network()
    opt, second = entry(model), entry(other)
    for group in opt.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=F64)
    first, then = (lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, second))
    for _ in range(3):
        run(opt, model, 1)
        run(second, other, 1)
        first.step()
        then.step()
    assert_close(values(model), values(other), 1e-13)


@entries()
def test_a_tensor_as_lr_at_construction(entry):
    model, other = network(), network()
    lr = torch.tensor(0.03, dtype=F64)
    opt = entry(model, lr=lr)
    run(opt, model, 2)
    run(entry(other, lr=0.03), other, 2)
    assert lr.item() == 0.03
    assert_close(values(model), values(other), 1e-13)


@entries()
@pytest.mark.parametrize("option", ["maximize", "foreach", "fused", "capturable", "differentiable"])
def test_what_is_not_offered_is_refused_by_name(entry, option):
    if entry.name in ("SGD", "SGD with momentum", "Adam"):
        pytest.skip("torch offers it")
    with pytest.raises(TypeError, match=option):
        entry(network(), **{option: True})


@entries()
def test_an_empty_network_is_refused(entry):
    with pytest.raises(ValueError, match=r"empty parameter list|no trainable parameters"):
        entry(nn.Tanh(), **({"groups": ()} if "groups" in entry.options else {}))


@entries()
def test_zero_grad_both_ways(entry):
    model = network()
    opt = entry(model)
    x, a = data()
    for to_none in (True, False):
        squared(model(x), a).backward()
        opt.zero_grad(set_to_none=to_none)
        for p in model.parameters():
            assert p.grad is None if to_none else not bool(p.grad.any())
    assert list(inspect.signature(opt.zero_grad).parameters) == ["set_to_none"]


@entries()
def test_state_is_by_parameter(entry):
    """opt.state maps parameters to dicts, and holds nothing of others."""
    model = network()
    opt = entry(model)
    run(opt, model, 1)
    assert isinstance(opt.state, defaultdict)
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    assert {id(p) for p in opt.state} <= held
    assert all(isinstance(own, dict) for own in opt.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@entries()
def test_parameter_types(entry, dtype):
    model, wide = network(dtype=dtype), network()
    assert run(entry(model), model, 5)[-1] == pytest.approx(run(entry(wide), wide, 5)[-1], rel=1e-4)
    assert all(p.dtype == dtype for p in model.parameters())


def test_the_constructor_is_the_public_one():
    """Positional: model and lr; the rest by name, so that adding one breaks nobody."""
    kinds = {name: p.kind for name, p in inspect.signature(Woodbury).parameters.items()}
    assert list(kinds)[:2] == ["model", "lr"]
    assert {kinds[name] for name in list(kinds)[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(isinstance(entry.name, str) for entry in NAMES.values())
