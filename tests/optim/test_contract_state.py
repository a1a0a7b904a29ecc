"""What an optimizer carries through checkpoints, processes, copies and casts, for every entry of the table."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optim.contract import (
    F64,
    NAMES,
    TABLE,
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
ROOT = Path(__file__).resolve().parents[2]


def through_a_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> dict:
    """{entry: (parameters 3 steps after the checkpoint, the same in a fresh process)}; one process for the whole table."""
    path = tmp_path_factory.mktemp("resume") / "checkpoints"
    saved, expected = {}, {}
    for entry in TABLE:
        model = network()
        try:
            opt = entry(model)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
            run(opt, model, 2)
            scheduler.step()
            saved[entry.name] = copy.deepcopy({"model": model.state_dict(), "optimizer": opt.state_dict()})
            run(opt, model, 3)
            expected[entry.name] = values(model)
        except Exception as error:  # that entry's own tests fail, not those of the others
            expected[entry.name] = error
    torch.save(saved, path)
    command = [sys.executable, "-m", "tests.optim.contract", str(path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True)
    reached = torch.load(f"{path}.done", weights_only=True)
    return {name: (wanted, reached.get(name)) for name, wanted in expected.items()}


@entries()
def test_a_fresh_process_goes_on_bit_for_bit(entry, resumed):
    expected, found = resumed[entry.name]
    assert not isinstance(expected, Exception), expected
    assert not isinstance(found, str), found
    assert same(found, expected)


@entries()
def test_the_state_matters(entry):
    """A stateful optimizer that forgets goes elsewhere: the test above tests something."""
    model, other = network(), network()
    opt = entry(model)
    run(opt, model, 2)
    other.load_state_dict(model.state_dict())
    run(opt, model, 1)
    run(entry(other), other, 1)
    assert same(values(other), values(model)) != bool({"state", "memory"} & entry.traits)
    assert bool(state_tensors(opt)) == ("state" in entry.traits)


@entries()
def test_a_checkpoint_brings_its_hyperparameters(entry):
    """Loaded into an optimizer made with others, it goes on under its own."""
    if "groups" in entry.options:
        pytest.skip("has groups of its own")
    model, other = network(), network()
    options = {key: value for key, value in entry.hyper.items() if not (key == "mass" and "row" in entry.name)}
    opt = entry(model, **{"lr": 0.02, **options})
    run(opt, model, 2)
    second = entry(other)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(through_a_file(opt.state_dict()))
    run(opt, model, 3)
    run(second, other, 3)
    assert same(values(other), values(model))


@entries()
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_state_keeps_its_type(entry, dtype):
    model, other = network(dtype=dtype), network(dtype=dtype)
    opt, second = entry(model), entry(other)
    run(opt, model, 2)
    second.load_state_dict(through_a_file(opt.state_dict()))
    kept, loaded = state_tensors(opt), state_tensors(second)
    assert len(kept) == len(loaded)
    for a, b in zip(kept, loaded, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert not a.requires_grad
        assert a.dtype == dtype or a.dim() == 0


@entries()
def test_state_dict_and_loading_it_change_nothing_else(entry):
    """state_dict() is a reading; what was given to load_state_dict stays as it was, also by later steps."""
    model, other = network(), network()
    opt = entry(model)
    run(opt, model, 2)
    opt.state_dict()
    saved, theta = copy.deepcopy(opt.state_dict()), values(model)
    kept = copy.deepcopy(saved)
    assert same(values(model), theta)
    second = entry(other)
    second.load_state_dict(saved)
    assert same(values(model), theta)
    assert saved["param_groups"] == kept["param_groups"]
    run(opt, model, 1)
    reference = network()
    third = entry(reference)
    run(third, reference, 3)
    assert same(values(model), values(reference))
    assert saved["param_groups"] == kept["param_groups"]


@entries()
def test_a_checkpoint_of_another_shape_is_refused(entry):
    opt, other = (
        entry(network()),
        entry(network(), **({} if "groups" in entry.options else {"groups": [{"layers": ["0"]}]})),
    )
    saved = copy.deepcopy(opt.state_dict())
    if "groups" not in entry.options:
        with pytest.raises(ValueError, match="different number of parameter groups"):
            other.load_state_dict(saved)
    saved["param_groups"][0]["params"].append(99)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        opt.load_state_dict(saved)


@entries()
def test_a_checkpoint_on_another_type(entry):
    """From float64 to a float32 network: it goes on in float32 close to the run in float64."""
    model, other = network(), network(dtype=F32)
    opt = entry(model)
    run(opt, model, 2)
    second = entry(other)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(through_a_file(opt.state_dict()))
    run(opt, model, 2)
    run(second, other, 2)
    assert all(p.dtype == F32 for p in other.parameters())
    assert all(v.dtype == F32 for v in state_tensors(second))
    assert_close({n: p.double() for n, p in values(other).items()}, values(model), 1e-5)


@entries()
def test_a_deep_copy_of_model_and_optimizer_goes_on_by_itself(entry):
    model = network()
    opt = entry(model)
    run(opt, model, 2)
    twin, second = copy.deepcopy((model, opt))
    before = values(model)
    run(second, twin, 3)
    assert same(values(model), before)
    run(opt, model, 3)
    assert same(values(twin), values(model))


@entries()
def test_a_deep_copy_of_the_optimizer_alone_leaves_the_original_alone(entry):
    """In torch it moves copies of the parameters, which nobody sees."""
    model, other = network(), network()
    opt = entry(model)
    run(opt, model, 2)
    copied = copy.deepcopy(opt)
    run(opt, model, 2)
    reference = entry(other)
    run(reference, other, 4)
    assert same(values(model), values(other))
    assert len(copied.param_groups) == len(opt.param_groups)
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    assert not held & {id(p) for group in copied.param_groups for p in group["params"]}


@entries()
def test_model_and_optimizer_pickled_together(entry):
    model = network()
    opt = entry(model)
    run(opt, model, 2)
    twin, second = pickle.loads(pickle.dumps((model, opt)))
    assert {id(p) for group in second.param_groups for p in group["params"]} == {id(p) for p in twin.parameters()}
    run(opt, model, 3)
    run(second, twin, 3)
    assert same(values(twin), values(model))


@entries(lacking=["closure"])
def test_a_copy_between_backward_and_step(entry):
    """Gradients are not copied with parameters' data by pickle, but a deep copy has them: its step is the original's."""
    x, a = data()
    model = network()
    opt = entry(model)
    run(opt, model, 1)
    opt.zero_grad()
    squared(model(x), a).backward()
    saved = copy.deepcopy(opt.state_dict())
    theta = copy.deepcopy(model.state_dict())
    opt.step()
    other = network()
    other.load_state_dict(theta)
    second = entry(other)
    second.load_state_dict(saved)
    run(second, other, 1)
    assert same(values(other), values(model))


@entries()
def test_a_model_cast_after_construction(entry):
    """Before the first step: as if made after the cast."""
    model, other = network(dtype=F32), network(dtype=F32).double()
    opt = entry(model)
    model.double()
    run(opt, model, 3)
    run(entry(other), other, 3)
    assert all(p.dtype == F64 for p in model.parameters())
    assert same(values(model), values(other))
    assert all(v.dtype == F64 or v.dim() == 0 for v in state_tensors(opt))


@entries(failing={"Adam": "torch leaves the state in its old type, and its lerp refuses two types"})
def test_a_model_cast_in_the_middle_of_a_run(entry):
    model, other = network(dtype=F32), network()
    opt, second = entry(model), entry(other)
    run(opt, model, 2)
    model.double()
    run(opt, model, 2)
    run(second, other, 4)
    assert all(p.dtype == F64 for p in model.parameters())
    assert_close(values(model), values(other), 1e-5)
    model.float()
    run(opt, model, 1)
    assert all(p.dtype == F32 and bool(p.isfinite().all()) for p in model.parameters())


@entries()
def test_a_model_moved_after_construction(entry, device):
    """Before the first step: its state is made where the parameters are."""
    model, other = network(), network()
    opt = entry(model)
    model.to(device)
    x, a = (t.to(device) for t in data())
    run(opt, model, 3, x, a)
    run(entry(other), other, 3)
    assert all(p.device.type == device for p in model.parameters())
    assert_close({n: p.cpu() for n, p in values(model).items()}, values(other))


@entries()
def test_new_values_in_the_parameters_are_seen(entry):
    """load_state_dict and in-place initialisation of the model in the middle of a run: nothing of the old values is kept."""
    theta = points(2)
    model, other = network(), network(5)
    opt, second = entry(model), entry(other)
    assert all(same(a, b) for a, b in zip(steps_from(opt, model, theta), steps_from(second, other, theta), strict=True))


def test_the_table_holds_each_name_once():
    assert len(NAMES) == len(TABLE)
