"""A_t against dense references: no injection where it is the closed loop, autograd's Jacobians, the formulas of theory."""

import copy

import pytest
import torch
from torch import nn

from nt_kernel import generalized_ntk, layer_factors
from optim import RLO, LevenbergMarquardt, Woodbury
from stability import ClosedLoop, momentum_matrices, record
from stability.recording.certify import _states
from tests.stability.recorded import EXACT, FROZEN, data, half_squares, linear, mlp, moved, trained

BATCHES = [torch.tensor([0, 2, 3]), torch.tensor([1, 4, 4]), None, torch.tensor([5, 0]), torch.tensor([0, 2, 3]), None]
SCHEDULE = [1.0, 0.5, 2.0, 1.5, 0.7, 1.0]


def injections(run, other):
    """w_t = x_{t+1} − A_t x_t [T, states], and the states."""
    grid = run.times
    loop = ClosedLoop(run, grid)
    errors = torch.stack([other.outputs(t, run.reader.x) - run.outputs(t) for t in grid])
    states = _states(run, other, grid, errors) if loop.memory else errors.flatten(1)
    w = torch.stack([states[j + 1] - A @ states[j] for j, A in enumerate(loop)])
    return w, states


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["full", "mini-batch"])
@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_injected_between_two_runs_on_the_same_data(name, batches):
    x, a = data(6, 3, 2)
    model = linear(3, 2)
    schedule = SCHEDULE if name != "asgd" else None  # it takes the lr of the step before
    options = {"batches": batches, "schedule": schedule}
    run = trained(model, EXACT[name], x, a, **options)
    other = trained(moved(model), EXACT[name], x, a, **options)
    w, states = injections(run, other)
    assert ClosedLoop(run).exact
    assert states.norm(dim=1).min() > 1e-3
    assert w.abs().max() < 1e-10


@pytest.mark.parametrize("name", ["sgd", "nesterov", "woodbury-momentum"])
def test_nothing_is_injected_over_the_strides_of_a_thinned_run(name):
    x, a = data(6, 3, 2)
    model = linear(3, 2)
    options = {"batches": BATCHES * 2, "steps": 11, "memory": 8 * 8 * 6, "lr": 0.05}
    run = trained(model, EXACT[name], x, a, **options)
    other = trained(moved(model), EXACT[name], x, a, **options)
    w, states = injections(run, other)
    assert run.snapshots.stride > 1
    assert run.nbytes <= run.snapshots.budget
    assert states.norm(dim=1).min() > 1e-4
    assert w.abs().max() < 1e-10


def test_frozen_rules_do_inject():
    """The control: what is not claimed exact is not exact."""
    x, a = data(6, 3, 2)
    for name in ("adam", "rlo-tanh", "rprop", "muon"):
        run = trained(linear(3, 2), FROZEN[name], x, a)
        other = trained(moved(linear(3, 2)), FROZEN[name], x, a)
        assert not ClosedLoop(run).exact
        assert injections(run, other)[0].abs().max() > 1e-6


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])], ids=["full", "mini-batch"])
@pytest.mark.parametrize("name", ["sgd-decay", "woodbury", "woodbury-none", "rlo"])
def test_the_matrix_is_the_jacobian_of_the_step(name, rows):
    """For a model linear in θ the step e ↦ e⁺ is affine: its columns, from runs that start one unit of output apart."""
    x, a = data(3, 3, 2)
    model = linear(3, 2)
    run = trained(model, EXACT[name], x, a, steps=1, batches=[rows])
    J = torch.cat([f.dense().flatten(0, 1) for f in layer_factors(model, x)[1].values()], 1)
    lift, columns = torch.linalg.pinv(J), []
    for j in range(J.shape[0]):
        start = copy.deepcopy(model)
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(start.parameters()) + lift[:, j], start.parameters()
        )
        other = trained(start, EXACT[name], x, a, steps=1, batches=[rows])
        columns.append((other.outputs(1, x) - run.outputs(1)).flatten())
    D = J.shape[0]
    (A,) = ClosedLoop(run).matrices()
    torch.testing.assert_close(A[:D, :D], torch.stack(columns, 1).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), [
    ("heavy-ball", {}), ("dampened", {"dampening": 0.5}), ("nesterov", {"nesterov": True}),
])  # fmt: skip
def test_momentum_is_the_recursion_of_theory(name, options):
    x, a = data(4, 2, 2)
    make = lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.8, **options)  # noqa: E731
    run = trained(mlp(2, 2), make, x, a, steps=4)
    kernels = []
    for t in range(4):
        run.load(t)
        kernels.append(generalized_ntk(run.reader.model, x, scale="none").matrix)
    expected, D = momentum_matrices(kernels, 0.1, 0.8, **options), 8
    found = ClosedLoop(run).matrices()
    torch.testing.assert_close(found[0][:, :D], expected[0][:, :D], rtol=1e-12, atol=1e-13)  # f_0 = 0
    torch.testing.assert_close(torch.stack(found[1:]), expected[1:], rtol=1e-12, atol=1e-13)


