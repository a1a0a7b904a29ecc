"""What an optimizer lets go of, memory and hooks, and what it does not cost, for every entry of the table."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.contract import data, entries, network, run, same, squared, values


@pytest.fixture(autouse=True, scope="module")
def _a_young_heap():
    """What is there already is left out of the collector's rounds, which these tests ask for often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def in_memory(where: int) -> bool:
    """True while a tensor, a detached one too, lies at this address."""
    return any(t.data_ptr() == where for t in live_tensors())


@entries()
def test_fifty_steps_leave_nothing_behind(entry):
    model = network()
    opt = entry(model)
    x, a = data()
    run(opt, model, 5, x, a)
    tensors, objects = len(live_tensors()), len(gc.get_objects())
    run(opt, model, 50, x, a)
    assert len(live_tensors()) <= tensors
    assert len(gc.get_objects()) <= objects + 25  # caches of torch and Python breathe a little; one object a step is 50


@entries(lacking=["closure"])
def test_the_graph_goes_with_its_step(entry):
    """Hidden activations, outputs and inputs of a training pass die when the user lets go of the loss."""
    x, a = data()
    model = network()
    opt = entry(model)
    held = []
    handle = model[1].register_forward_hook(lambda module, args, out: held.append(weakref.ref(out)))
    inputs = x.clone()
    held.append(weakref.ref(inputs))
    y = model(inputs)
    loss = squared(y, a)
    held += [weakref.ref(y), weakref.ref(loss)]
    where = inputs.data_ptr()
    loss.backward(retain_graph=True)
    handle.remove()
    assert all(ref() is not None for ref in held)
    assert in_memory(where)
    opt.step()
    del y, loss, inputs
    assert not in_memory(where)
    assert [ref() for ref in held] == [None] * 4
    assert all(p.grad.grad_fn is None and p.grad_fn is None for p in model.parameters())


@entries()
def test_a_pass_without_backward_keeps_nothing(entry):
    """Validation with gradients switched on by oversight: what was recorded goes with the graph."""
    model = network()
    opt = entry(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = data()[0].clone()
            y = model(x)
        held, where = [weakref.ref(x), weakref.ref(y)], x.data_ptr()
        del x, y
        assert not in_memory(where)
        assert [ref() for ref in held] == [None, None]
    if "closure" not in entry.traits:
        assert opt.step() is None


@entries()
def test_zero_grad_lets_go_of_the_samples(entry):
    model = network()
    opt = entry(model)
    x = data()[0].clone()
    model(x).sum().backward()
    where = x.data_ptr()
    del x
    assert in_memory(where) == ("model" in entry.traits)
    opt.zero_grad()
    assert not in_memory(where)


@entries()
def test_model_and_optimizer_die_with_their_last_name(entry):
    model = network()
    opt = entry(model)
    run(opt, model, 2)
    held = [weakref.ref(model), weakref.ref(opt), *[weakref.ref(p) for p in model.parameters()]]
    del model, opt
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def hooks(model: nn.Module) -> int:
    """All forward and backward hooks of all modules, by the public walk over them."""
    return sum(len(getattr(m, name)) for m in model.modules() for name in vars(m) if name.endswith("_hooks"))


@entries()
def test_an_optimizer_that_is_gone_leaves_no_hook(entry):
    model = network()
    before = hooks(model)
    opt = entry(model)
    run(opt, model, 1)
    del opt
    gc.collect()
    assert hooks(model) == before
    squared(model(data()[0]), data()[1]).backward()


@entries()
def test_a_graph_that_outlives_its_optimizer_disturbs_nobody(entry):
    model, (x, a) = network(), data()
    opt = entry(model)
    held = squared(model(x), a)
    held.backward(retain_graph=True)
    del opt
    gc.collect()
    squared(model(x), a).backward()
    held.backward()


@entries("model")
def test_close_removes_every_hook(entry):
    model = network()
    before = hooks(model)
    opt = entry(model)
    assert hooks(model) == before + 1
    run(opt, model, 1)
    opt.close()
    opt.close()
    assert hooks(model) == before
    x = data()[0].clone()
    model(x).sum().backward()
    where = x.data_ptr()
    del x
    assert not in_memory(where)


@entries()
def test_construction_that_fails_leaves_no_hook(entry):
    model = network()
    before = hooks(model)
    with pytest.raises((ValueError, TypeError)):
        entry(model, lr=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        entry(model, no_such_option=1)
    assert hooks(model) == before


class Dispatched(TorchDispatchMode):
    """Every operation that reaches the dispatcher, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched(call) -> list[str]:
    with Dispatched() as mode:
        call()
    return mode.names


@entries()
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_costs_nothing(entry, guard):
    """Not one operation more than the bare model's, and nothing of it is there at the next step."""
    x, _ = data()
    model, bare = network(), network()
    opt = entry(model)
    run(opt, model, 1)
    with guard():
        assert dispatched(lambda: model(x)) == dispatched(lambda: bare(x))
        model(5 * x)
    other = network()
    second = entry(other)
    run(second, other, 1)
    run(opt, model, 1)
    run(second, other, 1)
    assert same(values(model), values(other))


@entries()
def test_a_training_pass_costs_no_operation_either(entry):
    """What the optimizer needs of a pass it takes at the step."""
    x, _ = data()
    model, bare = network(), network()
    opt = entry(model)
    run(opt, model, 1)
    found, expected = dispatched(lambda: model(x)), dispatched(lambda: bare(x))
    assert [name for name in found if "detach" not in name] == [name for name in expected if "detach" not in name]
