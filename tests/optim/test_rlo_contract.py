"""RLO as a torch optimizer: resuming, copies, closures, global state, devices."""

import copy
import io
import pickle

import pytest
import torch

from optim.rlo import RLO, RLOLifted
from tests.optim.rlo_runs import draw, gap, net, train
from tests.reference import F64

STATEFUL = {
    "lifted": {"eta": 0.2},
    "scheduled": {"eta": lambda t: 1 / (1 + 0.1 * t)},
    "adam": {"memory": "adam", "eta": 0.5, "normalize": True},
    "lion": {"memory": "lion", "direction": "sign", "eta": 1.0},
    "own direction": {"direction": lambda u: -u.clamp(-0.01, 0.01)},
}


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_is_the_same_bit_for_bit(name, dtype):
    options = {"lr": 0.01, "weight_decay": 0.1, **STATEFUL[name]}
    model = net(dtype)
    opt = RLO(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    train(model, opt, 5, scheduler=schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), schedule.state_dict()], file)
    train(model, opt, 5, 5, schedule)

    other = net(dtype, seed=7)
    again = RLO(other.parameters(), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(again, 0.9)
    file.seek(0)
    for thing, state in zip((other, again, schedule), torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(state)
    kept = copy.deepcopy(opt.state_dict())
    train(other, again, 5, 5, schedule)
    assert gap(model, other) == 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == again.state[q].keys()
        for slot, value in opt.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[q][slot]))
            assert not isinstance(value, torch.Tensor) or value.dtype == dtype
    assert again.param_groups[0]["steps"] == 10
    assert str(kept) == str(opt.state_dict())


def test_copies_and_pickles_continue_alike():
    model = net()
    opt = RLOLifted(model.parameters(), 0.01)
    opt.observers.append(lambda seen: None)
    train(model, opt, 3)
    for model2, opt2 in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        assert type(opt2) is RLOLifted
        assert opt2.observers == []
        original, same = copy.deepcopy((model, opt))
        assert train(original, same, 3, 3) == train(model2, opt2, 3, 3)
        assert gap(original, model2) == 0
    opt.load_state_dict(opt.state_dict())
    assert len(opt.observers) == 1


def test_a_state_of_other_groups_is_refused():
    opt = RLO(net().parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        RLO([{"params": [p]} for p in net().parameters()]).load_state_dict(opt.state_dict())


def test_closure_runs_once_with_gradients_and_its_loss_is_returned():
    model, calls = net(), []
    opt = RLO(model.parameters(), lr=0.0)

    def closure():
        opt.zero_grad()
        loss = model(draw(4, 3)).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    assert opt.step(closure) is calls[0]
    assert len(calls) == 1
    assert RLO(net().parameters()).step() is None


def test_a_run_changes_no_global_state():
    state = torch.random.get_rng_state()
    model = net()
    train(model, RLO(model.parameters(), normalize=True), 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_saved_option_beats_the_loading_optimizers_own():
    saved = RLO(net().parameters(), direction="sign", manifold="euclidean", eta=0.7).state_dict()
    model = net()
    opt = RLO(model.parameters(), direction="tanh", eta=lambda t: 0.1)
    kept = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    assert saved == kept
    assert [opt.param_groups[0][k] for k in ("direction", "eta", "eta_schedule")] == ["sign", 0.7, None]


def test_on_each_device(device):
    model = net(torch.float32).to(device)
    start = copy.deepcopy(model)
    opt = RLOLifted(model.parameters(), 0.01, memory="adam", normalize=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert gap(model, start) > 0
    assert all(opt.state[p]["velocity"].device == p.device for p in model.parameters())


def test_a_model_that_is_cast_between_steps_goes_on():
    model = net()
    opt = RLOLifted(model.parameters(), 0.01, memory="adam")
    train(model, opt, 2)
    other = copy.deepcopy(model)
    again = RLOLifted(other.parameters(), 0.01, memory="adam")
    again.load_state_dict(opt.state_dict())
    model.float()
    train(model, opt, 2, 2)
    train(other, again, 2, 2)
    assert all(p.dtype == opt.state[p]["velocity"].dtype == torch.float32 for p in model.parameters())
    assert gap(model.double(), other) < 1e-5


def test_what_a_step_writes_to_is_neither_saved_nor_copied():
    model = net()
    opt = RLO(model.parameters(), memory="gradient")
    train(model, opt, 1)
    assert {slot for state in opt.state.values() for slot in state} == {"step", "velocity"}
    twin, other = copy.deepcopy((model, opt))
    train(twin, other, 1, 1)
    train(model, opt, 1, 1)
    assert gap(model, twin) == 0