def dense_jacobian(model, x):
    """∂y/∂θ [N·C, m] by autograd."""
    names = [n for n, _ in model.named_parameters()]
    f = lambda *p: torch.func.functional_call(model, dict(zip(names, p, strict=True)), x).flatten()  # noqa: E731
    rows = torch.autograd.functional.jacobian(f, tuple(p.detach() for p in model.parameters()))
    return torch.cat([r.flatten(1) for r in rows], 1)


def loss_hessian(loss, y):
    """∇²_y ℓ of all samples as one matrix, by autograd."""
    return torch.autograd.functional.hessian(lambda v: loss(v.view_as(y)).sum(), y.flatten())


def test_mini_batches_and_curvature_by_dense_matrices():
    """A = I − lr·(1/b) J_S G_B⁻¹J_Bᵀ ∇²ℓ_B E_Bᵀ, with G_B inverted as a matrix."""
    x, a = data(5, 2, 3)
    loss = lambda y: -(a.softmax(-1) * y.log_softmax(-1)).sum(-1)  # noqa: E731
    rows = torch.tensor([3, 0, 3])
    make = lambda m, lr: Woodbury(m, lr, mass=0.2, blocks="network", check_step=False)  # noqa: E731
    run = trained(
        mlp(2, 3), make, x, a, steps=1, batches=[rows], targets=None, record_loss=loss,
        loss=lambda y, b: -(b.softmax(-1) * y.log_softmax(-1)).sum(-1),
    )  # fmt: skip
    assert run.gradient_defect < 1e-12
    run.load(0)
    J = dense_jacobian(run.reader.model, x)
    E = torch.zeros(15, 9, dtype=x.dtype)
    for j, i in enumerate(rows):
        E[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] = torch.eye(3)
    J_B, S = E.T @ J, loss_hessian(loss, run.outputs(0)).unflatten(0, (5, 3)).unflatten(2, (5, 3))
    S_B = torch.block_diag(*(S[i, :, i] for i in rows))
    G = 0.2 * torch.eye(J.shape[1], dtype=x.dtype) + J_B.T @ J_B / 3
    expected = torch.eye(15, dtype=x.dtype) - 0.1 / 3 * J @ torch.linalg.solve(G, J_B.T) @ S_B @ E.T
    torch.testing.assert_close(ClosedLoop(run).matrices()[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "nadam", "radam", "rmsprop", "adagrad", "rlo-tanh", "second-moment"])
