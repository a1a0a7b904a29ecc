"""Products of forms and the Kronecker preconditioner made of them, against dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel import layer_factors
from nt_kernel.factors import join_factors
from nt_kernel.metric.conjugate_gradient import conjugate_gradient
from nt_kernel.metric.cost_model import cholesky_in_steps, work_of
from nt_kernel.metric.preconditioner import (
    RATIO,
    SAMPLED,
    interpolation,
    kronecker_factors,
    kronecker_preconditioner,
)
from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.matvec import kernel_product, mean_product
from nt_kernel.products.positions import Positions
from nt_kernel.products.tiles import gram_of
from tests.nt_kernel.cases import CASES, F64, mlp


def form_of(kind, N=5, C=3, T=2, o=4, d=3, lead=()):
    draw = lambda *shape: torch.randn(*lead, *shape, dtype=F64)  # noqa: E731
    return {
        "outer, few samples": lambda: Outer(draw(N, 7), draw(N, C, o)),
        "outer, many samples": lambda: Outer(draw(N, 2), draw(N, C, o)),
        "flat": lambda: Flat(draw(N, C, 6)),
        "decoupled": lambda: Decoupled(draw(N, d), C),
        "positions": lambda: Positions(draw(N, T, d), draw(N, C, T, o)),
        "lookup": lambda: Positions(torch.randint(4, (*lead, N, T)), draw(N, C, T, o), 4),
        "weighted": lambda: Weighted(draw(N, T, d), draw(N, C, T, o), 0.1 + torch.rand(o, d, dtype=F64)),
    }[kind]()


KINDS = ["outer, few samples", "outer, many samples", "flat", "decoupled", "positions", "lookup", "weighted"]


def matrix(forms):
    return gram_of(forms).flatten(-4, -3).flatten(-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_products_are_gram_matrices_times_vectors(kind, lead):
    torch.manual_seed(0)
    forms = [form_of(kind, lead=lead), form_of("flat", lead=lead)]
    K, product = matrix(forms), kernel_product(forms)
    for more in ((), (4,)):
        v = torch.randn(*more, *lead, 5, 3, dtype=F64)
        expected = (K @ v.flatten(-2)[..., None])[..., 0].unflatten(-1, (5, 3))
        torch.testing.assert_close(product(v), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_products_of_every_layer(name):
    case = CASES[name]
    model, x, _ = case.make()
    y, factors = layer_factors(model, x, output=case.output)
    v = torch.randn_like(y)
    for factor in [*factors.values(), join_factors(factors)]:
        expected = torch.einsum("icjd,jd->ic", factor.gram(mass=0.3), v)
        torch.testing.assert_close(kernel_product(factor.forms(0.3))(v), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_preconditioner_is_symmetric_and_positive_definite(kind, lead, weighed):
    torch.manual_seed(0)
    L = torch.randn(*lead, 5, 2, 3, dtype=F64) if weighed else None
    q = 2 if weighed else 3
    for c in (1e-3, 1.0, 1e4):
        P = kronecker_preconditioner([form_of(kind, lead=lead), form_of("flat", lead=lead)], c, L)
        eye = torch.eye(5 * q, dtype=F64).unflatten(-1, (5, q))
        eye = eye.reshape(5 * q, *[1] * len(lead), 5, q).expand(5 * q, *lead, 5, q)
        inverse = P(eye).flatten(-2).movedim(0, -1)  # [..., 5q, 5q]
        torch.testing.assert_close(inverse, inverse.mT, rtol=0, atol=1e-12)
        values = torch.linalg.eigvalsh(inverse)
        assert values.min() > 0
        assert values.max() <= 1 + 1e-12  # P ⪰ I, as S


def test_the_preconditioner_is_exact_for_kronecker_products():
    torch.manual_seed(0)
    a, v = torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64)
    delta = torch.linalg.qr(torch.randn(5, 3, dtype=F64))[0].T  # orthonormal rows: B = I, one level
    for forms in ([Decoupled(a, 3)], [Outer(a, delta.expand(6, 3, 5))]):
        S = torch.eye(18, dtype=F64) + 0.7 * matrix(forms)
        solved = kronecker_preconditioner(forms, 0.7)((S @ v.flatten()).unflatten(0, (6, 3)))
        torch.testing.assert_close(solved, v, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 1000), st.floats(-3, 4))
def test_sensitivities_alike_condition_at_most(seed, log_c):
    """K = A ⊗ B: the nodes cost a factor 1.5625 down and the identity below them as much up, whatever c; none at a node."""
    torch.manual_seed(seed)
    a, delta = torch.randn(5, 4, dtype=F64), torch.randn(3, 4, dtype=F64) * torch.logspace(0, -3, 3, dtype=F64)[:, None]
    form, c = Outer(a, delta.expand(5, 3, 4)), 10.0**log_c
    S = torch.eye(15, dtype=F64) + c * matrix([form])
    P = kronecker_preconditioner([form], c)
    values = torch.linalg.eigvals(P(S.unflatten(-1, (5, 3))).flatten(-2)).real
    assert values.min() >= 1 / 1.5625 - 1e-9
    assert values.max() <= 1.5625 + 1e-9


@given(st.integers(0, 1000), st.floats(-4, 5), st.sampled_from([(), (2,), (2, 3)]))
def test_interpolation_between_nodes(seed, log_trace, lead):
    """Weights are a partition of 1, the error is bounded for every eigenvalue t ≤ tr A, and nodes are met exactly."""
    torch.manual_seed(seed)
    values = 10 ** (4 * torch.rand(*lead, 6, dtype=F64) - 3)
    values[..., 0] = 0
    trace = 10.0**log_trace * (0.5 + torch.rand(*lead, 1, dtype=F64))
    nodes, weights, rest = interpolation(values, trace)
    assert weights.min() >= 0
    assert rest.min() >= 0
    torch.testing.assert_close(weights.sum(-2) + rest, torch.ones_like(rest), rtol=0, atol=1e-12)
    if nodes.shape[-1] > 1:
        assert (nodes[..., 1:] / nodes[..., :-1]).max() <= RATIO * 1.01
    t = trace * torch.logspace(-8, 0, 60, dtype=F64)  # [..., 60]
    at_nodes = 1 / (1 + nodes[..., None] * t[..., None, :])  # [..., G, 60]
    found = weights.mT @ at_nodes + rest[..., None]  # [..., 6, 60]
    ratio = found * (1 + values[..., None] * t[..., None, :])
    assert ratio.min() >= 1 / 1.5625 - 1e-3
    assert ratio.max() <= 1.5625 + 1e-3
    assert (rest[..., 0] - 1).abs().max() <= 1e-12  # λ = 0
    top = values.argmax(-1, keepdim=True)
    torch.testing.assert_close(ratio.take_along_dim(top[..., None], -2), torch.ones_like(t)[..., None, :])


def test_one_node_where_one_is_enough():
    one = torch.full((3,), 0.7, dtype=F64)
    assert interpolation(one, torch.tensor([50.0], dtype=F64))[0].shape == (1,)
    small, trace = torch.tensor([1e-3, 1e-2], dtype=F64), torch.tensor([10.0], dtype=F64)  # λ·tr A ≤ 3
    nodes, weights, rest = interpolation(small, trace)
    assert nodes.tolist() == [1e-2]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 1.0]], dtype=F64))
    torch.testing.assert_close(rest, torch.tensor([0.9, 0.0], dtype=F64))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("N", [5, 40])
def test_the_separated_blocks_are_those_of_the_sampled(N, weighed):
    """B A_ii + E is the mean of the weighed blocks K_ii over every ⌈N/16⌉-th sample."""
    torch.manual_seed(0)
    form = form_of("outer, few samples", N=N)
    L = torch.randn(N, 2, 3, dtype=F64) if weighed else None
    A, B, E = kronecker_factors([form], L)
    K = gram_of([form])
    step = -(-N // SAMPLED)
    blocks = [K[i, :, i] if L is None else L[i] @ K[i, :, i] @ L[i].T for i in range(0, N, step)]
    sizes = [A[i, i] for i in range(0, N, step)]
    torch.testing.assert_close(E + B * sum(sizes) / len(sizes), sum(blocks) / len(blocks), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A, form.inputs @ form.inputs.T, rtol=1e-12, atol=1e-12)
    mean = (form.deltas if L is None else L @ form.deltas).mean(0)
    torch.testing.assert_close(B, mean @ mean.T, rtol=1e-12, atol=1e-12)


def test_few_steps_at_any_mass():
    """The separation is worth its work on a hidden layer, against no preconditioner at all."""
    torch.manual_seed(0)
    x = torch.randn(24, 8, dtype=F64) + 1
    y, factors = layer_factors(mlp(8, 32, 32, 5).double(), x)
    b = torch.randn_like(y)
    for mass, most, least in ((1.0, 6, 9), (1e-2, 13, 45), (1e-3, 25, 100)):
        forms = factors["2"].forms(mass)
        product = kernel_product(forms)

        def steps(P, product=product):
            found = conjugate_gradient(lambda u: u + product(u) / 24, b, precondition=P, tolerance=1e-6, dims=2)
            return found.iterations

        assert steps(kronecker_preconditioner(forms, 1 / 24)) <= most
        assert steps(None) >= least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_mean_products_are_gram_matrices_averaged(kind, lead):
    torch.manual_seed(0)
    forms = [form_of(kind, lead=lead), form_of("flat", lead=lead)]
    expected = matrix(forms).unflatten(-1, (5, 3)).mean(-2).unflatten(-2, (5, 3))
    torch.testing.assert_close(mean_product(forms), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_work_grows_with_the_samples(kind):
    small, large = (work_of(form_of(kind, N=N)) for N in (20, 40))
    assert large.gram > 1.9 * small.gram
    assert large.product >= small.product
    assert large.read >= 2 * small.read
    assert cholesky_in_steps([form_of(kind)], 15, 5, F64) < cholesky_in_steps([form_of(kind)], 1500, 5, F64)


@pytest.mark.parametrize("c", [0.125, 8.0])
@pytest.mark.parametrize(
    "size", [*(m * 10.0**e for e in (16, 17, 18) for m in range(1, 10)), 1e30, float("inf"), float("nan")]
)
def test_the_preconditioner_of_a_network_that_diverges_exists(size, c):
    """Numbers so large that products overflow: the run on S itself says what is wrong, not a logarithm in here."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-15, 1.0):
        a = scale * torch.randn(8, 5, generator=generator)
        delta = size * (1 + 0.1 * torch.randn(8, 10, 4, generator=generator))
        precondition = kronecker_preconditioner([Outer(a, delta)], c)
        assert precondition(torch.ones(8, 10)).shape == (8, 10)
