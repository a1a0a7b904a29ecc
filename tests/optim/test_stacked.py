"""Stacked training: K networks in one step, against K separate runs, dense solves and torch's own optimizers."""

import dataclasses

import pytest
import torch
from torch import nn

from nt_kernel.kernels.live_bytes import LiveBytes
from nt_kernel.mass import RowColumnMass
from optim import Woodbury
from optim.stacks.first_order import adam, gradient_descent
from optim.stacks.stacked import StackedState, stack_parameters, stacked_gradients, stacked_step
from optim.stacks.stacked_woodbury import WoodburyStep
from tests.nt_kernel.cases import F64, mlp
from tests.optim.stacks import MAKES, Recursion, half_square, network, networks, separate_runs, train
from tests.reference import Dense, definite_metric, distance, singular_metric
from tests.thinned import thinned

LR = 0.1
MOMENTA = {
    "none": {},
    "heavy ball": {"momentum": 0.9},
    "dampened": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decoupled decay": {"momentum": 0.9, "weight_decay": 0.3},
    "riemannian decay": {"momentum": 0.9, "weight_decay": 0.3, "decay": "riemannian"},
    "riemannian decay alone": {"weight_decay": 0.3, "decay": "riemannian"},
}
OPTIONS = {
    "mean": {"mass": 1e-2},
    "sum": {"scale": "sum"},
    "none": {"scale": "none", "mass": 0.5},
    "mean-jacobian": {"scale": "mean-jacobian", "mass": 0.1},
    "softmax": {"output_metric": "cross_entropy", "mass": 1e-2},
    "definite": {"output_metric": definite_metric},
    "singular": {"output_metric": singular_metric, "mass": 0.1},
    "network": {"blocks": "network"},
    "conjugate gradients": {"solver": "cg", "mass": 0.1},
    "mass by layer": {"mass": {"0": 0.1, "2.bias": 3.0}},
    "row and column masses": {
        "mass": {"0.weight": RowColumnMass(torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0.1, 1.0, 2.0]))}
    },
}


def method_of(**options):
    return WoodburyStep(LR, check_step=False, **options)


@pytest.mark.parametrize("name", MAKES)
def test_a_stack_is_as_many_separate_runs(name):
    model, params, x, targets = networks(name)
    options = {"mass": 0.1, "momentum": 0.5, "weight_decay": 0.1, "decay": "riemannian"}
    together, _ = train(model, params, x, targets, method_of(**options), 3)
    alone = separate_runs(model, params, x, targets, lambda own: Recursion(own, LR, **options), 3)
    assert distance(together, alone) < 1e-12
    assert any(not torch.equal(alone[n][0], params[n][0]) for n in params)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_momentum_and_decay_are_those_of_the_recursion(momentum):
    model, params, x, targets = networks("mlp")
    options = {"mass": 0.1, **MOMENTA[momentum]}
    together, state = train(model, params, x, targets, method_of(**options), 5)
    alone = separate_runs(model, params, x, targets, lambda own: Recursion(own, LR, **options), 5)
    by_class = separate_runs(model, params, x, targets, lambda own: Woodbury(own, LR, check_step=False, **options), 5)
    assert distance(together, alone) < 1e-12
    assert distance(together, by_class) < 1e-12
    assert state.step == 5
    assert set(state.memory) == ({"momentum"} if options.get("momentum") else set())


@pytest.mark.parametrize("option", OPTIONS)
def test_options_mean_what_they_mean_for_the_class(option):
    model, params, x, targets = networks("mlp")
    options = OPTIONS[option]
    together, _ = train(model, params, x, targets, method_of(**options), 3)
    alone = separate_runs(model, params, x, targets, lambda own: Woodbury(own, lr=LR, check_step=False, **options), 3)
    assert distance(together, alone) < (1e-10 if "solver" in options else 1e-12)


@pytest.mark.parametrize("decay", ["decoupled", "riemannian"])
def test_two_steps_against_dense_solves(decay):
    """G⁻¹(∇h + wd·θ) with dense G, heavy ball by hand: nothing of the packages takes part."""
    model, params, x, targets = networks("convolution")
    wd, b = 0.4, 0.7
    method = method_of(mass=0.05, momentum=b, weight_decay=wd, decay=decay)
    found, _ = train(model, params, x, targets, method, 2)
    for k in range(3):
        theta, v = {n: p[k] for n, p in params.items()}, None
        for _ in range(2):
            own = network(model, {n: p[None] for n, p in theta.items()}, 0)
            dense = Dense(own, x[0][k], mass=0.05)
            g = dense.pull((dense.y - targets[k]) / dense.N)
            if decay == "riemannian":
                g = {n: g[n] + wd * theta[n] for n in g}
            d = dense.solve(g)
            v = d if v is None else {n: b * v[n] + d[n] for n in d}
            shrink = 1 - LR * wd if decay == "decoupled" else 1
            theta = {n: shrink * theta[n] - LR * v[n] for n in d}
        assert distance({n: p[k] for n, p in found.items()}, theta) < 1e-12 * dense.stiffness()


