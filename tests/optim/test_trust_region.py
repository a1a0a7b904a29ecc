"""Steps under a trust region: ratios, descent, rejected moves undone, the account of a step."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from optim import Woodbury
from optim.options.damping import LevenbergMarquardt
from optim.options.second_moment import SecondMomentMass
from optim.options.trust_region import parameters_at
from tests.nt_kernel.cases import F64, Custom, mlp
from tests.optim.problems import closure_of, problem
from tests.reference import Dense, distance, trainable


def two_layers_linear_in_their_parameters():
    draw = torch.Generator().manual_seed(0)
    x, a = (torch.randn(6, k, generator=draw, dtype=F64) for k in (3, 2))
    model = Custom(lambda s, z: s.a(z) + s.b(z.flip(1)), a=nn.Linear(3, 2), b=nn.Linear(3, 2)).to(F64)
    return model, x, a


M = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
LINEAR = {
    "squared": ({}, lambda e: 0.5 * e.square().sum() / 6),
    "definite": (
        {"output_metric": lambda y: M.expand(len(y), 2, 2)},
        lambda e: 0.5 * torch.einsum("ni,ij,nj->", e, M, e) / 6,
    ),
    "sum": ({"scale": "sum", "lr": 0.3}, lambda e: 0.5 * e.square().sum() / 6),
    "network": ({"blocks": "network"}, lambda e: 0.5 * e.square().sum() / 6),
    "mean Jacobian": ({"scale": "mean-jacobian", "lr": 0.1}, lambda e: 0.5 * e.square().sum() / 6),
    "gradient descent": ({"scale": "none", "lr": 0.1}, lambda e: 0.5 * e.square().sum() / 6),
    "momentum": ({"momentum": 0.5, "lr": 0.3}, lambda e: 0.5 * e.square().sum() / 6),
    "second moments": ({"mass": SecondMomentMass(), "lr": 0.1}, lambda e: 0.5 * e.square().sum() / 6),
    "Riemannian decay": ({"weight_decay": 0.7, "decay": "riemannian", "lr": 0.3}, lambda e: 0.5 * e.square().sum() / 6),
}


@pytest.mark.parametrize("case", LINEAR)
def test_the_ratio_is_one_for_a_model_linear_in_its_parameters(case):
    """With M the Hessian of the loss the quadratic model is the loss, the terms between layers included."""
    options, h = LINEAR[case]
    model, x, a = two_layers_linear_in_their_parameters()
    opt = Woodbury(model, **{"lr": 0.5, "mass": 0.1, "damping": LevenbergMarquardt(), **options})
    for _ in range(4):
        loss = opt.step(closure_of(model, opt, x, lambda y: h(y - a))).item()
        for trial in opt.trials:  # also of moves that are too long, where an increase is foretold
            assert trial.actual == pytest.approx(trial.predicted, rel=1e-12, abs=1e-14 * loss)
            assert trial.taken == (trial.predicted > 0)
        assert opt.last_ratio == pytest.approx(1, abs=1e-12 + 1e-14 * loss / trial.predicted)
    if case == "squared":
        assert opt.damping_now == pytest.approx(3.0**-4)


def nonlinear_least_squares(seed=0):
    """Large weights and targets out of reach of one Gauss–Newton step."""
    torch.manual_seed(seed)
    model = mlp(2, 12, 12, 1).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5)
    x = torch.randn(20, 2, dtype=F64)
    a = 3 * torch.sin(3 * x[:, :1]) * x[:, 1:]
    return model, x, lambda y: 0.5 * (y - a).square().sum() / len(a)


@pytest.mark.parametrize("rule", ["nielsen", "marquardt"])
@pytest.mark.parametrize("options", [{}, {"blocks": "network"}, {"momentum": 0.3}])
def test_a_trust_region_descends_where_the_full_step_diverges(rule, options):
    model, x, loss = nonlinear_least_squares()
    plain = copy.deepcopy(model)
    opt = Woodbury(plain, 1.0, mass=1e-3, check_step=False, **options)
    closure = closure_of(plain, opt, x, loss)
    losses = []
    for _ in range(40):
        try:
            losses.append(opt.step(closure).item())
        except (RuntimeError, ValueError):
            losses.append(math.inf)
            break
    assert max(losses) > 2 * losses[0]
    opt = Woodbury(model, 1.0, mass=1e-3, damping=LevenbergMarquardt(rule=rule), **options)
    calls, trials = [], 0
    closure = closure_of(model, opt, x, loss, calls)
    losses = []
    for _ in range(40):
        losses.append(opt.step(closure).item())
        trials += len(opt.trials)
        assert len(calls) == len(losses) + trials
    assert all(later <= earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]
    assert trials > 40  # some moves were undone


def test_the_riemannian_decay_is_part_of_what_must_decrease():
    """Weights far from zero at the least of h: h rises, h + ½w‖θ‖² falls, and the move is taken."""
    model, x, _ = two_layers_linear_in_their_parameters()
    a = model(x).detach()
    h = lambda y: 0.5 * (y - a).square().sum() / 6  # noqa: E731
    whole = lambda: (h(model(x)) + 0.35 * sum(p.square().sum() for p in model.parameters())).item()  # noqa: E731
    opt = Woodbury(model, 0.3, weight_decay=0.7, decay="riemannian", damping=LevenbergMarquardt())
    before = whole()
    assert opt.step(closure_of(model, opt, x, h)).item() == 0
    (trial,) = opt.trials
    assert trial.taken
    assert h(model(x)).item() > 1e-3
    assert trial.actual == pytest.approx(before - whole(), rel=1e-12)
    assert trial.ratio == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"groups": [{"layers": ["2"], "weight_decay": 0.1}]}], ids=["all", "a group"]
)
def test_a_trust_region_has_no_objective_for_decoupled_decay(options):
    with pytest.raises(ValueError, match=r"which decoupled weight decay does not have; write decay=\"riemannian\""):
        Woodbury(mlp(3, 4, 2), damping=LevenbergMarquardt(), **options)
    options = {**options, "decay": "riemannian"}
    Woodbury(mlp(3, 4, 2), damping=LevenbergMarquardt(), **options).close()


def test_a_trust_region_needs_a_closure():
    model, x, loss = problem()
    opt = Woodbury(model, 1.0, damping=LevenbergMarquardt())
    loss(model(x)).backward()
    with pytest.raises(
        ValueError, match=r"damping=LevenbergMarquardt\(…\) compares losses: write opt\.step\(closure\)"
    ):
        opt.step()
    with pytest.raises(TypeError, match="closure must return the loss, a number; it returned None"):
        opt.step(lambda: closure_of(model, opt, x, loss)() and None)


class Counting(nn.Module):
    """A buffer that every pass changes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(1, dtype=F64))

    def forward(self, x):
        return self.inner(x)


