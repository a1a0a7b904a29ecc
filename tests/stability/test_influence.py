"""Influence functions and TracIn against dense Jacobians, dense Hessians and sums written out; exact cases; bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nt_kernel.errors import NumericalError
from stability.influence_functions import Effects, influence
from stability.tracing import tracin, tracin_path
from tests.reference import Dense, identity_matrix, jacobians, run, softmax_matrix, trainable
from tests.stability.dense import F64, DenseRun, small_problem, twin_data


def logistic_matrix(y):
    return torch.diag_embed(y.sigmoid() * (1 - y.sigmoid()))


LOSSES = {
    "squared": (lambda y, a: y - a, identity_matrix),
    "cross_entropy": (lambda y, a: y.softmax(1) - a, softmax_matrix),
    "logistic": (lambda y, a: y.sigmoid() - a, logistic_matrix),
}


def problem(seed=0, Z=3, Q=2, **shape):
    model, x, a, _, _ = small_problem(seed, **shape)
    draw = torch.Generator().manual_seed(seed + 1000)
    others = torch.randn(Z, x.shape[1], dtype=F64, generator=draw)
    return (
        model, x, a, others, torch.randn(Z, a.shape[1], dtype=F64, generator=draw),
        torch.randn(Q, x.shape[1], dtype=F64, generator=draw),
    )  # fmt: skip


def network_jacobian(model, x):
    """J [N, C, m]."""
    return torch.cat(list(jacobians(model, x).values()), -1)


def mass_vector(model, mass):
    """The diagonal of D by parameter; a dict names layers or parameters."""
    value = lambda name: mass.get(name, mass.get(name.rpartition(".")[0])) if isinstance(mass, dict) else mass  # noqa: E731
    return torch.cat([torch.full((p.numel(),), value(n), dtype=F64) for n, p in trainable(model).items()])


def dense_influence(model, x, a, others, other_a, query, damping, loss):
    """[n, Z, U, p], every (k, z') by its own m × m solve."""
    gradient, matrix = LOSSES[loss]
    n = len(x)
    points, targets = torch.cat([x, others, query]), torch.cat([a, other_a])
    J, y = network_jacobian(model, points), run(model, trainable(model), points)
    H = sum(J[i].T @ matrix(y[i][None])[0] @ J[i] for i in range(n)) / n
    g = [J[j].T @ gradient(y[j][None], targets[j][None])[0] for j in range(len(targets))]
    A = H + torch.diag(mass_vector(model, damping))
    rows = [
        torch.stack([J @ torch.linalg.solve(A, g[z] - g[k]) / -n for z in range(n, len(targets))]) for k in range(n)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("damping", [1e-3, 0.5, {"0": 0.1, "2": 1.0, "4": 0.3}], ids=["small", "large", "by layer"])
def test_influence_equals_dense_solves(loss, damping):
    model, *data = problem()
    found = influence(model, *data, damping=damping, loss=loss).all()
    expected = dense_influence(model, *data, damping, loss)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@given(
    seed=st.integers(0, 1000), n=st.integers(1, 5), p=st.integers(1, 3), Z=st.integers(1, 3), width=st.integers(1, 6)
)
def test_influence_equals_dense_solves_for_any_shape(seed, n, p, Z, width):
    model, *data = problem(seed, Z=Z, n=n, p=p, width=width, twins=1)
    found = influence(model, *data, damping=0.1).all()
    torch.testing.assert_close(found, dense_influence(model, *data, 0.1, "squared"), rtol=1e-8, atol=1e-10)


def test_a_model_of_one_output_layer():  # K = A ⊗ I throughout
    _, *data = problem(seed=4)
    model = nn.Linear(3, 2).to(F64)
    for damping in (0.2, {"weight": 0.2, "bias": 0.7}):
        found = influence(model, *data, damping=damping).all()
        torch.testing.assert_close(found, dense_influence(model, *data, damping, "squared"))
    run = [(trainable(model), 0.3)]
    step = tracin(model, *data, checkpoints=run, mass=0.5)
    torch.testing.assert_close(step.all(), dense_tracin(model, data, run, mass=0.5))


def test_params_are_used_and_the_model_is_left_alone():
    model, *data = problem(seed=1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    moved = {n: p + 0.1 for n, p in trainable(model).items()}
    at_params = influence(model, *data, damping=0.1, params=moved).all()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(moved[name])
    torch.testing.assert_close(at_params, influence(model, *data, damping=0.1).all())


def ridge_minimum(x, a, decay):
    """argmin (1/2n)‖xW − a‖² + ½·decay·‖W‖², [d, p]."""
    n, d = x.shape
    return torch.linalg.solve(x.T @ x / n + decay * torch.eye(d, dtype=F64), x.T @ a / n)


@pytest.mark.parametrize("n", [10, 40, 160])
def test_at_the_ridge_minimum_the_error_is_that_of_the_hessian(n):
    """θ' − θ = −(H' + λ)⁻¹(∇ℓ_z' − ∇ℓ_k)/n exactly, so the influence is off by (H' + λ)⁻¹(H' − H): order 1/n of itself."""
    draw = torch.Generator().manual_seed(n)
    x, a = torch.randn(n, 3, dtype=F64, generator=draw), torch.randn(n, 2, dtype=F64, generator=draw)
    z, z_a = torch.randn(1, 3, dtype=F64, generator=draw), torch.randn(1, 2, dtype=F64, generator=draw)
    model = nn.Linear(3, 2, bias=False).to(F64)
    W = ridge_minimum(x, a, 0.3)
    with torch.no_grad():
        model.weight.copy_(W.T)
    x2, a2 = x.clone(), a.clone()
    x2[0], a2[0] = z[0], z_a[0]
    found = influence(model, x, a, z, z_a, damping=0.3).replaced(0, 0)[: len(x)]
    truth = x @ (ridge_minimum(x2, a2, 0.3) - W)
    A2 = x2.T @ x2 / n + 0.3 * torch.eye(3, dtype=F64)
    change = (x2.T @ x2 - x.T @ x) / n
    rate = torch.linalg.matrix_norm(torch.linalg.solve(A2, change), 2)
    moved = torch.linalg.lstsq(x, found).solution  # W' − W as the influence has it
    assert (ridge_minimum(x2, a2, 0.3) - W - moved).norm() <= rate * moved.norm() * (1 + 1e-9)
    assert (found - truth).norm() <= 20 / n * truth.norm()
    assert (found - truth).norm() > 0


def dense_tracin(model, data, checkpoints, *, mass=1.0, scale="mean", blocks="layer", metric="identity"):
    x, a, others, other_a, query = data
    points, targets = torch.cat([x, others, query]), torch.cat([a, other_a])
    total = 0.0
    for params, lr in checkpoints:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(params[name])
        dense = Dense(model, x, mass=mass, scale=scale, blocks=blocks, output_metric=metric)
        R = sum(dense.kernel(b, points, points[: len(targets)]) for b in dense.blocks)
        R = R.reshape(len(points), -1, len(targets), a.shape[1])
        r = run(model, params, points[: len(targets)]) - targets
        total = total - lr / len(x) * torch.einsum("ucbd,bd->buc", R, r)
    return total[None, len(x) :] - total[: len(x), None]


OPTIONS = {
    "as published": {"scale": "none"},
    "masses": {"scale": "none", "mass": 0.3},
    "woodbury": {"mass": 0.1},
    "sum": {"mass": 0.5, "scale": "sum"},
    "one block": {"mass": 0.2, "blocks": "network"},
    "metric": {"mass": 0.2, "metric": "cross_entropy"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_tracin_equals_the_sum_written_out(case):
    options = OPTIONS[case]
    model, *data = problem(seed=2)
    shift = torch.Generator().manual_seed(5)
    path = [
        ({n: p + 0.2 * torch.randn(p.shape, dtype=F64, generator=shift) for n, p in trainable(model).items()}, lr)
        for lr in (0.1, 0.3, 0.05)
    ]
    named = {"output_metric" if k == "metric" else k: v for k, v in options.items()}
    partial = [effects.all() for effects in tracin_path(model, *data, checkpoints=iter(path), **named)]
    for t in range(3):
        expected = dense_tracin(model, data, path[: t + 1], **options)
        torch.testing.assert_close(partial[t], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(tracin(model, *data, checkpoints=path, **named).all(), partial[-1])


@pytest.mark.parametrize("scale", ["none", "mean"])
def test_one_step_of_a_linear_model_is_foretold_exactly_where_the_metrics_agree(scale):
    """After one step of gradient descent from a shared start the twins differ by exactly the pull difference; with the
    metric of S' (here rebuilt) they do not."""
    _, x, a, zs, _ = small_problem(seed=3, twins=1)
    torch.manual_seed(0)
    model, (z,) = nn.Linear(3, 2).to(F64), zs
    c = 1 / len(x) if scale == "mean" else 0.0
    x2, a2 = twin_data(x, a, z)
    own, twin = DenseRun(model, x, a, mass=1.0, c=c), DenseRun(model, x2, a2, mass=1.0, c=c)
    start = [(dict(own.params), 0.2)]
    own.step(0.2), twin.step(0.2)
    truth = (twin.outputs(x) - own.outputs(x)).detach()
    found = tracin(model, x, a, z.x[None], z.target[None], checkpoints=start, scale=scale).replaced(z.index, 0)
    assert torch.allclose(found[: len(x)], truth, rtol=1e-10, atol=1e-12) == (scale == "none")
    torch.testing.assert_close(found[: len(x)], truth, rtol=0.5, atol=0.1)


def test_a_replacement_by_itself_has_no_effect():
    model, x, a, *_, query = problem(seed=6)
    effects = influence(model, x, a, x, a, query, damping=0.1).all()
    for k in range(len(x)):
        torch.testing.assert_close(effects[k, k], torch.zeros_like(effects[k, k]), rtol=0, atol=1e-12)


def test_effects_by_index_are_those_of_all():
    effects = Effects(torch.randn(5, 7, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), 3)
    k, j = torch.tensor([2, 0]), torch.tensor([1, 0])
    torch.testing.assert_close(effects.replaced(k, j), effects.all()[k, j])
    for bad in ((3, 0), (0, 2), (-1, 0), (0, -1), (0.5, 0)):
        with pytest.raises(ValueError, match="must be in 0"):
            effects.replaced(*bad)


def test_float32_models_give_float64_effects():
    model, *data = problem(seed=7)
    exact = influence(model, *data, damping=0.1).all()
    found = influence(model.float(), *(t.float() for t in data), damping=0.1).all()
    assert found.dtype == F64
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_bad_input():
    model, x, a, others, other_a, query = problem()
    ask = lambda *data, **options: influence(model, *data, **{"damping": 0.1, **options})  # noqa: E731
    with pytest.raises(ValueError, match="unknown loss 'square'"):
        ask(x, a, others, other_a, loss="square")
    with pytest.raises(ValueError, match="other_targets must be"):
        ask(x, a, others, other_a[:1])
    with pytest.raises(ValueError, match="targets must be"):
        ask(x, a[:, 0], others, other_a)
    with pytest.raises(ValueError, match="query has samples of shape"):
        ask(x, a, others, other_a, query[:, :2])
    with pytest.raises(ValueError, match="holds NaN"):
        ask(x, a, others * float("nan"), other_a)
    with pytest.raises(TypeError, match="use one of each"):
        ask(x, a, others.float(), other_a)
    with pytest.raises(TypeError, match="floating-point"):
        ask(x, a, [1.0], other_a)
    with pytest.raises(ValueError, match="gives 2 outputs, targets have 1"):
        ask(x, a[:, :1], others, other_a[:, :1])
    with pytest.raises(ValueError, match="mass"):
        ask(x, a, others, other_a, damping=-1.0)
    with pytest.raises(NumericalError, match="not finite"):
        ask(x * 1e200, a, others, other_a)
    run = [(trainable(model), 0.0)]
    with pytest.raises(ValueError, match="lr > 0"):
        tracin(model, x, a, others, other_a, checkpoints=run)
    with pytest.raises(ValueError, match="checkpoints is empty"):
        tracin(model, x, a, others, other_a, checkpoints=[])
    with pytest.raises(ValueError, match="mean-jacobian"):
        tracin(model, x, a, others, other_a, checkpoints=[(trainable(model), 0.1)], scale="mean-jacobian")
