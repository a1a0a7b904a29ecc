"""Composition of Riemannian modules: the matching rule, associativity, the interchange law, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.riemannian.manifold import Manifold, PulledBack, positive, product
from optim.riemannian.matching_rule import matching_gap
from optim.riemannian.module_step import metric_factors
from optim.riemannian.riemannian_module import ParallelModule, RiemannianModule, SequentialModule
from tests.optim.modules import dense_jacobian, drawn_point, fixed, generator, normal, smooth
from tests.reference import F64, definite_metric

SIZES = st.integers(1, 4)
SEEDS = st.integers(0, 10_000)


def same_to_first_order(a, b, seed=0, n=3, q=2):
    """Values, rows on the parameters, rows on the inputs."""
    draw = generator(seed)
    x, point = normal(draw, n, *a.inputs.shape), drawn_point(a, draw)
    assert a.parameters.keys() == b.parameters.keys()
    (y, back), (z, forth) = a.linearise(x, point), b.linearise(x, point)
    L = normal(draw, n, q, a.outputs.size)
    (rows, on_x), (others, on_x_too) = back(L), forth(L)
    assert torch.allclose(y.flatten(1), z.flatten(1), rtol=1e-13, atol=1e-13)
    assert torch.allclose(on_x, on_x_too, rtol=1e-12, atol=1e-12)
    assert all(torch.allclose(rows[name], others[name], rtol=1e-12, atol=1e-12) for name in rows)


@given(st.tuples(SIZES, SIZES, SIZES, SIZES), SEEDS)
def test_sequential_composition_is_associative(sizes, seed):
    p, q, r, s = sizes
    f, g, h = smooth("f", p, q), smooth("g", q, r), smooth("h", r, s, metric=1.0)
    left, right = f.sequential(g).sequential(h), f.sequential(g.sequential(h))
    assert [stage.name for stage in left.stages] == [stage.name for stage in right.stages] == ["f", "g", "h"]
    same_to_first_order(left, right, seed)


@given(st.tuples(SIZES, SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES), SEEDS)
def test_interchange_law(first, second, seed):
    """(f∥g);(h∥k) = (f;h)∥(g;k)."""
    f, h = smooth("f", *first[:2]), smooth("h", *first[1:], metric=2.0)
    g, k = smooth("g", *second[:2]), smooth("k", *second[1:], metric=definite_metric)
    across = f.parallel(g).sequential(h.parallel(k))
    along = f.sequential(h).parallel(g.sequential(k))
    assert set(across.parameters) == set(along.parameters)
    draw = generator(seed)
    x, point = normal(draw, 3, across.inputs.size), drawn_point(across, draw)
    assert torch.allclose(across(x, point), along(x, point), rtol=1e-13, atol=1e-13)
    ours, theirs = metric_factors(across, x, point), metric_factors(along, x, point)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-12, atol=1e-12) for name in ours)
    matrices = [module.outputs.matrix(module(x, point)) for module in (across, along)]
    assert torch.allclose(*matrices, rtol=1e-12)


@given(SIZES, SIZES, SEEDS)
def test_the_product_of_identities_is_an_identity(p, q, seed):
    one = lambda m: RiemannianModule(Manifold((m,)), {}, Manifold((m,)), lambda z, at: z)  # noqa: E731
    f = smooth("f", p + q, 2)
    same_to_first_order(one(p).parallel(one(q)).sequential(f), f, seed)
    same_to_first_order(one(p + q).sequential(f), f, seed)


@given(SEEDS)
def test_parallel_composition_is_associative(seed):
    f, g, h = smooth("f", 1, 2), smooth("g", 3, 1), smooth("h", 2, 2)
    same_to_first_order(f.parallel(g).parallel(h), f.parallel(g.parallel(h)), seed)


def test_values_are_those_of_the_maps():
    f, g, k = smooth("f", 3, 2), smooth("g", 2, 4), fixed(4, 2)
    draw = generator(0)
    chain = f.sequential(g).sequential(k)
    x, point = normal(draw, 5, 3), drawn_point(chain, draw)
    inner = (x @ point["f.W"].T).sin() + point["f.b"] * x.square().sum(1, keepdim=True)
    outer = (inner @ point["g.W"].T).sin() + point["g.b"] * inner.square().sum(1, keepdim=True)
    assert torch.allclose(f.sequential(g)(x, point), outer)
    assert torch.allclose(chain(x, point), k(outer, {}))
    beside = f.parallel(smooth("h", 2, 1))
    x, point = normal(draw, 5, 5), drawn_point(beside, draw)
    both = beside(x, point)
    assert torch.allclose(both[:, :2], f(x[:, :3], point))
    assert torch.allclose(both[:, 2:], smooth("h", 2, 1)(x[:, 3:], point))


@given(st.tuples(SIZES, SIZES, SIZES), SEEDS)
def test_the_output_metric_upstream_becomes_the_pullback(sizes, seed):
    """Gᵤₚ(z) = JᵀM(g(z))J with J = ∂g/∂z by autograd."""
    f, g = smooth("f", *sizes[:2]), smooth("g", *sizes[1:], metric=definite_metric)
    chain = f.sequential(g)
    assert isinstance(chain.stages[0].outputs.field, PulledBack)
    assert chain.stages[0].outputs.field.modules == (chain.stages[1],)
    draw = generator(seed)
    z, point = normal(draw, 3, sizes[1]), drawn_point(g, draw)
    J = torch.func.vmap(torch.func.jacrev(lambda zi: g(zi[None], point)[0]))(z)
    L = g.pulled_back(point).factor(z)
    assert torch.allclose(L.mT @ L, J.mT @ definite_metric(g(z, point)) @ J, rtol=1e-11, atol=1e-12)


def test_the_pullback_of_a_pullback_is_that_of_the_composition():
    f, g = smooth("f", 3, 2), smooth("g", 2, 2, metric=definite_metric)
    draw = generator(3)
    chain = f.sequential(g)
    x, point = normal(draw, 4, 3), drawn_point(chain, draw)
    step = f.with_metric(g.pulled_back(point))
    assert torch.allclose(step.pulled_back(point).factor(x), chain.pulled_back(point).factor(x), rtol=1e-12)


def test_a_pulled_back_metric_matches_and_a_stated_one_is_measured():
    f, g = smooth("f", 3, 2), smooth("g", 2, 2, metric=1.0)
    draw = generator(5)
    z, point = normal(draw, 4, 2), drawn_point(g, draw)
    f.pull_back(g).sequential(g)
    right = f.with_metric(g.pulled_back(point))
    right.sequential(g, at=(z, point))
    with pytest.raises(ValueError, match="relative gap"):
        right.sequential(g)  # not at other parameters
    L = g.pulled_back(point).factor(z)
    off = f.with_metric(lambda y: 1.21 * L.mT @ L)
    assert matching_gap(off.outputs, g, z, point) == pytest.approx(0.21)
    with pytest.raises(ValueError, match=r"relative gap 0\.21 at 4 points"):
        off.sequential(g, at=(z, point))
    with pytest.raises(ValueError, match="another module"):
        f.pull_back(smooth("g", 2, 2, metric=1.0)).sequential(g)


def test_a_stated_metric_that_is_the_pullback_everywhere_is_accepted():
    rotation = torch.linalg.qr(normal(generator(0), 3, 3)).Q
    turn = RiemannianModule(Manifold((3,)), {}, Manifold((3,), 4.0), lambda z, p: z @ rotation.T)
    smooth("f", 2, 3, metric=4.0).sequential(turn)
    with pytest.raises(ValueError, match="relative gap"):
        smooth("f", 2, 3, metric=4.001).sequential(turn)
    log = RiemannianModule(Manifold((3,), chart=positive((3,)).chart), {}, Manifold((3,), 5.0), lambda z, p: z.log())
    grow = RiemannianModule(Manifold((3,)), {}, positive((3,), 5.0), lambda z, p: z.exp())
    assert isinstance(grow.sequential(log), SequentialModule)  # dp²/p² is the pullback of du² by the logarithm


def test_interchange_with_metrics_pulled_back_beforehand():
    f, h, g, k = smooth("f", 2, 2), smooth("h", 2, 1, metric=1.0), smooth("g", 3, 1), smooth("k", 1, 2, metric=1.0)
    beside = f.pull_back(h).parallel(g.pull_back(k))
    below = h.parallel(k)
    assert below.branches == (h, k)
    assert isinstance(beside.sequential(below), SequentialModule)
    with pytest.raises(ValueError, match="another module"):
        g.pull_back(k).parallel(f.pull_back(h)).sequential(k.parallel(smooth("l", 2, 1, metric=1.0)))


def test_a_joint_output_metric_of_a_product_is_kept():
    beside = smooth("f", 2, 2).parallel(smooth("g", 1, 1)).with_metric(definite_metric)
    more = beside.with_metric(3.0).parallel(smooth("h", 1, 1, metric=1.0))
    draw = generator(0)
    x, point = normal(draw, 3, 4), drawn_point(more, draw)
    assert torch.allclose(more.outputs.matrix(more(x, point))[0].diagonal(), torch.tensor([3.0, 3, 3, 1]).double())
    M = definite_metric(beside(x[:, :3], point))
    K = metric_factors(beside, x[:, :3], point)
    J = dense_jacobian(beside, x[:, :3], {n: point[n] for n in beside.parameters})
    J = torch.cat([J["f.W"], J["f.b"]], -1)
    assert torch.allclose(K["f"].mT @ K["f"], J.mT @ M @ J, rtol=1e-11, atol=1e-12)


def test_points_of_other_shapes_pass_through_products():
    grid = RiemannianModule(
        Manifold((2, 3)), {"s": Manifold((), 1.0)}, Manifold((3, 2)), lambda z, p: p["s"] * z.mT, "t"
    )
    both = grid.parallel(smooth("f", 2, 2))
    assert both.inputs.shape == both.outputs.shape == (8,)
    draw = generator(0)
    x, point = normal(draw, 3, 8), drawn_point(both, draw)
    assert torch.allclose(both(x, point)[:, :6], point["t.s"] * x[:, :6].reshape(3, 2, 3).mT.flatten(1))
    nested = product(Manifold((2, 3)), Manifold((2,)))
    assert both.inputs.accepts(nested)


def test_tokens_have_no_input_jacobian():
    table = RiemannianModule(
        Manifold(()), {"E": Manifold((5, 2), 1.0)}, Manifold((2,)), lambda z, p: p["E"][z], "table"
    )
    chain = table.sequential(smooth("f", 2, 2, metric=1.0))
    x, point = torch.tensor([0, 3, 3]), drawn_point(chain, generator(0))
    K, J = metric_factors(chain, x, point), dense_jacobian(chain, x, point)
    assert torch.allclose(K["table"], J["table.E"], rtol=1e-12, atol=1e-13)
    assert chain.linearise(x, point)[1](torch.ones(3, 1, 2, dtype=F64))[1] is None


def test_what_is_refused():
    f, g = smooth("f", 3, 2), smooth("g", 2, 2, metric=1.0)
    space = Manifold((2,))
    x, point = torch.ones(4, 3, dtype=F64), drawn_point(f, generator(0))
    with pytest.raises(ValueError, match=r"f' has outputs \(2,\), module 'f' inputs \(3,\)"):
        f.sequential(f)
    with pytest.raises(ValueError, match="do not match"):
        f.pull_back(f)
    with pytest.raises(ValueError, match=r"called g\.W, g\.b: give the modules different names"):
        g.with_metric(None).sequential(smooth("g", 2, 2))
    with pytest.raises(ValueError, match="different names"):
        f.parallel(f)
    with pytest.raises(ValueError, match="states no metric"):
        RiemannianModule(Manifold((2,), 1.0), {}, space, lambda z, p: z)
    with pytest.raises(ValueError, match="'w' needs a metric"):
        RiemannianModule(space, {"w": Manifold((2,))}, space, lambda z, p: z)
    with pytest.raises(TypeError, match="map must be a function"):
        RiemannianModule(space, {}, space, torch.ones(2))
    with pytest.raises(TypeError, match="expected a RiemannianModule"):
        f.sequential(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a RiemannianModule"):
        f.parallel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="none that it could be the pullback of"):
        f.with_metric(1.0).sequential(smooth("h", 2, 2))
    with pytest.raises(ValueError, match=r"takes x of shape \(N, 3\), got \(4, 2\)"):
        f(x[:, :2], point)
    with pytest.raises(ValueError, match=r"the point lacks f\.b"):
        f(x, {"f.W": point["f.W"]})
    with pytest.raises(ValueError, match=r"'f\.b' has shape \(3,\), its manifold \(2,\)"):
        f(x, point | {"f.b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"gave \(4, 3\) for 4 samples, expected \(4, 2\)"):
        RiemannianModule(Manifold((3,)), {}, space, lambda z, p: z)(x, {})
    with pytest.raises(ValueError, match="gave float for 4 samples"):
        RiemannianModule(Manifold((3,)), {}, space, lambda z, p: 1.0)(x, {})
    centred = RiemannianModule(space, {}, Manifold((2,), 1.0), lambda z, p: z - z.mean(0))
    with pytest.raises(ValueError, match="interact"):
        metric_factors(centred, normal(generator(0), 3, 2), {})
    with pytest.raises(ValueError, match="depends on parameters"):
        f.pull_back(g).outputs.matrix(torch.ones(1, 2))
    assert "(3,) -> (2,)" in repr(f)
    assert isinstance(f.parallel(smooth("h", 1, 1)), ParallelModule)
