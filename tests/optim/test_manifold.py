"""Manifolds: every way to state a metric, charts, the exponential map of the positive reals, products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel.errors import NumericalError
from nt_kernel.metric.output_metric import from_factor
from optim.riemannian.manifold import LOG, Chart, Manifold, output_metric, positive, product
from tests.optim.modules import generator, normal
from tests.reference import F64, softmax_matrix

A = normal(generator(1), 3, 3) + 3 * torch.eye(3, dtype=F64)
LINEAR = Chart(point=lambda u: A @ u, coordinates=lambda p: torch.linalg.solve(A, p))


def points(n=4, m=3, seed=0):
    return normal(generator(seed), n, m)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (2.0, lambda p: 2.0 * torch.eye(3, dtype=F64).expand(4, 3, 3)),
        (1, lambda p: torch.eye(3, dtype=F64).expand(4, 3, 3)),
        (torch.tensor([1.0, 2.0, 3.0], dtype=F64), lambda p: torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()),
        (A @ A.T, lambda p: (A @ A.T).expand(4, 3, 3)),
        ("cross_entropy", softmax_matrix),
        (lambda p: torch.diag_embed(p.exp()), lambda p: torch.diag_embed(p.exp())),
        (from_factor(lambda p: p[:, None, :]), lambda p: p[:, :, None] * p[:, None, :]),
    ],
)
def test_every_way_to_state_a_metric(metric, expected):
    p = points()
    assert torch.allclose(Manifold((3,), metric).matrix(p), expected(p).to(F64), rtol=1e-12, atol=1e-13)


def test_a_metric_in_a_chart_is_pulled_back_to_the_points():
    p = points().exp()
    assert torch.allclose(positive((3,), 5.0).matrix(p), torch.diag_embed(5 / p**2), rtol=1e-13)
    curved = Manifold((3,), softmax_matrix, LINEAR)
    back = torch.linalg.inv(A)
    expected = back.T @ softmax_matrix(p @ back.T) @ back
    assert torch.allclose(curved.matrix(p), expected, rtol=1e-11, atol=1e-12)
    both = Manifold((3,), torch.tensor([1.0, 2.0, 4.0], dtype=F64), LOG)
    assert torch.allclose(both.matrix(p), torch.diag_embed(torch.tensor([1.0, 2.0, 4.0]) / p**2), rtol=1e-13)


@pytest.mark.parametrize("chart", [None, LOG, LINEAR])
@pytest.mark.parametrize("metric", [0.3, torch.tensor([1.0, 2.0, 4.0], dtype=F64), A @ A.T, softmax_matrix])
def test_the_metric_at_one_point_is_the_matrix_there(chart, metric):
    manifold, p = Manifold((3,), metric, chart), points()[0].exp()
    mass = torch.as_tensor(manifold.mass_at(p), dtype=F64)
    matrix = mass if mass.dim() == 2 else torch.diag(mass.expand(3))
    assert torch.allclose(matrix, manifold.matrix(p[None])[0], rtol=1e-12)


def test_mass_is_a_constant_diagonal_in_the_chart_or_nothing():
    assert Manifold((2,), 3).mass == positive((2,), 3).mass == 3.0
    assert torch.equal(Manifold((2,), torch.ones(2)).mass, torch.ones(2))
    assert Manifold((2,), torch.eye(2)).mass is None
    assert Manifold((2,), "identity").mass is None
    assert Manifold((2,)).mass is None


@given(st.floats(-3, 3), st.floats(-30, 30), st.floats(0.01, 10))
def test_the_step_on_positive_reals_is_the_exponential_map(u, v, mass):
    """The curve t ↦ exp_p(tv) has constant speed |v|_p, starts with velocity v, and its length is the distance."""
    manifold = positive((), mass)
    p = torch.tensor(u, dtype=F64).exp()
    v = v * p
    curve = lambda t: manifold.retract(p, t * v)  # noqa: E731
    for t in (0.0, 0.7):
        t = torch.tensor(t, dtype=F64)
        q, velocity = torch.func.jvp(curve, (t,), (torch.ones_like(t),))
        speed = (manifold.matrix(q[None])[0, 0, 0]).sqrt() * velocity.abs()
        assert torch.allclose(speed, mass**0.5 * v.abs() / p, rtol=1e-12)
        if t == 0:
            assert torch.allclose(velocity, v)
    assert curve(1.0) > 0
    length = mass**0.5 * (curve(1.0) / p).log().abs()
    assert torch.allclose(length, mass**0.5 * v.abs() / p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chart", [None, LOG, LINEAR])
def test_a_retraction_starts_along_its_tangent(chart):
    manifold, p, v = Manifold((3,), 1.0, chart), points()[0].exp(), points(seed=3)[0]
    zero = torch.zeros((), dtype=F64)
    q, velocity = torch.func.jvp(lambda t: manifold.retract(p, t * v), (zero,), (torch.ones_like(zero),))
    assert torch.allclose(q, p)
    assert torch.allclose(velocity, v)
    assert torch.allclose(manifold.point(manifold.coordinates(p)), p)


def test_product_metric_is_block_diagonal_and_flattens():
    a, b = Manifold((2, 2), 2.0), positive((3,), 5.0)
    both = product(product(a, b), Manifold((), 1.0))
    assert both.shape == (8,)
    assert [part.shape for part in both.parts] == [(2, 2), (3,), ()]
    p = points(m=8).exp()
    expected = [torch.block_diag(2 * torch.eye(4), torch.diag(5 / pi[4:7] ** 2), torch.eye(1)).double() for pi in p]
    assert torch.allclose(both.matrix(p), torch.stack(expected), rtol=1e-13)
    assert product(Manifold((2,), 1.0), Manifold((3,), 1)).factor(p[:, :5]) is None  # the identity stays one


PAIRS = [(Manifold((2,), 4.0), positive((3,))), (Manifold((3,), "cross_entropy"), Manifold((2,), 1.0))]


@pytest.mark.parametrize("parts", PAIRS)
def test_lift_of_a_product_is_a_split(parts):
    metric, y, r = output_metric(product(*parts)), points(m=5).exp(), points(m=5, seed=2)
    L = metric.factor(y)
    rho, rest = metric.lift(y, L, r)
    assert torch.allclose((L.mT @ rho[..., None])[..., 0] + rest, r)
    inside = L.mT @ normal(generator(4), 4, L.shape[1], 1)
    _, rest = metric.lift(y, L, inside[..., 0])
    assert rest.abs().max() < 1e-12


def test_a_product_with_another_metric_keeps_it():
    joint = Manifold((5,), 7.0, parts=(Manifold((2,)), Manifold((3,))))
    more = product(joint, Manifold((1,), 1.0))
    assert torch.allclose(more.matrix(points(m=6))[0].diagonal(), torch.tensor([7.0] * 5 + [1.0]).double())
    assert len(more.parts) == 3


def test_which_points_are_accepted():
    flat = Manifold((5,))
    split, other = product(Manifold((2,)), Manifold((3,))), product(Manifold((3,)), Manifold((2,)))
    assert flat.accepts(split)
    assert split.accepts(flat)
    assert split.accepts(product(Manifold((2,)), Manifold((3,))))
    assert not split.accepts(other)
    assert not flat.accepts(Manifold((5, 1)))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Manifold(3), ValueError, "tuple of integers"),
        (lambda: Manifold((0,)), ValueError, "tuple of integers"),
        (lambda: Manifold((2.0,)), ValueError, "tuple of integers"),
        (lambda: Manifold((2,), 0.0), ValueError, "positive and finite, got 0.0"),
        (lambda: Manifold((2,), float("inf")), ValueError, "positive and finite"),
        (lambda: Manifold((2,), True), ValueError, "positive and finite, got True"),
        (lambda: Manifold((2,), torch.tensor([1.0, -1.0])), ValueError, "positive, finite entries"),
        (lambda: Manifold((2,), torch.ones(3)), ValueError, r"is a matrix \(2, 2\); got \(3,\)"),
        (lambda: Manifold((2,), torch.tensor([[1.0, 0.0], [0.0, -1.0]])), NumericalError, "not positive semidefinite"),
        (lambda: Manifold((2,), "identiy"), ValueError, "did you mean 'identity'"),
        (lambda: Manifold((2,), [1.0]), TypeError, "output_metric must be"),
        (lambda: Manifold((2,)).matrix(torch.ones(1, 2)), ValueError, "has no metric"),
        (lambda: output_metric(Manifold((2,))), ValueError, "has no metric"),
        (lambda: product(), ValueError, "no manifolds"),
        (lambda: product(Manifold((2,), 1.0), Manifold((2,))), ValueError, "state all of them or none"),
        (lambda: positive((2,)).coordinates(torch.ones(3)), ValueError, r"shape \(3,\), the manifold \(2,\)"),
        (lambda: positive((2,)).coordinates(torch.tensor([1.0, 0.0])), ValueError, r"not finite at entry \(1,\)"),
    ],
)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