@pytest.mark.parametrize("name", ["mlp", "convolution", "LSTM", "transformer layer", "tied weights"])
def test_float32(name):
    model, params, x, targets = networks(name, dtype=torch.float32)
    together, _ = train(model, params, x, targets, method_of(mass=0.1, momentum=0.5), 3)
    assert all(p.dtype == torch.float32 for p in together.values())
    alone = separate_runs(model, params, x, targets, lambda own: Recursion(own, LR, mass=0.1, momentum=0.5), 3)
    assert distance(together, alone) < 2e-5


def test_auto_may_take_another_solver_for_a_stack_and_agrees_to_its_tolerance():
    torch.manual_seed(0)
    model, K = mlp(6, 60, 60, 12), 4
    params = stack_parameters(model, K)
    x, targets = torch.randn(K, 24, 6), torch.randn(K, 24, 12)
    together, _ = train(model, params, x, targets, WoodburyStep(LR, mass=0.1), 2)
    alone = separate_runs(model, params, (x,), targets, lambda own: Woodbury(own, lr=LR, mass=0.1), 2)
    moved = max((alone[n] - params[n]).norm() for n in params)
    assert distance(together, alone) < 1e-3 * moved


def test_the_solver_is_the_one_asked_for():
    model, params, x, targets = networks("mlp", dtype=torch.float32)
    exact, iterated = (train(model, params, x, targets, method_of(solver=s), 1)[0] for s in ("cholesky", "cg"))
    assert 0 < distance(iterated, exact) < 1e-4  # "auto" takes Cholesky for so few outputs


def test_one_network():
    model, params, x, targets = networks("mlp", K=1)
    together, _ = train(model, params, x, targets, method_of(), 2)
    alone = separate_runs(model, params, x, targets, lambda own: Woodbury(own, lr=LR), 2)
    assert distance(together, alone) < 1e-13


@pytest.mark.parametrize("method", [method_of(momentum=0.5), adam(0.1)], ids=["Woodbury", "Adam"])
@pytest.mark.parametrize("name", ["mlp", "two inputs", "embedding"])
def test_shared_data_are_the_same_data_for_each(name, method):
    model, params, x, targets = networks(name)
    one, a = tuple(t[0] for t in x), targets[0]
    given = one if len(one) > 1 else one[0]
    shared, _ = train(model, params, given, a, method, 3, shared=True)
    each, _ = train(model, params, tuple(torch.stack([t] * 3) for t in one), torch.stack([a] * 3), method, 3)
    assert distance(shared, each) < 1e-13


@pytest.mark.parametrize("name", ["output [N]", "output [N, T, C]"])
def test_the_loss_sees_outputs_as_the_model_gives_them(name):
    model, params, x, targets = networks(name)
    seen = []

    def loss(y, a):
        seen.append(tuple(y.shape))
        return nn.functional.mse_loss(y, a)

    for method in (method_of(), gradient_descent(LR)):
        stacked_step(model, params, StackedState(), x, targets, loss, method)
    assert set(seen) == {tuple(targets.shape[1:])}


def test_classes_as_targets():
    model, params, x, _ = networks("mlp")
    labels = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    options = {"output_metric": "cross_entropy", "mass": 0.1}
    loss = nn.functional.cross_entropy
    together, _ = train(model, params, x, labels, method_of(**options), 3, loss)
    alone = separate_runs(model, params, x, labels, lambda own: Woodbury(own, lr=LR, **options), 3, loss)
    assert distance(together, alone) < 1e-12


