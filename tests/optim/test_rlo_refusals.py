"""What RLO refuses, at construction and in a step, and that nothing is then half-done."""

import copy

import pytest
import torch
from torch import nn

from optim.lyapunov import rlo_rules
from optim.lyapunov.rlo_rules import DIRECTIONS, bend
from optim.rlo import RLO, RLOLambda, RLOLifted
from tests.optim.rlo_runs import gap, net, train
from tests.reference import F64


def unit():
    return nn.Parameter(torch.eye(3, dtype=F64))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"eta": 0.0}, ValueError, r"eta must be in \(0, 1\], got 0.0"),
        ({"eta": 1.5}, ValueError, r"eta must be in \(0, 1\], got 1.5"),
        ({"eta": float("nan")}, ValueError, r"eta must be in \(0, 1\], got nan"),
        ({"eta": True}, TypeError, "eta must be a number"),
        ({"eta": "x"}, TypeError, "eta must be a number"),
        ({"eta": lambda t: 2.0}, ValueError, "got 2.0 of its schedule at step 0"),
        ({"lr": -1.0}, ValueError, r"lr must be in \[0, ∞\), got -1.0"),
        ({"lr": float("inf")}, ValueError, r"lr must be in"),
        ({"lr": "auto"}, TypeError, "lr must be a number"),
        ({"scale": 0.0}, ValueError, r"scale must be in \(0, ∞\), got 0.0"),
        ({"eps": -1e-8}, ValueError, "eps must be in"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair"),
        ({"betas": ()}, TypeError, r"betas must be a pair \(β₁, β₂\), got \(\)"),
        ({"memory": ["ema"]}, ValueError, r"unknown memory \['ema'\]; known are 'gradient'"),
        ({"memory": "lions"}, ValueError, "unknown memory 'lions'.*did you mean 'lion'"),
        ({"direction": "tan"}, ValueError, "unknown direction 'tan'.*did you mean 'tanh'"),
        ({"direction": None}, ValueError, "unknown direction None"),
        ({"normalize": 1}, TypeError, "normalize must be True or False"),
        ({"manifold": "shpere"}, ValueError, "unknown manifold 'shpere'.*did you mean 'sphere'"),
        ({"manifold": 3}, TypeError, "manifold must be one of"),
        ({"manifold": "sphere", "weight_decay": 0.1}, ValueError, "weight_decay=0.1 on the manifold 'sphere'"),
    ],
)
def test_what_is_refused_by_the_optimizer_and_by_a_group(options, error, text):
    with pytest.raises(error, match=text):
        RLO([unit()], **options)
    opt = RLO([unit()])
    with pytest.raises(error, match=text):
        opt.add_param_group({"params": [unit()], **options})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("p", "manifold", "error", "text"),
    [
        (2 * torch.eye(3), "sphere", ValueError, "parameter 0 of the group, .* off the manifold 'sphere' by 1 "),
        (2 * torch.eye(3), "stiefel", ValueError, "off the manifold 'stiefel' by 3 .*onto"),
        (torch.full((2, 2), float("nan")), "sphere", ValueError, "by nan"),
        (torch.ones(3), "stiefel", ValueError, "is a matrix, got the shape"),
        (torch.ones(()), "sphere", ValueError, "got a number"),
        (torch.ones(2, dtype=torch.complex64), "euclidean", TypeError, "complex64"),
    ],
)
def test_parameters_that_are_refused(p, manifold, error, text):
    opt = RLO([unit()])
    with pytest.raises(error, match=text):
        opt.add_param_group({"params": [nn.Parameter(p)], "manifold": manifold})
    assert len(opt.param_groups) == 1
    with pytest.raises(error, match=text):
        RLO([nn.Parameter(p)], manifold=manifold)


