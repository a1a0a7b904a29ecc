"""The metric of a whole model against the dense matrices: products, inverses, roots, at parameters of one's choice."""

import pytest
import torch

from nt_kernel import NumericalError, layer_factors
from nt_kernel.mass import RowColumnMass
from nt_kernel.metric.model_metric import ModelMetric
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import Dense, definite_metric, distance, singular_metric, trainable

OPTIONS = {
    "default": {},
    "small mass": {"mass": 1e-3},
    "mass by parameter": {"mass": {"0.weight": 0.2, "0.bias": 3.0, "2.weight": 0.5, "2.bias": 1.0}},
    "sum": {"scale": "sum", "mass": 0.1},
    "none": {"scale": "none", "mass": 2.0},
    "softmax": {"output_metric": "cross_entropy", "mass": 1e-2},
    "definite": {"output_metric": definite_metric, "mass": 0.1},
    "singular": {"output_metric": singular_metric, "mass": 0.1},
    "network": {"blocks": "network", "mass": 0.1},
    "network, softmax": {"blocks": "network", "output_metric": "cross_entropy"},
}


def drawn(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=draw, dtype=F64) for n, p in trainable(model).items()}


def by_block(dense, u):
    return {b: torch.cat([u[n].flatten() for n in names]) for b, names in dense.blocks.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_product_is_the_dense_one(name):
    options = OPTIONS[name]
    torch.manual_seed(0)
    model, x = mlp(3, 5, 2).to(F64), torch.randn(4, 3, dtype=F64)
    dense, metric = Dense(model, x, **options), ModelMetric(model, x, **options)
    u, r = drawn(model), torch.randn(4, 2, dtype=F64)
    flat = by_block(dense, u)
    expected = {b: dense.G[b] @ v for b, v in flat.items()}
    found = by_block(dense, metric.apply(u))
    for b in flat:
        torch.testing.assert_close(found[b], expected[b], rtol=1e-12, atol=1e-12)
    square = sum(flat[b] @ expected[b] for b in flat)
    torch.testing.assert_close(metric.squared_norm(u), square, rtol=1e-12, atol=0)
    other = drawn(model, seed=2)
    pairing = sum(by_block(dense, other)[b] @ expected[b] for b in flat)
    torch.testing.assert_close(metric.root(other) @ metric.root(u), pairing, rtol=1e-11, atol=1e-11)
    assert distance(metric.gradient(r), dense.pull(r)) <= 1e-13
    tolerance = 1e-12 * dense.stiffness()
    assert distance(metric.direction(r), dense.solve(dense.pull(r))) <= tolerance
    assert distance(metric.solve(u), dense.solve(u)) <= tolerance
    assert distance(metric.solve(metric.apply(u)), u) <= tolerance


@pytest.mark.parametrize(
    "case", ["tied weights", "convolution", "attention", "frozen layer", "two inputs", "one sample"]
)
def test_every_kind_of_layer(case):
    model, x, _ = CASES[case].make()
    dense, metric, u = Dense(model, x, mass=0.3), ModelMetric(model, x, mass=0.3), drawn(model)
    expected = by_block(dense, u)
    for b, v in by_block(dense, metric.apply(u)).items():
        torch.testing.assert_close(v, dense.G[b] @ expected[b], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("blocks", ["layer", "network"])
@pytest.mark.parametrize("output_metric", ["identity", "cross_entropy"])
def test_the_metric_of_mean_jacobians(output_metric, blocks):
    """G = D + J̄ᵀM̄J̄ with the means over the samples, built from the dense Jacobians."""
    torch.manual_seed(0)
    model, x = mlp(3, 5, 3).to(F64), torch.randn(4, 3, dtype=F64)
    plain = Dense(model, x, output_metric=output_metric, blocks=blocks)
    metric = ModelMetric(model, x, mass=0.2, scale="mean-jacobian", output_metric=output_metric, blocks=blocks)
    M = sum(plain.M[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] for i in range(4)) / 4
    u = drawn(model)
    flat, found, square = by_block(plain, u), by_block(plain, metric.apply(u)), 0.0
    for b, J in plain.J.items():
        mean = J.reshape(4, 3, -1).mean(0)
        G = 0.2 * torch.eye(J.shape[1], dtype=F64) + mean.T @ M @ mean
        torch.testing.assert_close(found[b], G @ flat[b], rtol=1e-11, atol=1e-12)
        square = square + flat[b] @ G @ flat[b]
    torch.testing.assert_close(metric.squared_norm(u), square, rtol=1e-11, atol=0)
    assert distance(metric.solve(metric.apply(u)), u) <= 1e-11


def test_masses_of_every_form():
    torch.manual_seed(0)
    model, x = mlp(3, 5, 2).to(F64), torch.randn(4, 3, dtype=F64)
    entries = torch.rand(5, 3, dtype=F64) + 0.1
    mass = {"0.weight": entries, "2.weight": RowColumnMass(torch.tensor([1.0, 2.0]), torch.rand(5) + 0.5)}
    metric = ModelMetric(model, x, mass=mass)
    u = drawn(model)
    heavy = metric.apply(u)["0.weight"] - ModelMetric(model, x, mass=1.0).apply(u)["0.weight"]
    torch.testing.assert_close(heavy, (entries - 1) * u["0.weight"], rtol=1e-10, atol=1e-12)
    assert distance(metric.solve(metric.apply(u)), u) <= 1e-12
    pairing = sum((u[n] * v).sum() for n, v in metric.apply(u).items())
    torch.testing.assert_close(metric.squared_norm(u), pairing, rtol=1e-12, atol=0)


def test_other_parameters_than_the_models_own():
    torch.manual_seed(0)
    model, x = mlp(3, 5, 2).to(F64), torch.randn(4, 3, dtype=F64)
    other, before = drawn(model), {n: p.clone() for n, p in trainable(model).items()}
    y, factors = layer_factors(model, x, params=other)
    assert all(torch.equal(p, before[n]) for n, p in trainable(model).items())
    model.load_state_dict(other)
    expected, known = layer_factors(model, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for name, factor in factors.items():
        torch.testing.assert_close(factor.dense(), known[name].dense(), rtol=1e-13, atol=1e-13)


def test_a_model_in_float32_has_its_metric_in_float64():
    torch.manual_seed(0)
    model, x = mlp(3, 5, 2), torch.randn(4, 3)
    metric = ModelMetric(model, x, output_metric="cross_entropy", mass=0.1)
    u = drawn(model)
    assert all(t.dtype == F64 for t in (metric.outputs, *metric.apply(u).values(), *metric.solve(u).values()))
    assert distance(metric.solve(metric.apply(u)), u) <= 1e-11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "means"}, "unknown scale 'means'"),
        ({"solver": "lu"}, "unknown solver 'lu'"),
        ({"blocks": "layers"}, "blocks must be"),
        ({"mass": -1.0}, "mass must be positive"),
        ({"output_metric": "fishy"}, "unknown output metric"),
        ({"params": {"0.weight": torch.zeros(5, 3)}}, "differing: 0.bias, 2.bias, 2.weight"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ModelMetric(mlp(3, 5, 2), torch.zeros(2, 3), **options)


def test_outputs_that_are_not_finite():
    model, x = mlp(3, 5, 2).to(F64), torch.randn(4, 3, dtype=F64)
    lost = {n: torch.full_like(p, torch.nan) for n, p in trainable(model).items()}
    metric = ModelMetric(model, x, params=lost)
    with pytest.raises(NumericalError, match="did training diverge"):
        metric.direction(torch.ones(4, 2, dtype=F64))