def test_frozen_denominators_by_dense_matrices(name):
    """The force −ℓ(η + ζγ)B_t of the last step, B_t = (1/n) J D⁻¹Jᵀ with the D that the optimizer divided by."""
    steps = 8 if name == "radam" else 2  # RAdam divides from its seventh step on
    x, a = data(4, 2, 2)
    captured = {}

    def make(m, lr):
        captured["model"], captured["opt"] = m, FROZEN[name](m, lr)
        return captured["opt"]

    run = trained(mlp(2, 2), make, x, a, steps=steps)
    run.load(steps - 1)
    J, opt = dense_jacobian(run.reader.model, x), captured["opt"]
    state = [opt.state[p] for p in captured["model"].parameters()]
    flat = lambda key: torch.cat([s[key].flatten() for s in state])  # noqa: E731
    if name in ("adam", "nadam"):
        P = 1 / ((flat("exp_avg_sq") / (1 - 0.999**2)).sqrt() + 1e-8)
        if name == "adam":
            rate = 0.1 * (1 - 0.9) / (1 - 0.9**2)
        else:  # mu_t = 0.9(1 − 0.96^(0.004 t)/2)
            mu = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2, 3)]
            rate = 0.1 * ((1 - mu[1]) / (1 - mu[0] * mu[1]) + mu[2] / (1 - mu[0] * mu[1] * mu[2]) * 0.1)
        pull = 0.1 * (name == "adam")
    elif name == "radam":  # what torch moved by, over its mean of gradients
        before, after = (
            torch.cat([p.flatten() for p in m.parameters()]) for m in (run.reader.model, captured["model"])
        )
        P = (before - after).detach() * (1 - 0.5**8) / (0.1 * flat("exp_avg"))
        rate, pull = 0.1 * (1 - 0.5) / (1 - 0.5**8), 0.0
    elif name == "rmsprop":
        P, rate, pull = 1 / (flat("square_avg").sqrt() + 1e-8), 0.1, 0.0
    elif name == "adagrad":
        P, rate, pull = 1 / (flat("sum").sqrt() + 1e-10), 0.1 / (1 + 0.1), 0.1
    elif name == "rlo-tanh":
        P, rate, pull = (1 - torch.tanh(flat("mean") / 0.5) ** 2) / 0.5, 0.1 * (1 - 0.9), 0.0
    else:
        v = torch.cat([s["exp_avg_sq"].flatten() for s in state]) / (1 - 0.999**2)
        D = torch.diag(v.sqrt() + 0.1)
        edges = torch.tensor([15, 12]).tolist()  # layers 0 and 2: 2·5 + 5, 5·2 + 2
        G = torch.block_diag(*(d + j.T @ j / 4 for d, j in zip(blocks(D, edges), J.split(edges, 1), strict=True)))
        P, rate, pull = torch.linalg.inv(G), 0.1, 0.0
    P = P if P.dim() == 2 else torch.diag(P)
    force = J @ P @ J.T / 4
    if pull:  # δθ lifted by D⁻¹Jᵀ(J D⁻¹Jᵀ)⁻¹
        force = force + pull * J @ P @ P @ J.T @ torch.linalg.pinv(J @ P @ J.T, hermitian=True)
    A, D = ClosedLoop(run).matrices()[-1], 8
    e, f = torch.eye(D, dtype=x.dtype), torch.zeros(D, D, dtype=x.dtype)
    moved_f = (A @ torch.cat([e, f]))[D:] if len(A) == 2 * D else A - e
    kick = 0.0
    if name == "nadam":  # κ·ℓηB_{t−1}e: what the look-ahead of the step before leaves
        first = ClosedLoop(run)
        step = list(first)[1].steps[0]
        kick = step.carried * step.kick
    torch.testing.assert_close(moved_f, -rate * force + kick, rtol=1e-6, atol=1e-9)


def blocks(D, edges):
    """The diagonal blocks of a matrix."""
    start = 0
    for size in edges:
        yield D[start : start + size, start : start + size]
        start += size