@pytest.mark.parametrize("memory", ["gradient", "ema", "lion", "adam"])
@pytest.mark.parametrize(("scale", "dtype"), [(1e-40, torch.float32), (1e-6, torch.float16), (1e-320, F64)])
def test_a_scale_that_the_type_cannot_hold_is_refused(memory, scale, dtype):
    """2/scale is ∞ there, and times a zero gradient NaN."""
    opt, options = RLO([unit()]), {"memory": memory, "scale": scale}
    for make in (lambda p: RLO([p], **options), lambda p: opt.add_param_group({"params": [p], **options})):
        with pytest.raises(ValueError, match=r"scale=1e-\d+ is too small for parameter 0 of the group, torch.float"):
            make(nn.Parameter(torch.ones(2, dtype=dtype)))
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("memory", ["gradient", "ema", "lion", "adam"])
def test_what_scale_is_taken_stays_at_a_zero_gradient(memory):
    taken = 0
    for exponent in range(-46, 1):
        p = nn.Parameter(torch.ones(2))
        try:
            opt = RLO([p], 0.1, memory=memory, scale=10.0**exponent)
        except ValueError:
            continue
        taken += 1
        p.grad = torch.zeros(2)
        opt.step()
        assert p.tolist() == [1, 1], exponent
    assert taken >= 30  # down to 1e-35 with Adam's ε = 1e-8, to 1e-38 without
    RLO([nn.Parameter(torch.ones(2))], scale=1e-40, direction="sign")  # uses no scale


def test_torch_refuses_what_it_always_refuses():
    with pytest.raises(ValueError, match="empty parameter list"):
        RLO([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        RLO(torch.ones(2))
    with pytest.raises(TypeError, match="ordered collections"):
        RLO([{"params": {unit()}}])
    p = unit()
    with pytest.raises(ValueError, match="more than one parameter group"):
        RLO([{"params": [p]}, {"params": [p]}])
    assert len(RLO(nn.Linear(2, 2).named_parameters()).param_groups[0]["params"]) == 2


def test_lambda_and_lifted_say_which_is_which():
    with pytest.raises(TypeError, match="RLOLambda has no eta"):
        RLOLambda([unit()], eta=0.5)
    with pytest.raises(ValueError, match="RLOLifted needs an eta below 1"):
        RLOLifted([unit()], eta=1.0)


def test_a_group_or_a_state_of_the_other_class_is_refused():
    fast, slow = RLOLambda([unit()]), RLOLifted([unit()], eta=0.2)
    for make, opt, options, text in (
        (
            RLOLambda,
            fast,
            {"eta": 0.3},
            "RLOLambda keeps no velocity, got a group with eta=0.3; expected eta=1, or use",
        ),
        (RLOLambda, fast, {"eta": lambda t: 0.5}, "got a group with eta=a schedule"),
        (RLOLifted, slow, {"eta": 1.0}, "RLOLifted keeps a velocity in every group, got one made with eta=1; expected"),
    ):
        with pytest.raises(ValueError, match=text):
            make([{"params": [unit()], **options}])
        with pytest.raises(ValueError, match=text):
            opt.add_param_group({"params": [unit()], **options})
        assert len(opt.param_groups) == 1
    for opt, other, text in ((slow, fast, "RLOLifted keeps a velocity"), (fast, slow, "RLOLambda keeps no velocity")):
        before = str(opt.state_dict())
        with pytest.raises(ValueError, match=text):
            opt.load_state_dict(other.state_dict())
        assert str(opt.state_dict()) == before
    with pytest.raises(ValueError, match="expected the state_dict of an RLO, got a group with amsgrad, "):
        slow.load_state_dict(torch.optim.Adam([unit()]).state_dict())
    either = RLO([unit()], eta=0.2)  # is both
    either.load_state_dict(fast.state_dict())
    fast.add_param_group({"params": [unit()], "eta": 1})


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("direction", "tan", ValueError, "unknown direction 'tan'.*did you mean 'tanh'"),
        ("memory", "lio", ValueError, "unknown memory 'lio'.*did you mean 'lion'"),
        ("memory", ["ema"], ValueError, "unknown memory"),
        ("scale", 0, ValueError, r"scale must be in \(0, ∞\), got 0"),
        ("scale", 1e-320, ValueError, "scale=1e-320 is too small for parameter 0 of the group, torch.float64"),
        ("betas", (), TypeError, "betas must be a pair"),
        ("eps", -1.0, ValueError, "eps must be in"),
        ("normalize", 1, TypeError, "normalize must be True or False"),
        ("weight_decay", float("nan"), ValueError, "weight_decay must be in"),
        ("manifold", "shpere", ValueError, "unknown manifold 'shpere'"),
        ("manifold", "stiefel", ValueError, "off the manifold 'stiefel'"),
        ("lr", float("nan"), ValueError, r"lr must be in \[0, ∞\), got nan"),
        ("lr", "auto", TypeError, "lr must be a number, got 'auto'"),
    ],
)
def test_an_option_set_between_steps_is_checked_like_one_at_construction(name, value, error, text):
    model = net()
    opt = RLO([{"params": model[0].parameters()}, {"params": [model[2].weight]}], memory="adam")
    train(model, opt, 2)
    opt.param_groups[1][name] = value

    def refused():
        for _ in range(2):  # not only where it is new
            with pytest.raises(error, match=text):
                opt.step()

    as_before(opt, model, refused)


