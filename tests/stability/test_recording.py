"""What ``record`` sees of a loop, and that it changes nothing of it."""

import copy

import pytest
import torch
from torch import nn

from stability import ClosedLoop, certify, record
from stability.recording.batches import RowFinder
from tests.stability.recorded import EXACT, F64, OPTIMIZERS, data, half_squares, linear, mlp, trained


def step(model, optimizer, x, a, loss=half_squares):
    optimizer.zero_grad()
    loss(model(x), a).mean().backward()
    optimizer.step()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.05)


def test_training_is_what_it_would_have_been_bit_for_bit():
    x, a = data(5, 2, 2)
    for name in ("adam", "woodbury", "heavy-ball"):
        bare, model = mlp(2, 2), mlp(2, 2)
        optimizer = OPTIMIZERS[name](bare, 0.1)
        for _ in range(3):
            step(bare, optimizer, x, a)
        optimizer = OPTIMIZERS[name](model, 0.1)
        with record(model, x, optimizer, targets=a):
            for _ in range(3):
                step(model, optimizer, x, a)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), bare.parameters(), strict=True))
        assert not optimizer._optimizer_step_post_hooks


def test_rows_are_read_off_the_passes_that_trained():
    x, a = data(6, 2, 2)
    model = mlp(2, 2)
    optimizer = adam(model)
    with record(model, x, optimizer) as run:
        step(model, optimizer, x, a)
        step(model, optimizer, x[[4, 1]], a[[4, 1]])
        optimizer.zero_grad()
        for rows in ([0, 3], [5]):  # micro-batches; evaluation passes do not count
            (half_squares(model(x[rows]), a[rows]).sum() / 3).backward()
            model(x[[2]])
        with torch.no_grad():
            model(x)
        optimizer.step()
        step(model, optimizer, x + 0.1, a)  # augmented
        run.batch([1, 2])
        step(model, optimizer, x[[1, 2]] + 0.1, a[[1, 2]])
        run.batch(torch.tensor([True, False, False, False, True, False]))
        step(model, optimizer, x + 0.1, a)
        run.batch(range(6))
        step(model, optimizer, x + 0.1, a)
    assert run.rows[0] is None
    assert run.rows[1].tolist() == [4, 1]
    assert run.rows[2].tolist() == [0, 3, 5]
    assert run.rows[3] == "not rows of x"
    assert [run.rows[4].tolist(), run.rows[5].tolist(), run.rows[6]] == [[1, 2], [0, 4], None]
    assert any("not rows of x" in line for line in ClosedLoop(run).description)
    assert not ClosedLoop(run).exact


def test_steps_without_a_known_batch_have_the_identity_for_a_closed_loop():
    x, a = data(4, 2, 2)
    model = mlp(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, x, optimizer) as run:
        step(model, optimizer, x + 0.1, a)
        step(model, optimizer, x, a)
    first, second = ClosedLoop(run).matrices()
    assert torch.equal(first, torch.eye(8, dtype=F64))
    assert not torch.equal(second, first)


def test_equal_rows_of_x_are_one():
    x, a = data(4, 2, 2)
    x[2] = x[0]
    run = trained(mlp(2, 2), EXACT["sgd"], x, a, steps=1)
    assert run.rows[0].tolist() == [0, 1, 0, 3]  # e is the same at both: so is A_t e
    e = torch.randn(4, 2, dtype=F64)
    e[2] = e[0]
    explicit = trained(mlp(2, 2), EXACT["sgd"], x, a, steps=1)
    explicit.rows[0] = None
    (A,), (B,) = ClosedLoop(run).matrices(), ClosedLoop(explicit).matrices()
    torch.testing.assert_close(A @ e.flatten(), B @ e.flatten())


def test_the_gradient_is_held_against_the_declared_loss():
    x, a = data(5, 2, 2)
    mse = lambda y, b: (y - b).square().sum(1)  # noqa: E731
    wrong = trained(mlp(2, 2), EXACT["sgd"], x, a, loss=mse)
    assert wrong.gradient_defect == pytest.approx(1.0)  # twice the gradient
    right = trained(mlp(2, 2), EXACT["sgd"], x, a, loss=mse, record_loss=mse)
    assert right.gradient_defect < 1e-12
    assert trained(mlp(2, 2), EXACT["sgd"], x, a, targets=None).gradient_defect is None
    named = trained(mlp(2, 2), EXACT["sgd"], x, a, loss=lambda y, b: (y - b).square().mean(1), record_loss="mse")
    assert named.gradient_defect < 1e-12
    assert any("not that of the declared loss" in note for note in certify(wrong, wrong).notes)
    assert certify(right, right).notes == ()