@pytest.mark.parametrize(
    "name", ["sgd-decay", "heavy-ball", "nesterov", "woodbury", "woodbury-network", "adamw", "rlo-tanh"]
)
@pytest.mark.parametrize("batches", [None, BATCHES], ids=["full", "mini-batch"])
def test_products_through_the_layers_are_those_of_the_matrices(name, batches):
    x, a = data(6, 3, 2)
    loss = lambda y: (y.pow(4) / 12 + y.square() * a.exp() / 2).sum(1)  # noqa: E731
    run = trained(mlp(3, 2), (EXACT | FROZEN)[name], x, a, batches=batches, steps=4, record_loss=loss, targets=None)
    matrices, products = ClosedLoop(run), ClosedLoop(run, dense=False)
    X = torch.randn(matrices.states, 3, dtype=x.dtype)
    for A, B in zip(matrices, products, strict=True):
        torch.testing.assert_close(B @ X, A @ X, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(B @ X[:, 0], A @ X[:, 0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["cross_entropy", "logistic", "huber", "mse"])
def test_named_losses_are_their_functions(name):
    x, a = data(5, 2, 3)
    a = {"cross_entropy": a.argmax(1), "logistic": a.sigmoid()}.get(name, a)
    functions = {
        "cross_entropy": lambda y, b: nn.functional.cross_entropy(y, b, reduction="none"),
        "logistic": lambda y, b: nn.functional.binary_cross_entropy_with_logits(y, b, reduction="none").sum(1),
        "huber": lambda y, b: nn.functional.huber_loss(y, b, reduction="none").sum(1),
        "mse": lambda y, b: nn.functional.mse_loss(y, b, reduction="none").mean(1),
    }
    options = {"steps": 2, "loss": functions[name], "batches": [torch.tensor([0, 3]), None]}
    named = trained(mlp(2, 3), EXACT["sgd"], x, a, record_loss=name, **options)
    by_autograd = trained(mlp(2, 3), EXACT["sgd"], x, a, record_loss=functions[name], **options)
    assert named.gradient_defect < 1e-12
    for A, B in zip(ClosedLoop(named).matrices(), ClosedLoop(by_autograd).matrices(), strict=True):
        torch.testing.assert_close(A, B, rtol=1e-11, atol=1e-12)
        assert not torch.equal(A, torch.eye(15, dtype=x.dtype))


STILL = {  # adaptive rules with a denominator that does not move: ε ≫ the gradients
    "adam": lambda m, lr: torch.optim.Adam(m.parameters(), lr=lr * 1e9, eps=1e9, weight_decay=0.1),
    "adamw": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr * 1e9, eps=1e9, weight_decay=1e-9),
    "nadam": lambda m, lr: torch.optim.NAdam(m.parameters(), lr=lr * 1e9, eps=1e9, momentum_decay=0.5),
    "adamax": lambda m, lr: torch.optim.Adamax(m.parameters(), lr=lr * 1e9, eps=1e9),
    "rmsprop": lambda m, lr: torch.optim.RMSprop(m.parameters(), lr=lr * 1e9, eps=1e9, momentum=0.6),
    "adagrad": lambda m, lr: torch.optim.Adagrad(m.parameters(), lr=lr * 1e9, eps=1e9, lr_decay=0.3),
    "rlo-adam": lambda m, lr: RLO(m.parameters(), lr * 1e9, eta=1.0, memory="adam", direction="identity", eps=1e9),
}


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["full", "mini-batch"])
@pytest.mark.parametrize("name", STILL)
def test_moments_and_their_corrections_are_exact_where_the_denominator_stands_still(name, batches):
    x, a = data(6, 3, 2)
    options = {"batches": batches, "schedule": SCHEDULE}
    run = trained(linear(3, 2), STILL[name], x, a, **options)
    other = trained(moved(linear(3, 2)), STILL[name], x, a, **options)
    w, states = injections(run, other)
    assert states.norm(dim=1).min() > 1e-3
    assert w.abs().max() < 1e-7


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_buffer_emptied_on_the_way_carries_nothing(nesterov):
    x, a = data(6, 3, 2)
    runs = []
    for model in (linear(3, 2), moved(linear(3, 2))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, nesterov=nesterov)
        with record(model, x, optimizer, targets=a) as run:
            for t in range(6):
                if t == 3:
                    optimizer.state.clear()
                optimizer.zero_grad()
                half_squares(model(x), a).mean().backward()
                optimizer.step()
        runs.append(run)
    assert injections(*runs)[0].abs().max() < 1e-12


def test_amsgrad_divides_by_the_largest_second_moment():
    x, a = data(4, 2, 2)
    model = mlp(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.5), amsgrad=True)
    with record(model, x, optimizer, targets=a) as run:
        for t in range(6):
            optimizer.zero_grad()
            (half_squares(model(x), a).mean() / 4**t).backward()
            optimizer.step()
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert (state["max_exp_avg_sq"] > state["exp_avg_sq"]).any()
        torch.testing.assert_close(run.masses(5)[name], (state["max_exp_avg_sq"] / (1 - 0.5**6)).sqrt() + 1e-8)


def test_trust_regions_with_the_damping_of_the_move_and_refused_steps():
    """One block, squared loss, a linear model: the quadratic model foretells the loss exactly, both runs damp alike."""
    x, a = data(6, 3, 2)
    make = lambda m, lr: Woodbury(m, 1.0, blocks="network", damping=LevenbergMarquardt())  # noqa: E731
    run, other = (trained(model, make, x, a, steps=3) for model in (linear(3, 2), moved(linear(3, 2))))
    w, states = injections(run, other)
    assert states.norm(dim=1)[:-1].min() > 1e-3
    assert w.abs().max() < 1e-10
    refusing = lambda m, lr: Woodbury(m, 50.0, damping=LevenbergMarquardt(trials=1))  # noqa: E731
    run = trained(mlp(3, 2), refusing, x, a, steps=1)
    assert torch.equal(run.outputs(1), run.outputs(0))
    assert torch.equal(ClosedLoop(run).matrices()[0], torch.eye(12, dtype=x.dtype))
    assert "refused a step" in ClosedLoop(run).description[0]