def test_a_model_cast_after_construction_is_checked_again():
    model = net()
    opt = RLO(model.parameters(), memory="adam")
    train(model.half(), RLO(model.parameters()), 1)
    with pytest.raises(ValueError, match=r"eps=1e-08 is too small for parameter 0 of the group, torch.float16"):
        opt.step()


@pytest.mark.parametrize("on_cpu", [True, False])  # off the CPU another order of operations
@pytest.mark.parametrize("direction", [*DIRECTIONS, lambda u: -u])
def test_an_eps_that_the_type_cannot_hold_is_refused_for_every_direction(direction, on_cpu, monkeypatch):
    """(1 − β₁)·eps = 1e-9 is 0 in float16, and 0/0 NaN; what is taken stays where it is."""
    for dtype, eps in ((torch.float16, 1e-8), (torch.float32, 1e-45), (F64, 5e-324)):
        p = nn.Parameter(torch.ones(2, dtype=dtype))
        with pytest.raises(ValueError, match=f"eps={eps} is too small for parameter 0 of the group, {dtype}"):
            RLO([p], memory="adam", direction=direction, eps=eps)
    monkeypatch.setattr(rlo_rules, "_on_cpu", lambda tensors: on_cpu)
    for dtype, eps in ((torch.float16, 1e-4), (torch.bfloat16, 1e-8), (torch.float32, 1e-36), (F64, 1e-300)):
        p = nn.Parameter(torch.ones(2, dtype=dtype))
        opt = RLO([p], 0.5, memory="adam", direction=direction, eps=eps)
        p.grad = torch.zeros_like(p)
        opt.step()
        assert p.tolist() == [1, 1]


def test_bend_knows_its_directions():
    with pytest.raises(ValueError, match=r"unknown direction 'tan'; .*did you mean 'tanh'"):
        bend("tan", [torch.ones(2)])


def as_before(opt, model, run):
    """``run`` raises what the test expects; then nothing of the optimizer or the model has moved."""
    before, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict()["state"])
    run()
    assert gap(model, before) == 0
    assert str(opt.state_dict()["state"]) == str(state)


def test_a_step_that_is_refused_leaves_everything():
    model = net()
    opt = RLOLifted([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1)
    train(model, opt, 2)
    opt.param_groups[1]["eta"] = 0.0

    def refused():
        with pytest.raises(ValueError, match=r"eta must be in \(0, 1\], got 0.0"):
            opt.step()

    as_before(opt, model, refused)
    fixed = RLOLambda(model.parameters())
    fixed.param_groups[0]["eta"] = 0.5
    with pytest.raises(ValueError, match="keeps no velocity; use RLOLifted"):
        fixed.step()

    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        RLO(table.parameters()).step()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda u: u.sum(), ValueError, "shape, dtype and device"),
        (lambda u: u.float(), ValueError, "float32"),
        (lambda u: None, TypeError, "NoneType"),
        (lambda u: u.nonsense, AttributeError, "nonsense"),
    ],
)
def test_a_direction_that_fails_leaves_everything(wrong, error, text):
    model, broken = net(), []
    fine = lambda u: -u  # noqa: E731
    opt = RLOLifted(
        [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "direction": lambda u: (wrong if broken else fine)(u)},
        ],
        memory="adam",
    )
    train(model, opt, 2)
    broken.append(True)

    def refused():
        with pytest.raises(error, match=text):
            opt.step()

    as_before(opt, model, refused)
