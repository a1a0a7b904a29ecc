"""What an optimizer leaves alone, for every entry of the table."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.contract import F64, data, entries, network, run, same, squared, values


def flags() -> dict:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "printing": torch.zeros(1).__repr__(),
        "filters": list(warnings.filters),
        "numpy errors": np.geterr(),
    }


@entries(lacking=["closure"])
def test_gradients_stay(entry):
    """Bit for bit and the same tensors, clipped or not; also those of the inputs."""
    x, a = data()
    x.requires_grad_()
    model = network()
    opt = entry(model)
    for clipped in (False, True):
        opt.zero_grad()
        squared(model(x), a).backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        held = {n: p.grad for n, p in model.named_parameters()}
        grads = {n: g.clone() for n, g in held.items()}
        seen, versions = x.grad.clone(), {n: g._version for n, g in held.items()}
        opt.step()
        for n, p in model.named_parameters():
            assert p.grad is held[n]
            assert p.grad._version == versions[n]
            assert torch.equal(p.grad, grads[n])
        assert torch.equal(x.grad, seen)


@entries()
def test_parameters_are_the_same_objects_changed_in_place(entry):
    model = network()
    opt = entry(model)
    held = [(p, p.data_ptr()) for p in model.parameters()]
    run(opt, model, 2)
    for p, (q, where) in zip(model.parameters(), held, strict=True):
        assert p is q
        assert p.data_ptr() == where
        assert p.is_leaf
        assert p.requires_grad


@entries(lacking=["closure"])
def test_a_step_counts_as_a_change_in_place(entry):
    """Autograd refuses a backward through values that the step has overwritten, instead of a wrong gradient."""
    x, a = data()
    model = network()
    opt = entry(model)
    loss = squared(model(x), a)
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@entries()
def test_random_streams_stay(entry):
    model = network()

    def streams():
        return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (the global one is meant)

    before = streams()
    run(entry(model), model, 3)
    after = streams()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


@pytest.fixture(params=[(torch.float32, 1), (torch.float64, 2)], ids=["float32, 1 thread", "float64, 2 threads"])
def settings(request):
    """Two settings of the process, so that no optimizer can have left what a test expects."""
    kept = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(request.param[0])
    torch.set_num_threads(request.param[1])
    yield
    torch.set_default_dtype(kept[0])
    torch.set_num_threads(kept[1])


@entries()
def test_global_flags_stay(entry, settings):
    model, before = network(), flags()
    opt = entry(model)
    run(opt, model, 3)
    assert flags() == before
    with torch.no_grad():
        entry(model).zero_grad()
        assert not torch.is_grad_enabled()
    y = torch.vmap(model)(data()[0])  # no transform was left open
    assert not torch.func.functional_call(model, values(model), (data()[0],)).requires_grad
    assert y.shape == (8, 2)


@entries()
def test_the_model_stays_as_it_is(entry):
    """Training flags, buffers, requires_grad, attributes; its state_dict has nothing of the optimizer."""
    model = network()
    model.register_buffer("seen", torch.arange(3.0))
    model[1].eval()
    names = [sorted(vars(m)) for m in model.modules()]
    before = model.training, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    keys, buffer = list(model.state_dict()), model.seen
    opt = entry(model)
    run(opt, model, 2)
    assert before == (
        model.training,
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert list(model.state_dict()) == keys
    assert model.seen is buffer
    assert torch.equal(buffer, torch.arange(3.0))
    assert [sorted(vars(m)) for m in model.modules()] == names


@entries("layerwise")
def test_the_callers_dicts_stay(entry):
    """groups, their layer lists and, where there are masses, these: as given, whatever the optimizer or a scheduler does."""
    if "groups" in entry.options:
        pytest.skip("has groups of its own")
    groups = [{"layers": ["0"], "lr": 0.04}]
    mass = {"2": 0.5, "4.weight": torch.full((2, 4), 0.25)}
    given = {"groups": groups} | ({"mass": mass} if "mass" in entry.hyper else {})
    kept = copy.deepcopy(given)
    model = network()
    opt = entry(model, **given)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(2):
        run(opt, model, 1)
        scheduler.step()
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[-1]["lr"] = 1e-3
    assert given["groups"] == kept["groups"]
    if "mass" in given:
        assert given["mass"].keys() == kept["mass"].keys()
        assert all(torch.equal(torch.as_tensor(given["mass"][n]), torch.as_tensor(kept["mass"][n])) for n in mass)


@entries("model")
def test_a_mass_changed_by_its_owner_afterwards(entry):
    """The dict that was given may be reused for another optimizer: this one does not follow."""
    if "row" in entry.name or "groups" in entry.options:
        pytest.skip("has masses of its own")
    model, other = network(), network()
    mass = {"0": 0.5}
    opt, second = entry(model, mass=mass), entry(other, mass={"0": 0.5})
    mass["0"] = 100.0
    run(opt, model, 2)
    run(second, other, 2)
    assert same(values(model), values(other))


@entries()
def test_a_step_that_fails_changes_nothing(entry):
    """A closure that raises, and for those that see the model a network without per-sample Jacobians."""
    model = network()
    opt = entry(model)
    run(opt, model, 2)
    before, state = values(model), copy.deepcopy(opt.state_dict())

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        opt.step(closure)
    assert torch.is_grad_enabled()
    assert same(values(model), before)
    opt.zero_grad()
    if "model" in entry.traits and "closure" not in entry.traits:
        x, a = data()
        squared(model(x), a).backward()
        model[1] = nn.Dropout(0.5)
        with pytest.raises(ValueError, match="random masks"):
            opt.step()
        model[1] = nn.Tanh()
        opt.zero_grad()
        assert torch.is_grad_enabled()
    assert same(values(model), before)
    found = opt.state_dict()
    assert found["param_groups"] == state["param_groups"]
    for i, held in state["state"].items():
        assert all(torch.equal(torch.as_tensor(found["state"][i][key]), torch.as_tensor(v)) for key, v in held.items())
    other = network()
    run(entry(other), other, 3)
    run(opt, model, 1)
    assert same(values(model), values(other))


@entries()
def test_float64_networks_meet_no_float32(entry):
    """No product of a step is rounded on the way: float64 parameters move by float64 operations only."""
    model = network()
    opt = entry(model)
    narrow: list[str] = []

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() > 0 and out.is_floating_point() and out.dtype != F64:
                narrow.append(f"{func} {out.dtype}")
            return out

    with Types():
        run(opt, model, 1)
    assert not narrow