def snapshot(model, opt):
    return copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))


@pytest.mark.parametrize("trials", [1, 3])
def test_rejected_moves_are_undone_bit_for_bit(trials):
    model, x, loss = nonlinear_least_squares()
    opt = Woodbury(model, 1.0, mass=SecondMomentMass(), momentum=0.5, damping=LevenbergMarquardt())
    opt.step(closure_of(model, opt, x, loss))
    opt.step(closure_of(model, opt, x, loss))
    opt.damping = LevenbergMarquardt(trials=trials, accept=0.2)
    before, damping, growth = snapshot(model, opt), opt.damping_now, opt.param_groups[0]["growth"]
    assert set(before[1][0]) == {"momentum_buffer", "exp_avg_sq", "step"}
    worse = [loss]  # from the second call of the closure on the loss is 1 higher: no move is ever taken

    def closure():
        opt.zero_grad()
        h = loss(model(x))
        h.backward()
        worse.append(None)
        return h + (len(worse) > 2)

    loss_returned = opt.step(closure)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    after = snapshot(model, opt)
    assert [trial.taken for trial in opt.trials] == [False] * trials
    assert len(worse) == 2 + trials
    assert loss_returned.item() == pytest.approx(loss(model(x)).item(), rel=1e-15)
    assert all(torch.equal(after[0][n], before[0][n]) for n in before[0])
    assert after[1].keys() == before[1].keys()
    for i, held in before[1].items():
        assert all(torch.equal(torch.as_tensor(after[1][i][k]), torch.as_tensor(v)) for k, v in held.items())
    assert opt.damping_now == pytest.approx(damping * math.prod(growth * 2.0**k for k in range(trials)))
    model.zero_grad()
    loss(model(x)).backward()
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())  # those of where it stands