def test_marks_by_hand():
    x, a = data(4, 2, 2)
    model = linear(2, 2)
    by_hand, automatic = (
        record(model, x, targets=a),
        trained(model, EXACT["sgd"], x, a, batches=[torch.tensor([0, 2])] * 3, steps=3),
    )
    model = by_hand.model
    with by_hand as run:
        for _ in range(3):
            rows = [0, 2]
            g = torch.autograd.grad(half_squares(model(x[rows]), a[rows]).mean(), list(model.parameters()))
            with torch.no_grad():
                for p, q in zip(model.parameters(), g, strict=True):
                    p -= 0.1 * q
            run.mark(rows, lr=0.1)
    for A, B in zip(ClosedLoop(run).matrices(), ClosedLoop(automatic).matrices(), strict=True):
        torch.testing.assert_close(A, B, rtol=1e-12, atol=1e-12)
    with record(model, x) as run:
        run.mark()
    assert torch.equal(ClosedLoop(run).matrices()[0], torch.eye(8, dtype=F64))
    assert "mark() was given no lr" in ClosedLoop(run).description[0]
    with pytest.raises(TypeError, match="recorded as they come"):
        record(model, x, adam(model)).mark()


def test_an_optimizer_nobody_knows_is_the_path():
    class Mine(torch.optim.SGD):
        """May do anything."""

    x, a = data(4, 2, 2)
    a2 = a.clone()
    a2[0] += 1
    make = lambda m, lr: Mine(m.parameters(), lr=lr)  # noqa: E731
    found = certify(trained(mlp(2, 2), make, x, a), trained(mlp(2, 2), make, x, a2))
    assert "no closed loop is known for Mine" in found.description[0]
    torch.testing.assert_close(found["T4"].series, found["path_l2"].series)


def test_groups_that_disagree_in_momentum_are_the_path():
    x, a = data(4, 2, 2)
    make = lambda m, lr: torch.optim.SGD(  # noqa: E731
        [{"params": m[0].parameters(), "momentum": 0.5}, {"params": m[2].parameters()}], lr=lr
    )
    assert "differ in momentum" in ClosedLoop(trained(mlp(2, 2), make, x, a)).description[0]


def test_the_budget_holds_and_says_what_it_cost():
    x, a = data(4, 2, 2)
    a2 = a.clone()
    a2[0] += 1
    bytes_of_one = 8 * sum(p.numel() for p in mlp(2, 2).parameters())
    options = {"steps": 21, "memory": 11 * bytes_of_one, "lr": 0.05}
    runs = [trained(mlp(2, 2), OPTIMIZERS["adam"], x, b, **options) for b in (a, a2)]
    for run in runs:
        assert run.nbytes <= 11 * bytes_of_one
        assert run.times[0] == 0
        assert run.times[-1] == 21
    whole = [trained(mlp(2, 2), OPTIMIZERS["adam"], x, b, steps=21, lr=0.05) for b in (a, a2)]
    found, all_of_it = certify(*runs), certify(*whole)
    assert found.times == tuple(runs[0].times)
    assert "step was kept within the budget" in found.notes[0]
    torch.testing.assert_close(found.errors, all_of_it.errors[list(found.times)], rtol=0, atol=0)
    assert found.measured["sup"] <= all_of_it.measured["sup"]
    mixed = certify(runs[0], whole[1])  # the grid of the coarser run
    assert mixed.times == found.times


def test_models_of_all_kinds():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(4, 2)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, u, v):
            return {"y": self.inner(torch.cat([u, v], 1)), "rest": u}

    (u, a), (v, _) = data(4, 2, 2), data(4, 2, 2, seed=1)
    runs = []
    for target in (a, a + torch.tensor([[1.0], [0], [0], [0]], dtype=F64)):
        torch.manual_seed(0)
        model = Two()
        optimizer = adam(model)
        with record(model, (u, v), optimizer, targets=target, output=lambda out: out["y"]) as run:
            for rows in ([0, 1], [2, 3]):
                optimizer.zero_grad()
                half_squares(model(u[rows], v[rows])["y"], target[rows]).mean().backward()
                optimizer.step()
        runs.append(run)
    found = certify(*runs, held_out=(u + 1, v))
    assert [rows.tolist() for rows in runs[0].rows] == [[0, 1], [2, 3]]
    assert found.replaced == (0,)
    assert found["T5"].value >= found.measured["sup"] > 0
    assert found.measured["heldout"] > 0