# Larger steps amplify rounding from one to the next; so does Adam's ε = 1e-8 where a gradient is zero (a key's bias).
SLOW = 0.02
RULES = {
    "SGD": (gradient_descent(SLOW), lambda p: torch.optim.SGD(p, SLOW)),
    "momentum": (gradient_descent(SLOW, momentum=0.9), lambda p: torch.optim.SGD(p, SLOW, momentum=0.9)),
    "nesterov": (
        gradient_descent(SLOW, momentum=0.9, nesterov=True, weight_decay=0.1, decay="riemannian"),
        lambda p: torch.optim.SGD(p, SLOW, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "dampened": (
        gradient_descent(SLOW, momentum=0.5, dampening=0.2),
        lambda p: torch.optim.SGD(p, SLOW, momentum=0.5, dampening=0.2),
    ),
    "Adam": (adam(SLOW, betas=(0.8, 0.9), eps=1e-3), lambda p: torch.optim.Adam(p, SLOW, betas=(0.8, 0.9), eps=1e-3)),
    "AdamW": (adam(SLOW, eps=1e-3, weight_decay=0.3), lambda p: torch.optim.AdamW(p, SLOW, eps=1e-3, weight_decay=0.3)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["mlp", "convolution", "tied weights", "transformer layer"])
def test_rules_are_torchs_optimizers(name, rule):
    mine, theirs = RULES[rule]
    model, params, x, targets = networks(name)
    together, _ = train(model, params, x, targets, mine, 4)
    alone = separate_runs(model, params, x, targets, lambda own: theirs(own.parameters()), 4)
    assert distance(together, alone) < 1e-12


def test_without_a_metric_woodbury_is_gradient_descent():
    model, params, x, targets = networks("mlp")
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}
    metric, first = method_of(scale="none", **options), gradient_descent(LR, **options)
    a, b = (train(model, params, x, targets, method, 4)[0] for method in (metric, first))
    assert distance(a, b) < 1e-13


def test_a_rule_of_the_users_own_sees_one_network():
    """Normalised gradient descent: with the norm over the whole stack in its place the networks would not be apart."""

    def rule(params, gradients, memory, step):
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        total = memory["total"]["norm"] + norm if memory else norm
        return {n: p - LR / (step + 1) * gradients[n] / norm for n, p in params.items()}, {"total": {"norm": total}}

    model, params, x, targets = networks("mlp")
    together, state = train(model, params, x, targets, rule, 2)
    assert state.memory["total"]["norm"].shape == (3,)
    for k in range(3):
        one = {n: p[k : k + 1] for n, p in params.items()}
        alone, _ = train(model, one, tuple(t[k : k + 1] for t in x), targets[k : k + 1], rule, 2)
        assert distance({n: p[k] for n, p in together.items()}, {n: p[0] for n, p in alone.items()}) < 1e-13
    first, _ = train(model, params, x, targets, rule, 1)
    for k in range(3):
        assert sum((first[n][k] - params[n][k]).square().sum() for n in params).sqrt().item() == pytest.approx(LR)


@pytest.mark.parametrize("name", ["mlp", "tied weights", "LSTM", "output [N]", "frozen layer"])
def test_gradients_and_losses_are_autograds(name):
    model, params, x, targets = networks(name)
    gradients, h = stacked_gradients(model, params, x, targets, half_square)
    chunked, h2 = stacked_gradients(model, params, x, targets, half_square, chunk=2)
    for k in range(3):
        own = network(model, params, k)
        loss = half_square(own(*(t[k] for t in x)), targets[k])
        loss.backward()
        expected = {n: p.grad for n, p in own.named_parameters() if p.requires_grad}
        assert distance({n: g[k] for n, g in gradients.items()}, expected) < 1e-13
        assert h[k].item() == pytest.approx(loss.item(), rel=1e-14)
    assert distance(chunked, gradients) < 1e-14
    assert torch.allclose(h, h2, rtol=1e-14)


METHODS = {
    "Woodbury": WoodburyStep(LR, mass=0.1, momentum=0.5, weight_decay=0.1, decay="riemannian"),
    "cg": WoodburyStep(LR, solver="cg", momentum=0.5),
    "Adam": adam(0.01),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
def test_chunks_change_no_more_than_rounding(method, chunk):
    model, params, x, targets = networks("convolution", K=5)
    whole, a = train(model, params, x, targets, METHODS[method], 3)
    parts, b = train(model, params, x, targets, METHODS[method], 3, chunk=chunk)
    assert distance(parts, whole) < 1e-13
    assert a.step == b.step
    for what, held in a.memory.items():
        assert distance(b.memory[what], held) < 1e-13


@pytest.mark.parametrize("method", thinned(METHODS, 3))
def test_chunks_bound_the_memory(method):
    """Beside the new parameters and state there is the peak of a step on one chunk, whatever K."""
    torch.manual_seed(0)
    model, N = mlp(20, 40, 40, 4).to(F64), 24

    def peak(K, chunk):
        params = stack_parameters(model, K)
        x, targets = torch.randn(K, N, 20, dtype=F64), torch.randn(K, N, 4, dtype=F64)
        _, state = train(model, params, x, targets, METHODS[method], 1)
        with LiveBytes() as seen:
            stacked_step(model, params, state, x, targets, half_square, METHODS[method], chunk=chunk)
        return seen.peak, sum(t.nbytes for s in (params, *state.memory.values()) for t in s.values())

    peak(2, None)  # the model's plan
    whole, held = peak(16, None)
    for chunk in (1, 2, 4):
        alone, _ = peak(chunk, None)
        chunked, _ = peak(16, chunk)
        assert held < chunked <= held + 1.02 * alone
        assert chunked - held < 1.1 * chunk / 16 * whole


def test_a_step_writes_to_nothing():
    model, params, x, targets = networks("batch norm in eval")
    params = {n: p.requires_grad_() for n, p in params.items()}
    state, method = StackedState(), method_of(momentum=0.5)
    for _ in range(2):
        before = [t.clone() for t in (*params.values(), *model.state_dict().values())]
        memory = {n: t.clone() for n, t in state.memory.get("momentum", {}).items()}
        random = torch.get_rng_state()
        after, later = stacked_step(model, params, state, x, targets, half_square, method)
        assert all(map(torch.equal, (*params.values(), *model.state_dict().values()), before))
        assert all(torch.equal(state.memory["momentum"][n], t) for n, t in memory.items())
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(t.requires_grad for t in after.values())
        assert all(p.grad is None for p in model.parameters())
        given = {t.untyped_storage().data_ptr() for t in (*params.values(), *state.memory.get("momentum", {}).values())}
        assert not given & {
            t.untyped_storage().data_ptr() for t in (*after.values(), *later.memory["momentum"].values())
        }
        params, state = after, later


def test_an_unused_layer_is_left_alone_by_woodbury():
    model, params, x, targets = networks("unused layer")
    found, state = train(model, params, x, targets, method_of(momentum=0.5, weight_decay=0.5), 2)
    assert torch.equal(found["a.weight"], params["a.weight"])
    assert found["a.weight"].data_ptr() != params["a.weight"].data_ptr()
    assert not torch.equal(found["b.weight"], params["b.weight"])
    assert set(state.memory["momentum"]) == {"b.weight", "b.bias"}
    decayed, _ = train(model, params, x, targets, gradient_descent(LR, weight_decay=0.5), 1)
    assert torch.allclose(decayed["a.weight"], 0.95 * params["a.weight"])


def test_a_state_goes_on_where_it_was_left():
    model, params, x, targets = networks("mlp")
    for method in METHODS.values():
        whole, _ = train(model, params, x, targets, method, 4)
        half, state = train(model, params, x, targets, method, 2)
        for _ in range(2):
            half, state = stacked_step(model, half, state, x, targets, half_square, method)
        assert all(torch.equal(half[n], whole[n]) for n in whole)


def test_a_schedule_replaces_the_learning_rate():
    model, params, x, targets = networks("mlp")
    method = method_of(mass=0.1)
    small = dataclasses.replace(method, lr=method.lr / 2)
    a, b = (stacked_step(model, params, StackedState(), x, targets, half_square, m)[0] for m in (method, small))
    assert distance({n: (a[n] - params[n]) / 2 for n in a}, {n: b[n] - params[n] for n in b}) < 1e-14


def test_auto_learning_rate_is_one_over_the_blocks():
    model, params, x, targets = networks("mlp")
    a, _ = train(model, params, x, targets, WoodburyStep("auto"), 1)
    b, _ = train(model, params, x, targets, WoodburyStep(1 / 3), 1)
    c, _ = train(model, params, x, targets, WoodburyStep("auto", blocks="network"), 1)
    d, _ = train(model, params, x, targets, WoodburyStep(1.0, blocks="network"), 1)
    assert all(torch.equal(a[n], b[n]) and torch.equal(c[n], d[n]) for n in a)


def test_training_twins_with_every_method_reduces_their_losses():
    model, params, x, targets = networks("mlp")
    _, before = stacked_gradients(model, params, x, targets, half_square)
    for method in METHODS.values():
        after, _ = train(model, params, x, targets, method, 20)
        assert (stacked_gradients(model, after, x, targets, half_square)[1] < before).all()
