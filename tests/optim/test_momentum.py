"""Momentum and weight decay in the metric: against dense recursions, torch's SGD, and the spectrum of the linearised step."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nt_kernel import layer_factors
from nt_kernel.metric.inner import InnerSystem
from optim import StepTooLargeError, Woodbury
from optim.steps.direction import gradient_share
from optim.steps.step_limit import checked_rate, joint_rates, largest_product, lr_limit
from optim.steps.update import Update, moved
from tests.nt_kernel.cases import F64, mlp
from tests.optim.problems import problem
from tests.optim.test_update import COMBINATIONS
from tests.reference import Dense, distance, trainable

DECAYS = [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "decay": "riemannian"}]


def linear_problem():
    draw = torch.Generator().manual_seed(0)
    x, a = (torch.randn(6, k, generator=draw, dtype=F64) for k in (4, 2))
    model = mlp(4, 2).to(F64)
    return model, x, lambda y: 0.5 * (y - a).square().sum() / len(a)


def run(model, x, loss, opt, steps):
    """Parameters after each step."""
    path = []
    for _ in range(steps):
        opt.zero_grad()
        loss(model(x)).backward()
        opt.step()
        path.append({n: p.detach().clone() for n, p in trainable(model).items()})
    return path


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("options", COMBINATIONS)
def test_a_linear_model_follows_the_dense_recursion(options, decay):
    model, x, loss = linear_problem()
    dense = Dense(model, x, mass=0.2)
    (G,), (J,) = dense.G.values(), dense.J.values()
    b, damp, w = options["momentum"], options["dampening"], decay.get("weight_decay", 0.0)
    riemannian, lr, v = decay.get("decay") == "riemannian", 0.3, None
    theta = torch.cat([p.flatten() for p in trainable(model).values()])
    y0, start = model(x).detach(), theta
    opt = Woodbury(model, lr, mass=0.2, check_step=False, **options, **decay)
    for found in run(model, x, loss, opt, 8):
        y = (y0.flatten() + J @ (theta - start)).reshape(y0.shape).requires_grad_()
        (r,) = torch.autograd.grad(loss(y), y)
        d = torch.linalg.solve(G, J.T @ r.flatten() + (w * theta if riemannian else 0.0))
        v = d if v is None else b * v + (1 - damp) * d
        step = d + b * v if options["nesterov"] else (v if b else d)
        theta = theta * (1 if riemannian else 1 - lr * w) - lr * step
        torch.testing.assert_close(torch.cat([p.flatten() for p in found.values()]), theta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", COMBINATIONS)
def test_without_a_metric_it_is_torchs_sgd(options, decay):
    model, x, loss = problem()
    other = copy.deepcopy(model)
    ours = Woodbury(model, 0.05, scale="none", weight_decay=decay, decay="riemannian", **options)
    theirs = torch.optim.SGD(other.parameters(), lr=0.05, weight_decay=decay, **options)
    paths = run(model, x, loss, ours, 6), run(other, x, loss, theirs, 6)
    assert all(distance(a, b) < 1e-14 for a, b in zip(*paths, strict=True))


def test_the_riemannian_decay_is_a_penalty_in_the_loss():
    model, x, loss = problem()
    other = copy.deepcopy(model)
    ours = Woodbury(model, 0.1, mass=0.2, weight_decay=0.3, decay="riemannian", momentum=0.5)
    theirs = Woodbury(other, 0.1, mass=0.2, momentum=0.5)

    def penalised(y):
        return loss(y) + 0.15 * sum(p.square().sum() for p in other.parameters())

    paths = run(model, x, loss, ours, 4), run(other, x, penalised, theirs, 4)
    assert all(distance(a, b) < 1e-12 for a, b in zip(*paths, strict=True))


def test_a_tiny_decay_is_not_taken_for_rounding(monkeypatch):
    model, x, loss = problem()
    loss(model(x)).backward()
    y, factors = layer_factors(model, x)
    z = y.detach().requires_grad_()
    (r,) = torch.autograd.grad(loss(z), z)
    gradient = {n: p.grad + 1e-13 * p.detach() for n, p in model.named_parameters()}
    assert gradient_share(factors["0"], r, gradient) == (1.0, None)
    share, rest = gradient_share(factors["0"], r, gradient, exact=True)
    assert share == 1.0
    torch.testing.assert_close(rest["0.weight"], 1e-13 * model[0].weight.detach(), rtol=1e-2, atol=1e-16)
    opt, seen = Woodbury(model, 0.1, weight_decay=1e-13, decay="riemannian"), []
    opt.zero_grad()
    loss(model(x)).backward()
    original = InnerSystem.woodbury
    monkeypatch.setattr(InnerSystem, "woodbury", lambda self, b: seen.append(1) or original(self, b))
    opt.step()
    assert len(seen) == 3  # the general form, in every layer


numbers = st.floats(0.0, 0.97)


@st.composite
def updates(draw, decay=True):
    b = draw(st.sampled_from([0.0, 0.3, 0.9, 0.97]))
    nesterov = b > 0 and draw(st.booleans())
    damp = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.5]))
    w = draw(st.sampled_from([0.0, 0.5])) if decay else 0.0
    return Update(draw(st.floats(0.1, 2.0)), b, damp, nesterov, w)


def radius(update: Update, eigenvalue: float) -> float:
    """Spectral radius of (θ, v) ↦ one step on ½·eigenvalue·θ², by the step itself."""
    columns = []
    for theta, v in ((1.0, 0.0), (0.0, 1.0)):
        theta, v = torch.tensor([theta], dtype=F64), torch.tensor([v], dtype=F64)
        columns.append(torch.cat(moved(theta, eigenvalue * theta, v, update)))
    return torch.linalg.eigvals(torch.stack(columns, 1)).abs().max().item()


@given(updates(), st.lists(st.floats(0.01, 5.0), min_size=1, max_size=4))
def test_quadratics_contract_below_the_limit_and_not_above(update, spectrum):
    limit = lr_limit(max(spectrum), largest_product(update), update.weight_decay)
    for factor, contracts in ((0.999, True), (1.001, False)):
        at = Update(factor * limit, *list(vars(update).values())[1:])
        worst = max(
            radius(at, value) if at.momentum else abs(1 - at.lr * (value + at.weight_decay)) for value in spectrum
        )
        assert (worst < 1) == contracts


def joint_radius(own: list[Update], kernels: list[torch.Tensor]) -> float:
    """Of the step of blocks u_α with e = Σ u_α along d_α = H_α e, leaving out the neutral modes e = 0 (eigenvalue 1)."""
    P, k = len(kernels[0]), len(own)

    def step(state):
        u, v = state[: k * P].split(P), state[k * P :].split(P)
        e = sum(u)
        new = [moved(u[i], kernels[i] @ e, v[i], own[i]) for i in range(k)]
        return torch.cat([p for p, _ in new] + [torch.zeros_like(e) if b is None else b for _, b in new])

    z = torch.linalg.eigvals(torch.stack([step(column) for column in torch.eye(2 * k * P, dtype=F64)], 1))
    return z[(z - 1).abs() > 1e-5].abs().max().item()


def scaled_lr(update: Update, s: float) -> Update:
    return Update(s * update.lr, *list(vars(update).values())[1:])


def threshold(own: list[Update], kernels: list[torch.Tensor]) -> float:
    """The common factor of all lr at which λ_max(Σ H_α g_α/(1 − lr·w/2)) = 1, by bisection."""
    low, high = 0.0, min([2 / (u.lr * u.weight_decay) for u in own if u.weight_decay] + [1e3])
    for _ in range(60):
        s = (low + high) / 2
        total = sum(
            H * s * u.lr / largest_product(u) / (1 - s * u.lr * u.weight_decay / 2)
            for u, H in zip(own, kernels, strict=True)
        )
        low, high = (s, high) if torch.linalg.eigvalsh(total)[-1] < 1 else (low, s)
    return low


@given(updates(), updates(), st.integers(0, 100))
def test_blocks_with_their_own_hyperparameters_contract_up_to_the_joint_limit(first, second, seed):
    """The derivation at the head of step_limit.py, exactly; and checked_rate allows nothing that does not contract."""
    draw = torch.Generator().manual_seed(seed)
    A = [torch.randn(3, 3, generator=draw, dtype=F64) for _ in range(2)]
    kernels = [a @ a.T + 0.05 * torch.eye(3, dtype=F64) for a in A]
    own = [first, second]
    s = threshold(own, kernels)
    assert joint_radius([scaled_lr(u, 0.998 * s) for u in own], kernels) < 1
    assert joint_radius([scaled_lr(u, 1.002 * s) for u in own], kernels) > 1
    weights, options = joint_rates({"0": [first], "1": [second]})
    H = weights["0"] * kernels[0] + weights["1"] * kernels[1]
    largest = torch.linalg.eigvalsh(H)[-1].item()
    allowed = lr_limit(largest, options["limit"], options["decay"]) / options["lr"]
    assert allowed <= s * (1 + 1e-9)
    if first.weight_decay == second.weight_decay == 0:
        assert allowed == pytest.approx(s, rel=1e-9)
    assert checked_rate(bound=float("inf"), matrix=lambda: H, **{**options, "lr": 0.999 * allowed * options["lr"]})
    with pytest.raises(StepTooLargeError) as error:
        checked_rate(bound=float("inf"), matrix=lambda: H, **{**options, "lr": 1.001 * allowed * options["lr"]})
    assert error.value.limit == pytest.approx(allowed * options["lr"], rel=1e-9)


def test_the_largest_update_of_a_block_counts_and_nothing_moves_at_lr_zero():
    slow, fast = Update(0.1), Update(0.4)
    assert joint_rates({"0": [slow, fast], "1": [slow]})[0] == {"0": 1.0, "1": 0.25}
    assert joint_rates({"0": [Update(0.0)], "1": [Update(0.0, 0.9)]}) is None


LIMITED = {
    "heavy ball": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decoupled": {"weight_decay": 0.7},
    "decoupled, nesterov": {"weight_decay": 0.7, "momentum": 0.5, "nesterov": True},
}


@pytest.mark.parametrize("case", LIMITED)
def test_the_error_names_the_limit_and_a_linear_model_obeys_it(case):
    options = LIMITED[case]
    model, x, _ = linear_problem()
    largest, update = Dense(model, x, scale="none").lambda_max(), Update(1.0, **options)
    limit = 1 / (largest / largest_product(update) + update.weight_decay / 2)
    opt = Woodbury(model, 1.001 * limit, scale="none", **options)
    loss = lambda y: 0.5 * y.square().sum() / len(y)  # noqa: E731
    with pytest.raises(StepTooLargeError, match="the step needs lr < ") as error:
        run(model, x, loss, opt, 1)
    assert error.value.limit == pytest.approx(limit, rel=1e-9)
    assert not opt.state
    opt.close()
    for factor, contracts in ((0.9, True), (1.1, False)):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        opt = Woodbury(model, factor * limit, scale="none", check_step=False, **options)
        start = loss(model(x)).item()
        run(model, x, loss, opt, 200)
        assert (loss(model(x)).item() < 0.1 * start) == contracts
        opt.close()
    opt = Woodbury(model, 0.99 * limit, scale="none", **options)
    run(model, x, loss, opt, 1)
    assert opt.lr_limit == pytest.approx(limit, rel=1e-9)
    assert opt.lambda_max == pytest.approx(largest, rel=1e-9)


def test_momentum_makes_room_without_an_eigenvalue():
    """At scale "mean" λ_max ≤ N is enough up to lr = 2(1 + b)/N, with Nesterov 2(1 + b)/((1 + 2b)N)."""
    model, x, loss = problem()
    for options, limit in ((LIMITED["heavy ball"], 3.8 / 3), (LIMITED["nesterov"], 3.8 / 2.8 / 3)):
        opt = Woodbury(model, 0.99 * limit, mass=1e-3, **options)
        run(model, x, loss, opt, 1)
        assert opt.lambda_max == 3
        assert opt.lr_limit == pytest.approx(limit)
        opt.close()


def test_the_riemannian_decay_counts_in_the_limit():
    """Parameters that the outputs do not see decay at lr·w/μ: what λ_max(H) alone would allow diverges."""
    model, x, loss = problem()
    opt = Woodbury(model, 0.3, mass=1e-3, weight_decay=0.01, decay="riemannian")  # lr·w/μ = 3
    with pytest.raises(StepTooLargeError) as error:
        run(model, x, loss, opt, 1)
    assert error.value.limit <= 2 / 10
    opt.close()
    opt = Woodbury(model, 0.3, mass=1e-3, weight_decay=0.001, decay="riemannian")
    run(model, x, loss, opt, 1)
    assert opt.lambda_max == 3  # max(N, w/μ)


@given(st.floats(1e-3, 1.0), st.floats(1e-3, 3.0), st.integers(0, 20))
def test_the_bound_with_riemannian_decay(mass, decay, seed):
    """λ_max(G⁻¹(C + wI)) ≤ max(N, w/μ) at scale "mean", and ≤ λ_max(H) + w/μ at any."""
    torch.manual_seed(seed)
    model, x = mlp(3, 4, 4, 2).to(F64), torch.randn(3, 3, dtype=F64)
    dense = Dense(model, x, mass=mass)
    J = torch.cat(list(dense.J.values()), 1)
    G = torch.block_diag(*dense.G.values())
    C = J.T @ J / len(x) + decay * torch.eye(J.shape[1], dtype=F64)
    largest = torch.linalg.eigvals(torch.linalg.solve(G, C)).real.max().item()
    assert largest <= max(len(dense.G), decay / mass) * (1 + 1e-9)
    assert largest <= (dense.lambda_max() + decay / mass) * (1 + 1e-9)


def test_auto_is_below_the_limit_under_any_momentum():
    for b in (0.0, 0.5, 0.9, 0.999):
        for nesterov in (False, True) if b else (False,):
            assert largest_product(Update(1.0, b, nesterov=nesterov)) > 1


def test_a_momentum_buffer_follows_the_type_of_its_parameter():
    model, x, loss = problem()
    single = copy.deepcopy(model).float()
    opt = Woodbury(single, 0.1, momentum=0.9)
    run(single, x.float(), lambda y: loss(y.double()), opt, 2)
    single.double()
    run(single, x, loss, opt, 1)
    assert all(held["momentum_buffer"].dtype == F64 for held in opt.state.values())


def test_state_holds_buffers_only_where_there_is_momentum():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, groups=[{"layers": ["2"], "momentum": 0.5}])
    run(model, x, loss, opt, 1)
    assert {id(p) for p in opt.state} == {id(p) for p in model[2].parameters()}
    assert isinstance(model[2], nn.Linear)


def test_the_limit_of_groups_is_that_of_their_weighted_kernels():
    """Slow groups count by lr·/limit: at scale "mean" without an eigenvalue, elsewhere by the kernel."""
    groups = [{"layers": ["0"], "lr": 0.1}, {"layers": ["4"], "lr": 0.19, "momentum": 0.9}]  # g = .05, .1, .05
    model, x, loss = problem()
    opt = Woodbury(model, 0.2, mass=1e-3, groups=groups)
    run(model, x, loss, opt, 1)
    assert opt.lambda_max == pytest.approx(0.5 + 1 + 0.5)
    assert opt.lr_limit == pytest.approx(1.0)
    opt.close()
    model, x, loss = problem()
    dense = Dense(model, x, scale="none", mass=100.0)
    own = {block: dense.kernel(block) / dense.N for block in dense.blocks}
    expected = torch.linalg.eigvalsh(0.5 * own["0"] + own["2"] + 0.5 * own["4"])[-1].item()
    opt = Woodbury(model, 0.2, scale="none", mass=100.0, groups=groups)
    run(model, x, loss, opt, 1)
    bound = opt.lambda_max  # the Frobenius norm was enough
    assert expected <= bound <= expected * dense.N * dense.C
    opt.close()
    dense = Dense(model, x, scale="none", mass=100.0)
    own = {block: dense.kernel(block) / dense.N for block in dense.blocks}
    expected = torch.linalg.eigvalsh(0.5 * own["0"] + own["2"] + 0.5 * own["4"])[-1].item()
    opt = Woodbury(model, 0.2, scale="none", mass=100.0, groups=groups)
    opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 2.001 / expected, 2.001 / expected / 2
    opt.param_groups[2]["lr"] = 0.95 * 2.001 / expected
    with pytest.raises(StepTooLargeError) as error:
        run(model, x, loss, opt, 1)
    assert error.value.limit == pytest.approx(2 / expected, rel=1e-9)
