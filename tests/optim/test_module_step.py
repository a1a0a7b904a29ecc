"""Metric factors by the recursion and the direction G⁻¹∇h, against autograd's Jacobian and dense solves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nt_kernel import layer_factors
from nt_kernel.errors import NumericalError
from nt_kernel.metric.output_metric import resolve_output_metric
from optim.riemannian.manifold import LOG, Chart, Manifold, positive
from optim.riemannian.module_step import metric_factors, riemannian_direction, riemannian_step
from optim.riemannian.riemannian_module import RiemannianModule
from tests.nt_kernel.cases import CASES
from tests.optim.modules import (
    dense_direction,
    dense_jacobian,
    drawn_point,
    fixed,
    generator,
    normal,
    smooth,
    stiffness,
)
from tests.reference import (
    F64,
    SCALE,
    definite_metric,
    distance,
    layers_of,
    singular_metric,
    softmax_matrix,
    trainable,
)

METRICS = {
    "identity": "identity",
    "scaled": 3.0,
    "softmax": "cross_entropy",
    "definite": definite_metric,
    "singular": singular_metric,
}
SHAPES = {
    "one": lambda metric: smooth("f", 3, 2, metric, mass=0.1),
    "chain": lambda metric: smooth("f", 3, 4).sequential(fixed(4, 3)).sequential(smooth("g", 3, 2, metric)),
    "joined": lambda metric: smooth("f", 2, 2).parallel(smooth("g", 1, 2)).sequential(smooth("h", 4, 2, metric)),
    "beside": lambda metric: smooth("f", 2, 1).parallel(smooth("g", 1, 1)).with_metric(metric),
}


def problem(shape, metric, seed=0, n=4):
    module, draw = SHAPES[shape](metric), generator(seed)
    x, point = normal(draw, n, 3), drawn_point(module, draw)
    y = module(x, point)
    M = None if metric is None else module.outputs.matrix(y)
    return module, x, point, normal(draw, *y.shape) / n, M


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_recursion_is_the_jacobian_route(shape, metric):
    """𝒦_α = L_yJ_α, entry by entry, with J by autograd of the whole map."""
    module, x, point, _, M = problem(shape, METRICS[metric])
    L = module.outputs.factor(module(x, point))
    K, J = metric_factors(module, x, point), dense_jacobian(module, x, point)
    assert list(K) == list(module.blocks)
    for block, names in module.blocks.items():
        own = torch.cat([J[n] for n in names], -1)
        assert torch.allclose(K[block].mT @ K[block], own.mT @ M @ own)
        own = own if L is None else L @ own
        assert (K[block] - own).abs().max() <= 1e-12 * max(1, own.abs().max())


@given(st.integers(1, 4), st.integers(0, 1000))
def test_any_rows_may_be_passed(q, seed):
    module, x, point, _, _ = problem("joined", 1.0, seed, n=3)
    L = normal(generator(seed), 3, q, 2)
    K, J = metric_factors(module, x, point, L), dense_jacobian(module, x, point)
    for block, names in module.blocks.items():
        assert K[block].shape[1] == q
        assert torch.allclose(K[block], L @ torch.cat([J[n] for n in names], -1), rtol=1e-11, atol=1e-12)


def test_one_row_is_backpropagation():
    module, x, point, r, _ = problem("joined", 1.0)
    leaves = {n: p.clone().requires_grad_() for n, p in point.items()}
    (module(x, leaves) * r).sum().backward()
    K = metric_factors(module, x, point, r[:, None, :])
    for block, names in module.blocks.items():
        grad = torch.cat([leaves[n].grad.flatten() for n in names])
        assert torch.allclose(K[block].sum((0, 1)), grad, rtol=1e-12, atol=1e-13)


ONE_INPUT = [
    n for n, case in CASES.items() if not case.output and n not in ("two inputs", "old weight_norm")
]  # uncopyable


@pytest.mark.parametrize("name", ONE_INPUT)
def test_networks_have_the_factors_of_nt_kernel(name):
    model, x, _ = CASES[name].make()
    y, factors = layer_factors(model, x)
    metric = "cross_entropy" if y.shape[1] > 1 else 4.0
    module = RiemannianModule.from_torch(model, x, output_metric=metric)
    L = resolve_output_metric(metric).factor(y) if y.shape[1] > 1 else torch.full((len(y), 1, 1), 2.0, dtype=F64)
    K = metric_factors(module, x, trainable(model))
    assert list(K) == list(factors) == list(layers_of(model))
    for block, factor in factors.items():
        own = L @ factor.dense()
        assert (K[block] - own).abs().max() <= 1e-12 * max(1, own.abs().max())


class LargestArray(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.numel())
        return out


def test_no_jacobian_of_the_outputs_is_formed():
    N, q, inside, hidden, out = 3, 2, 5, 40, 30
    module = smooth("f", inside, hidden).sequential(smooth("g", hidden, out))
    draw = generator(0)
    x, point, L = normal(draw, N, inside), drawn_point(module, draw), normal(draw, N, q, out)
    with LargestArray() as seen:
        K = metric_factors(module, x, point, L)
    largest = max(N * q * max(inside, hidden), *(k.numel() for k in K.values()))  # [N, q, dim z], [N, q, m_α]
    assert K["g"].numel() == largest == N * q * (out * hidden + out)
    assert seen.entries <= largest
    with LargestArray() as seen:
        dense_jacobian(module, x, point)
    assert seen.entries >= N * out * hidden * out  # so the meter sees what it should


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_direction_is_the_dense_solve(shape, metric, scale):
    module, x, point, r, M = problem(shape, METRICS[metric])
    c = SCALE[scale](len(x))
    found = riemannian_direction(module, x, point, r, scale=scale)
    expected = dense_direction(module, x, point, r, M, c)
    assert distance(found, expected) <= 1e-12 * stiffness(module, x, point, M, c)


def test_direction_with_a_factor_given():
    module, x, point, r, _ = problem("chain", None)
    L = normal(generator(1), len(x), 1, 2)
    found = riemannian_direction(module, x, point, r, output_factor=L)
    assert distance(found, dense_direction(module, x, point, r, L.mT @ L, 0.25)) < 1e-11


MATRIX_OF_PARAMETERS = normal(generator(9), 6, 6)
MATRIX_OF_PARAMETERS = MATRIX_OF_PARAMETERS @ MATRIX_OF_PARAMETERS.T + 0.1 * torch.eye(6, dtype=F64)


@pytest.mark.parametrize(
    "manifold",
    [
        Manifold((2, 3), 0.01),
        Manifold((2, 3), torch.arange(1.0, 7, dtype=F64).reshape(2, 3)),
        Manifold((2, 3), MATRIX_OF_PARAMETERS),
        Manifold((2, 3), lambda u: torch.diag_embed(1 + u.square())),
        Manifold((2, 3), lambda u: MATRIX_OF_PARAMETERS + u[:, :, None] * u[:, None, :]),
        positive((2, 3), torch.arange(1.0, 7, dtype=F64).reshape(2, 3)),
        Manifold((2, 3), MATRIX_OF_PARAMETERS, LOG),
    ],
    ids=["mass", "diagonal", "matrix", "diagonal field", "field", "positive", "matrix in a chart"],
)
def test_every_metric_of_the_parameters(manifold):
    module = RiemannianModule(
        Manifold((3,)),
        {"W": manifold, "b": Manifold((2,), 0.5)},
        Manifold((2,), definite_metric),
        lambda z, p: (z @ p["W"].T).sin() + p["b"],
        "f",
    )
    draw = generator(2)
    x, point = normal(draw, 4, 3), drawn_point(module, draw)
    r, M = normal(draw, 4, 2), definite_metric(module(x, point))
    found = riemannian_direction(module, x, point, r, scale="sum")
    assert distance(found, dense_direction(module, x, point, r, M, 1.0)) <= 1e-12 * stiffness(module, x, point, M, 1.0)


@pytest.mark.parametrize("scale", ["mean", "none"])
@pytest.mark.parametrize("metric", [0.3, lambda u: softmax_matrix(u) + torch.eye(6, dtype=F64)])
@pytest.mark.parametrize("chart", ["logarithm", "linear"])
def test_the_direction_is_a_vector_whatever_the_coordinates(chart, metric, scale):
    """The same module in θ and in u: v_θ = (∂θ/∂u) v_u."""
    A = normal(generator(3), 6, 6) + 4 * torch.eye(6, dtype=F64)
    linear = Chart(
        lambda u: (A @ u.flatten()).reshape(2, 3), lambda p: torch.linalg.solve(A, p.flatten()).reshape(2, 3)
    )
    chart = LOG if chart == "logarithm" else linear

    def module(manifold, change):
        f = lambda z, p: (z @ change(p["W"]).T).sin()  # noqa: E731
        return RiemannianModule(Manifold((3,)), {"W": manifold}, Manifold((2,), "identity"), f)

    upstairs = module(Manifold((2, 3), metric), chart.point)
    downstairs = module(Manifold((2, 3), metric, chart), lambda p: p)
    draw = generator(1)
    x, u, r = normal(draw, 4, 3), 0.5 * normal(draw, 2, 3), normal(draw, 4, 2)
    v_u = riemannian_direction(upstairs, x, {"W": u}, r, scale=scale)["W"]
    v = riemannian_direction(downstairs, x, {"W": chart.point(u)}, r, scale=scale)["W"]
    assert torch.allclose(v, torch.func.jvp(chart.point, (u,), (v_u,))[1], rtol=1e-9, atol=1e-11)
    moved = riemannian_step(downstairs, {"W": chart.point(u)}, {"W": v}, 0.7)["W"]
    assert torch.allclose(moved, chart.point(u - 0.7 * v_u), rtol=1e-9, atol=1e-11)


def test_small_mass_does_not_cancel():
    """At mass 1e-10 the push-through form keeps the digits that g − Jᵀ(…) loses."""
    tiny = RiemannianModule(
        Manifold((2,)), {"w": Manifold((2,), 1e-10)}, Manifold((1,), 2.0), lambda z, p: (z @ p["w"])[:, None].sin()
    )
    draw = generator(0)
    x, w, r = normal(draw, 1, 2), normal(draw, 2), normal(draw, 1, 1)
    v = riemannian_direction(tiny, x, {"w": w}, r)["w"]
    a = x[0] * (x[0] @ w).cos()
    assert torch.allclose(v, a * r[0, 0] / (1e-10 + 2 * a @ a), rtol=1e-12)


def test_nothing_of_the_caller_is_changed():
    module, x, point, r, _ = problem("chain", "cross_entropy")
    state = torch.get_rng_state()
    before = {n: p.clone() for n, p in point.items()}
    kept = x.clone(), r.clone()
    riemannian_step(module, point, riemannian_direction(module, x, point, r), 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], point[n]) for n in point)
    assert torch.equal(x, kept[0])
    assert torch.equal(r, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtype_is_that_of_the_inputs(dtype, device):
    _, x, _, r, _ = problem("one", "cross_entropy")
    cast = lambda t: t.to(device, dtype)  # noqa: E731
    module = SHAPES["one"]("cross_entropy")
    point = {n: cast(p) for n, p in drawn_point(module, generator(0)).items()}
    found = riemannian_direction(module, cast(x), point, cast(r))
    assert all(v.dtype == dtype and v.device.type == device for v in found.values())


def test_what_is_refused():
    module, x, point, r, _ = problem("chain", None)
    with pytest.raises(ValueError, match="has no metric"):
        metric_factors(module, x, point)
    with pytest.raises(ValueError, match=r"L_y has shape \(4, 2\)"):
        metric_factors(module, x, point, r)
    with pytest.raises(ValueError, match=r"L_y has shape \(4, 1, 3\)"):
        metric_factors(module, x, point, torch.ones(4, 1, 3, dtype=F64))
    whole = module.with_metric(1.0)
    with pytest.raises(ValueError, match=r"r has \(4, 1\) entries, the outputs \(4, 2\)"):
        riemannian_direction(whole, x, point, r[:, :1])
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        riemannian_direction(whole, x, point, r, scale="men")
    with pytest.raises(ValueError, match="no factor c"):
        riemannian_direction(whole, x, point, r, scale="mean-jacobian")
    flat = RiemannianModule(
        Manifold((1,)), {"w": Manifold((2,), lambda u: u[:, :, None] * u[:, None, :])}, Manifold((1,), 1.0),
        lambda z, p: z * p["w"].sum(),
    )  # fmt: skip
    with pytest.raises(NumericalError, match="not positive definite"):
        riemannian_direction(flat, torch.ones(1, 1), {"w": torch.tensor([1.0, 2.0])}, torch.ones(1, 1))
