"""The optimizer in the ordinary loop: G⁻¹ of whatever stands in p.grad, against dense solves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nt_kernel import layer_factors
from optim import Woodbury, woodbury_step
from optim.steps.direction import gradient_share
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.optim.problems import LR, OPTIONS, call, check_step_is_dense, gradients, optimizer, problem
from tests.reference import Dense, distance, trainable


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.output])
def test_step_is_the_dense_solve(name, option):
    model, x, loss = problem(name)
    options = OPTIONS[option]
    if options.get("output_metric") == "cross_entropy" and Dense(model, x).C == 1:
        return
    opt = optimizer(model, **options)
    loss(call(model, x)).backward()
    if name == "unused layer":
        assert model.a.weight.grad is None
        model.a.weight.grad, model.a.bias.grad = torch.zeros(3, 3, dtype=F64), torch.zeros(3, dtype=F64)
    check_step_is_dense(model, x, opt, **options)


@pytest.mark.parametrize("option", OPTIONS)
def test_optimizer_and_pure_function_agree_over_a_run(option):
    """Three networks with their own data, stacked, against three optimizers: to 1e-12·max(1, ‖cK‖) at every step."""
    options, K, N = OPTIONS[option], 3, 5
    torch.manual_seed(0)
    models = [mlp(3, 6, 4, 3).to(F64) for _ in range(K)]
    x, labels = torch.randn(K, N, 3, dtype=F64), torch.randint(3, (K, N))
    onehot = F.one_hot(labels, 3).to(F64)
    softmax = options.get("output_metric") == "cross_entropy"
    gradient = (lambda y: (y.softmax(-1) - onehot) / N) if softmax else (lambda y: (y - onehot) / N)
    loss = F.cross_entropy if softmax else (lambda y, k: 0.5 * (y - F.one_hot(k, 3)).square().sum() / N)
    lr = 1e-3 if options.get("scale") in ("sum", "none") else 0.2
    opts = [Woodbury(m, lr, check_step=False, **options) for m in models]
    for _ in range(4):
        params = {
            n: torch.stack([dict(m.named_parameters())[n].detach() for m in models])
            for n, _ in models[0].named_parameters()
        }
        kept = {n: p.clone() for n, p in params.items()}
        stiffness = [Dense(m, x[k], **options).stiffness() for k, m in enumerate(models)]
        stepped = woodbury_step(models[0], params, x, gradient, lr=lr, **options)
        assert all(torch.equal(params[n], kept[n]) for n in kept)  # pure
        for k, (m, opt) in enumerate(zip(models, opts, strict=True)):
            opt.zero_grad()
            loss(m(x[k]), labels[k]).backward()
            opt.step()
            assert distance(trainable(m), {n: p[k] for n, p in stepped.items()}) <= 1e-12 * stiffness[k]


def test_gradient_descent_is_sgd():
    model, x, loss = problem()
    other = copy.deepcopy(model)
    ours, theirs = Woodbury(model, 0.05, scale="none"), torch.optim.SGD(other.parameters(), lr=0.05)
    for _ in range(5):
        for m, opt in ((model, ours), (other, theirs)):
            opt.zero_grad()
            loss(m(x)).backward()
            opt.step()
    assert distance(trainable(model), trainable(other)) < 1e-14


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("edit", ["clipped", "decayed", "penalty", "replaced", "one None", "sign"])
def test_whatever_stands_in_the_gradient(edit, option):
    model, x, loss = problem()
    opt = optimizer(model, **OPTIONS[option])
    h = loss(model(x))
    if edit == "penalty":
        h = h + 0.1 * sum(p.square().sum() for p in model.parameters())
    h.backward()
    if edit == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    for n, p in model.named_parameters():
        if edit == "decayed":
            p.grad.add_(p.detach(), alpha=0.1)
        if edit == "replaced":
            p.grad = torch.randn_like(p)
        if edit == "sign":
            p.grad.sign_()
        if edit == "one None" and n == "2.weight":
            p.grad.zero_()
    check_step_is_dense(model, x, opt, **OPTIONS[option])


def test_a_parameter_whose_gradient_is_none_stays():
    model, x, loss = problem()
    opt = optimizer(model)
    loss(model(x)).backward()
    expected = Dense(model, x).solve(gradients(model) | {"2.weight": torch.zeros_like(model[2].weight)})
    model[2].weight.grad = None
    before = {n: p.clone() for n, p in trainable(model).items()}
    opt.step()
    assert torch.equal(model[2].weight, before["2.weight"])
    for n in set(before) - {"2.weight"}:
        torch.testing.assert_close((before[n] - trainable(model)[n]) / LR, expected[n], rtol=0, atol=1e-12)


def test_a_small_edit_is_not_taken_for_rounding():
    model, x, loss = problem()
    moves = []
    for scale in (0.0, 1e-9):
        m = copy.deepcopy(model)
        opt = optimizer(m)
        loss(m(x)).backward()
        m[0].weight.grad[0, 0] += scale
        before = m[0].weight.detach().clone()
        opt.step()
        moves.append((before - m[0].weight.detach())[0, 0].item() / LR)
    assert moves[1] - moves[0] == pytest.approx(torch.linalg.inv(Dense(model, x).G["0"])[0, 0].item() * 1e-9, rel=1e-3)


def test_closure_and_its_loss():
    model, x, loss = problem()
    opt, calls = optimizer(model), []
    dense = Dense(model, x)
    before = {n: p.clone() for n, p in trainable(model).items()}

    def closure():
        opt.zero_grad()
        h = loss(model(x))
        h.backward()
        calls.append(h.item())
        return h

    returned = opt.step(closure)
    assert calls == [returned.item()]
    assert (
        distance({n: (before[n] - p) / LR for n, p in trainable(model).items()}, dense.solve(gradients(model))) < 1e-11
    )


def test_learning_rate_schedulers():
    model, x, loss = problem()
    opt = optimizer(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for t in range(3):
        opt.zero_grad()
        loss(model(x)).backward()
        before, expected = model[0].weight.detach().clone(), Dense(model, x).solve(gradients(model))["0.weight"]
        opt.step()
        scheduler.step()
        torch.testing.assert_close(before - model[0].weight, LR * 0.5**t * expected, rtol=0, atol=1e-12)


def test_state_dict_carries_the_learning_rate():
    model, _, _ = problem()
    opt = optimizer(model)
    opt.param_groups[0]["lr"] = 0.125
    other = optimizer(model)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.125


def test_parameters_may_be_frozen_later():
    model, x, loss = problem()
    opt = optimizer(model)
    model[2].requires_grad_(False)
    loss(model(x)).backward()
    check_step_is_dense(model, x, opt)


@pytest.mark.parametrize("factor", [2.0**-16, 1e-3, -1.0, 1e3])
def test_a_rescaled_gradient_is_a_rescaled_step(factor):
    """Unscaled or clipped: s·G⁻¹Jᵀr, by the push-through form alone and with its digits, float32 included."""
    model, x, loss = problem()
    loss(model(x)).backward()
    expected = {n: factor * d for n, d in Dense(model, x, mass=1e-3).solve(gradients(model)).items()}
    single = copy.deepcopy(model).float()
    opt = optimizer(single, mass=1e-3)
    opt.zero_grad()
    loss(single(x.float()).double()).backward()
    before = {n: p.detach().clone() for n, p in single.named_parameters()}
    with torch.no_grad():
        for p in single.parameters():
            p.grad.mul_(factor)
    opt.step()
    size = max(d.norm() for d in expected.values())
    for n, p in single.named_parameters():
        ulp = 2 * torch.finfo(torch.float32).eps * before[n].norm() / LR  # what a parameter loses by being stored
        assert ((before[n] - p) / LR - expected[n]).norm() < 1e-4 * size + ulp


def test_the_share_of_a_gradient():
    model, x, loss = problem()
    z = model(x).detach().requires_grad_()
    (r,) = torch.autograd.grad(loss(z), z)
    _, factors = layer_factors(model, x)
    factor = factors["2"]
    pulled = factor.vjp(r)
    other = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=F64) for n, t in pulled.items()}
    for s in (1.0, 0.3, -2.0, 1e-200):
        share, rest = gradient_share(factor, r, {n: s * t for n, t in pulled.items()})
        assert share == pytest.approx(s, rel=1e-14)
        assert rest is None
    g = {n: 0.3 * t + other[n] for n, t in pulled.items()}
    share, rest = gradient_share(factor, r, g)
    assert sum((rest[n] * t).sum() for n, t in pulled.items()).abs() < 1e-13
    assert distance({n: share * t + rest[n] for n, t in pulled.items()}, g) < 1e-15
    share, rest = gradient_share(factor, r, {n: 0 * t for n, t in pulled.items()})
    assert (share, rest) == (0.0, None)
    share, rest = gradient_share(factor, 0 * r, g)
    assert share == 1.0
    assert distance(rest, g) == 0
    missing = "2.bias"
    share, rest = gradient_share(factor, r, {**pulled, missing: None})
    assert share < 1
    assert torch.equal(rest[missing], -share * pulled[missing])


def test_squares_that_leave_the_range_of_the_type():
    model, x, loss = problem()
    _, factors = layer_factors(model.float(), x.float())
    factor = factors["2"]
    for size in (1e-25, 1e20):
        r = size * torch.ones(4, 2)
        pulled = factor.vjp(r)
        share, rest = gradient_share(factor, r, {n: 0.5 * t for n, t in pulled.items()})
        assert share == pytest.approx(0.5, rel=1e-6)
        assert rest is None
    assert loss is not None


def test_the_models_own_zero_grad_drops_the_passes_too():
    """A skipped step: the gradients of the batch are gone, and so are its samples."""
    model, x, loss = problem()
    opt = optimizer(model)
    loss(5 * model(3 * x)).backward()
    model.zero_grad()
    loss(model(x)).backward()
    check_step_is_dense(model, x, opt)


def test_gradients_that_are_put_together_by_hand():
    """torch.autograd.grad leaves p.grad empty between two passes of one step: both count."""
    model, x, loss = problem()
    opt = optimizer(model)
    parts = [torch.autograd.grad(loss(model(x[s]), s), list(model.parameters())) for s in (slice(0, 2), slice(2, 4))]
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        p.grad = a + b
    check_step_is_dense(model, x, opt)


def test_output_gradients_of_another_type():
    """Under autocast ∂h/∂y comes in bfloat16; the metric is built in the parameters' own type."""
    model, x, loss = problem()
    single = copy.deepcopy(model).float()
    opt = optimizer(single, mass=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x.float())
        assert y.dtype == torch.bfloat16
        loss(y.double()).backward()
        grads = {n: p.grad.double() for n, p in single.named_parameters()}
        before = trainable(copy.deepcopy(single))
        opt.step()
    expected = Dense(model, x, mass=0.1).solve(grads)
    moved = {n: (before[n] - p).double() / LR for n, p in trainable(single).items()}
    assert distance(moved, expected) < 1e-5


def test_recorded_inputs_hold_no_graph():
    model, x, loss = problem()
    opt = optimizer(model)
    x = x.clone().requires_grad_()
    loss(model(2 * x)).backward()
    (inputs,), r = opt._passes.samples()
    assert inputs.grad_fn is None
    assert not inputs.requires_grad
    assert r.grad_fn is None