def test_inputs_of_another_make_do_not_stop_the_loop():
    class Scaled(nn.Linear):
        def forward(self, x, scale=None):
            return super().forward(x if scale is None else x * scale)

    x, a = data(4, 2, 2)
    model = Scaled(2, 2).double()
    optimizer = adam(model)
    with record(model, x, optimizer) as run:
        for args, kwargs in (
            ((x, torch.tensor(1.0)), {}),
            ((), {"x": x}),
            ((x, torch.ones(2).double()), {}),
            ((x,), {}),
        ):
            optimizer.zero_grad()
            half_squares(model(*args, **kwargs), a).mean().backward()
            optimizer.step()
    words = ["not rows of x", "the model was called without positional inputs", "not rows of x", None]
    assert run.rows == words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_rows_of_any_dtype(dtype):
    x = torch.tensor([[1, 2], [3, 4], [5, 6]]).to(dtype)
    assert RowFinder(x).rows([x[[2, 0]]]).tolist() == [2, 0]
    assert RowFinder(x[:, 0]).rows([x[:, 0]]) is None


def test_float32_runs_are_read_in_float64():
    x, a = data(4, 2, 2)
    runs = []
    for target in (a, a + torch.tensor([[1.0], [0], [0], [0]], dtype=F64)):
        model = mlp(2, 2).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with record(model, x.float(), optimizer, targets=target.float()) as run:
            for _ in range(4):
                step(model, optimizer, x.float(), target.float())
        runs.append(run)
    found = certify(*runs)
    assert found.errors.dtype == F64
    assert runs[0].gradient_defect < 1e-5
    assert found["T4"].value >= found["T5_l2"].value >= found.measured["l2"] > 0


def test_bad_arguments_are_named():
    x, a = data(4, 2, 2)
    model = mlp(2, 2)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        record(lambda x: x, x)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        record(model, x, model.parameters())
    with pytest.raises(ValueError, match="one row for each of the 4"):
        record(model, x, targets=a[:3])
    with pytest.raises(ValueError, match="unknown loss 'square'"):
        record(model, x, loss="square")
    with pytest.raises(TypeError, match="loss must be a name or a function"):
        record(model, x, loss=1.0)
    with pytest.raises(ValueError, match="memory must hold 6 snapshots"):
        record(model, x, memory=100)
    run = record(model, x)
    for rows, what in (([4], r"0\.\.3"), ([0.5], "indices"), ([], "indices"), ([[0]], "indices"), ([-1], r"0\.\.3")):
        with pytest.raises(ValueError, match=what):
            run.mark(rows)
    with pytest.raises(ValueError, match="lr must be"):
        run.mark(lr=-1.0)
    with pytest.raises(ValueError, match=r"write record\(…, targets=a\)"):
        run.loss.values(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="depends on the targets"):
        record(model, x, loss="huber").loss.curvature(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one loss per sample"):
        trained(model, EXACT["sgd"], x, a, record_loss=lambda y, b: half_squares(y, b).mean())


def test_a_record_goes_on_where_it_stopped_or_not_at_all():
    x, a = data(4, 2, 2)
    model = mlp(2, 2)
    optimizer = adam(model)
    run = record(model, x, optimizer, targets=a)
    for _ in range(2):
        with run:
            step(model, optimizer, x, a)
    assert len(run) == 2
    step(model, optimizer, x, a)
    with pytest.raises(ValueError, match="have moved since"):
        run.__enter__()


def test_copies_of_a_recorded_model_are_not_recorded():
    x, a = data(4, 2, 2)
    model = mlp(2, 2)
    optimizer = adam(model)
    with record(model, x, optimizer) as run:
        other = copy.deepcopy(model)
        half_squares(other(x[[1]]), a[[1]]).mean().backward()
        step(model, optimizer, x, a)
    assert run.rows == [None]