def test_momentum_is_left_out_after_a_rejected_move():
    """Or a buffer that points uphill would be tried again and again."""
    model, x, a = two_layers_linear_in_their_parameters()
    h = LINEAR["squared"][1]
    opt = Woodbury(model, 0.5, momentum=0.9, damping=LevenbergMarquardt())
    closure = closure_of(model, opt, x, lambda y: h(y - a))
    opt.step(closure)
    for p in model.parameters():
        opt.state[p]["momentum_buffer"].mul_(-100)
    before = {n: p.clone() for n, p in trainable(model).items()}
    damping = opt.damping_now
    dense = Dense(model, x, mass=2 * damping)
    opt.step(closure)
    assert [trial.taken for trial in opt.trials] == [False, True]
    assert [trial.damping for trial in opt.trials] == [damping, 2 * damping]
    assert opt.trials[0].ratio == -math.inf  # no decrease was foretold
    solved = dense.solve({n: p.grad for n, p in model.named_parameters()})
    assert distance({n: (before[n] - p) / 0.5 for n, p in trainable(model).items()}, solved) < 1e-11
    torch.testing.assert_close(opt.state[model.a.weight]["momentum_buffer"], solved["a.weight"], rtol=0, atol=1e-11)


def test_a_closure_that_raises_in_a_trial_leaves_everything_as_it_was():
    model, x, loss = nonlinear_least_squares()
    opt = Woodbury(model, 1.0, momentum=0.5, damping=LevenbergMarquardt())
    opt.step(closure_of(model, opt, x, loss))
    before, calls = snapshot(model, opt), []
    groups = copy.deepcopy(opt.state_dict()["param_groups"])

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        return closure_of(model, opt, x, loss)()

    with pytest.raises(KeyError, match="mine"):
        opt.step(closure)
    after = snapshot(model, opt)
    assert all(torch.equal(after[0][n], before[0][n]) for n in before[0])
    assert all(torch.equal(after[1][i]["momentum_buffer"], before[1][i]["momentum_buffer"]) for i in before[1])
    assert opt.state_dict()["param_groups"] == groups


def test_a_loss_that_is_not_finite_is_a_rejected_move():
    model, x, loss = problem()
    opt, calls = Woodbury(model, 1.0, damping=LevenbergMarquardt()), []
    inner = closure_of(model, opt, x, loss)

    def closure():
        calls.append(1)
        return inner() * (math.nan if len(calls) == 2 else 1)

    opt.step(closure)
    assert [trial.ratio == -math.inf for trial in opt.trials] == [True, False]
    assert opt.trials[1].taken


def test_a_trust_region_resumes_bit_for_bit():
    model, x, loss = nonlinear_least_squares()
    make = lambda m: Woodbury(m, 1.0, mass=1e-3, momentum=0.3, damping=LevenbergMarquardt())  # noqa: E731
    opt = make(model)
    for _ in range(3):
        opt.step(closure_of(model, opt, x, loss))
    other = copy.deepcopy(model)
    second = make(other)
    second.load_state_dict(opt.state_dict())
    for _ in range(4):
        a, b = opt.step(closure_of(model, opt, x, loss)), second.step(closure_of(other, second, x, loss))
        assert a.item() == b.item()
        assert opt.trials == second.trials
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_account_of_a_step():
    model, x, loss = problem()
    opt = Woodbury(model, 0.5, damping=LevenbergMarquardt(start=2.0))
    assert (opt.damping_now, opt.last_ratio, opt.trials) == (2.0, None, ())
    h = opt.step(closure_of(model, opt, x, loss)).item()
    (trial,) = opt.trials
    assert trial.damping == 2.0
    assert trial.actual == pytest.approx(h - loss(model(x)).item(), rel=1e-12)
    assert trial.ratio == opt.last_ratio == trial.actual / trial.predicted
    assert opt.damping_now < 2.0
    assert not opt._passes.seen
    assert opt.lambda_max is None  # the loss decides, not a bound


def test_a_model_elsewhere_for_a_while():
    model = Counting(mlp(3, 2).to(F64))
    model.inner[0].weight.grad = kept = torch.ones(2, 3, dtype=F64)
    before = copy.deepcopy(model.state_dict())

    def visit():
        with parameters_at(model, {"inner.0.weight": torch.full((2, 3), 7.0, dtype=F64)}):
            assert model.inner[0].weight[0, 0].item() == 7.0
            assert model.inner[0].weight.grad is None
            model(torch.ones(1, 3, dtype=F64)).sum().backward()
            model.seen += 1
            raise KeyError

    with pytest.raises(KeyError):
        visit()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.inner[0].weight.grad is kept
    assert torch.equal(kept, torch.ones(2, 3, dtype=F64))
    assert model.inner[0].bias.grad is None
