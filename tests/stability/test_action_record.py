"""The recorder around a loop: when it looks, what it leaves alone, what it refuses."""

import numpy as np
import pytest
import torch

from nt_kernel import NumericalError
from stability.action_record import record_action
from tests.nt_kernel.cases import F64, mlp
from tests.reference import trainable
from tests.stability.test_action import dense_terms, optimizer, problem, train


def test_every_few_steps_and_by_hand():
    model, x, loss = problem()
    whole = train(model, x, loss, optimizer("sgd", model, 0.1), 5)
    coarse, x, loss = problem()
    action = train(coarse, x, loss, optimizer("sgd", coarse, 0.1), 5, every=2)
    torch.testing.assert_close(action.steps["lr"], torch.tensor([0.2, 0.2, 0.1], dtype=F64))
    torch.testing.assert_close(action.h, whole.h[[0, 2, 4, 5]])
    hand, x, loss = problem()
    opt = optimizer("sgd", hand, 0.1)
    with record_action(hand, x, loss) as by_hand:
        for _ in range(5):
            opt.zero_grad()
            loss(hand(x)).mean().backward()
            opt.step()
            by_hand.mark(opt.param_groups[0]["lr"])
    torch.testing.assert_close(by_hand.steps, whole.steps, rtol=0, atol=0, equal_nan=True)


def test_the_lr_of_a_step_is_the_one_it_was_taken_with():
    model, x, loss = problem()
    opt = optimizer("sgd", model, 0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    with record_action(model, x, loss, optimizer=opt, scale="none") as action:
        for _ in range(3):
            opt.zero_grad()
            loss(model(x)).mean().backward()
            opt.step()
            schedule.step()
    assert action.steps["lr"].tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert action.defect <= 1e-25


def test_mini_batches_are_judged_on_all_data():
    """Woodbury on half of the samples is off the principle of all of them, as the dense matrices say."""
    model, x, loss = problem()
    targets = model(x).detach() - torch.autograd.functional.jacobian(lambda y: loss(y).sum(), model(x).detach())
    start, opt = {n: p.clone() for n, p in trainable(model).items()}, optimizer("woodbury", model, 0.1)
    with record_action(model, x, loss, optimizer=opt) as action:
        (0.5 * (model(x[:2]) - targets[:2]).square().sum(1)).mean().backward()
        opt.step()
    velocity = {n: (p - start[n]) / 0.1 for n, p in trainable(model).items()}
    model.load_state_dict(start)
    *_, mismatch = dense_terms(model, x, loss, velocity)
    assert action.defect == pytest.approx(0.1 * mismatch, rel=1e-9)
    assert action.defect > 1e-3 * action.action


def test_nothing_of_the_training_changes():
    plain, x, loss = problem()
    opt = optimizer("woodbury", plain, 0.1)
    for _ in range(3):
        opt.zero_grad()
        loss(plain(x)).mean().backward()
        opt.step()
    model, x, loss = problem()
    state = torch.random.get_rng_state()
    opt = optimizer("woodbury", model, 0.1)
    train(model, x, loss, opt, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert torch.equal(p, plain.get_parameter(name))
        torch.testing.assert_close(p.grad, plain.get_parameter(name).grad, rtol=0, atol=0)
    opt.zero_grad()
    loss(model(x)).mean().backward()
    opt.step()  # after the with block nobody listens
    assert len(train(model, x, loss, opt, 2)) == 2


def test_a_loop_that_raises_is_let_go():
    model, x, loss = problem()
    opt = optimizer("sgd", model, 0.1)
    action = record_action(model, x, loss, optimizer=opt, every=3)

    def loop():
        with action:
            loss(model(x)).mean().backward()
            opt.step()
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert len(action) == 0
    assert not opt._optimizer_step_post_hooks


def test_a_step_that_goes_nowhere():
    model, x, loss = problem()
    with record_action(model, x, loss) as action:
        action.mark(0.1)
    assert action.steps["misdirection"].item() == action.steps["kinetic"].item() == action.length == 0
    assert action.steps["hamiltonian_relative"].item() == -1
    assert action.steps["alignment"].isnan().all()
    assert action.action == action.action_gap == 0.1 * action.steps["potential"].item()


def test_a_model_in_float32_on_the_principle_to_its_rounding():
    torch.manual_seed(0)
    model, x, a = mlp(3, 5, 2), torch.randn(6, 3), torch.randn(6, 2)
    loss = lambda y: 0.5 * (y - a).square().sum(1)  # noqa: E731
    action = train(model, x, loss, optimizer("woodbury", model, 0.1, solver="cholesky"), 4)
    assert action.steps["hamiltonian_relative"].abs().max() <= 1e-4
    assert action.defect <= 1e-8 * action.action


def test_the_frame():
    model, x, loss = problem()
    action = train(model, x, loss, optimizer("adam", model, 0.01), 3)
    frame = action.to_frame()
    assert list(frame.columns) == list(action.steps)
    assert frame.index.name == "step"
    assert frame["action"].sum() == pytest.approx(action.action)
    assert frame["h"].tolist() == action.h[:-1].tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "means"}, ValueError, "unknown scale"),
        ({"mass": -1.0}, ValueError, "mass must be positive"),
        ({"every": 0}, ValueError, "every must be a whole number of steps"),
        ({"every": True}, ValueError, "every must be a whole number of steps"),
        ({"optimizer": "adam"}, TypeError, "must be a torch.optim.Optimizer, got str"),
        ({"loss": lambda y: y}, ValueError, "losses of the 5 samples"),
        ({"model": "mlp"}, TypeError, "takes the model"),
    ],
)
def test_bad_arguments(options, error, message):
    model, x, loss = problem()
    with pytest.raises(error, match=message):
        record_action(**({"model": model, "x": x, "loss": loss} | options))


@pytest.mark.parametrize(("lr", "error"), [(0.0, ValueError), (-1, ValueError), (np.inf, ValueError), ("1", TypeError)])
def test_a_bad_duration(lr, error):
    model, x, loss = problem()
    with record_action(model, x, loss) as action, pytest.raises(error, match="duration of the step"):
        action.mark(lr)


def test_groups_of_different_lr_have_no_duration():
    model, x, loss = problem()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    with pytest.raises(ValueError, match=r"different lr \(0.1, 0.5\)"):
        record_action(model, x, loss, optimizer=torch.optim.SGD(groups, lr=0.1))


def test_training_that_diverged_is_named_by_its_step():
    model, x, loss = problem()
    with record_action(model, x, loss) as action:
        action.mark(0.1)
        model[2].bias.data.fill_(torch.nan)
        with pytest.raises(NumericalError, match="step 1: the risk or the velocity is not finite"):
            action.mark(0.1)
        assert len(action) == 1
