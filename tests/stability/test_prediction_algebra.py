"""Rank-2p rebuilds, conjugate gradient steps and stacked kernels against dense matrices put together anew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_kernel import NumericalError
from nt_kernel.factors import stacked_layer_factors
from stability.prediction.algebra import common_product, common_solve, rebuild, take_columns
from stability.prediction.stack import CandidateStack, cg_steps
from tests.stability.dense import F64, small_problem


@given(
    seed=st.integers(0, 100_000),
    n=st.integers(1, 5),
    p=st.integers(1, 3),
    q=st.integers(1, 4),
    R=st.integers(1, 4),
    rank=st.integers(0, 12),
    size=st.sampled_from([1e-3, 1.0, 1e4, 1e8]),
)
@settings(max_examples=80, deadline=None)
def test_the_rebuilt_inverse_is_that_of_the_matrix_put_together_on_the_twin(seed, n, p, q, R, rank, size):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    c, J = 1 / n, size**0.5 * randn((n + R) * p, max(rank, 1)) * (rank > 0)  # any rank of K, zero included
    L = randn(n + R, q, p)
    L[randn(n + R) > 1] = 0  # M_i of any rank
    k = torch.randint(0, n, (R,), generator=draw)

    weighed = torch.block_diag(*L) @ J
    A = c * weighed @ weighed.T + torch.eye((n + R) * q, dtype=F64)
    S, new = slice(0, n * q), [slice((n + j) * q, (n + j + 1) * q) for j in range(R)]
    chol = torch.linalg.cholesky(A[S, S])
    removed = take_columns(torch.linalg.solve_triangular(chol, torch.eye(n * q, dtype=F64), upper=False), k, q)
    half = common_solve(chol, torch.stack([A[S, z] for z in new]))
    rebuilt = rebuild(chol, removed, half, torch.stack([A[z, z] for z in new]), k)

    x, x_z = randn(R, n * q, 2), randn(R, q, 2)
    v, v_z = rebuilt.solve(x, x_z)
    for j in range(R):
        kept = [i for i in range(n * q) if i // q != k[j]]
        rows = kept + list(range(new[j].start, new[j].stop))
        twin = A[rows][:, rows]
        expected = torch.linalg.solve(twin, torch.cat([x[j, kept], x_z[j]]))
        tolerance = 1e-14 * n * q * max(torch.linalg.cond(A[S, S]), torch.linalg.cond(twin)).item()
        assert (torch.cat([v[j, kept], v_z[j]]) - expected).norm() <= tolerance * expected.norm(), (j, tolerance)
        assert v[j].unflatten(0, (n, q))[k[j]].abs().max() == 0


def test_block_columns_and_common_products():
    matrix = torch.arange(24.0).view(4, 6)
    torch.testing.assert_close(
        take_columns(matrix, torch.tensor([2, 0]), 2), torch.stack([matrix[:, 4:], matrix[:, :2]])
    )
    x = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(common_product(matrix, x), torch.stack([matrix @ one for one in x]))
    F = torch.tril(torch.rand(6, 6, generator=torch.Generator().manual_seed(1))) + torch.eye(6)
    torch.testing.assert_close(common_product(F, common_solve(F, x)), x)
    torch.testing.assert_close(common_product(F.mT, common_solve(F.mT, x, upper=True)), x)


def test_what_is_not_positive_definite_or_not_finite_is_named():
    eye = torch.eye(2, dtype=F64)
    C = torch.full((1, 2, 1), 2.0, dtype=F64)
    U, one, k = eye[None, :, :1], torch.ones(1, 1, 1, dtype=F64), torch.tensor([0])
    with pytest.raises(NumericalError, match=r"Schur complement of the added sample is not positive definite.*-3"):
        rebuild(eye, U, C, one, k)
    with pytest.raises(NumericalError, match=r"Schur complement of the added sample is not finite"):
        rebuild(eye, U, C * torch.nan, one, k)
    with pytest.raises(NumericalError, match=r"removed block of the inverse is not positive definite"):
        rebuild(eye, 0 * U, C, one, k)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 7), size=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_every_conjugate_gradient_step_lowers_the_error_and_they_end_at_the_solution(seed, steps, size):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(3, size, size, generator=draw, dtype=F64)
    A = A @ A.mT + 0.1 * torch.eye(size, dtype=F64)
    b = torch.randn(3, size, generator=draw, dtype=F64)
    b[0] = 0
    P = torch.diagonal(A, dim1=-2, dim2=-1)
    T = torch.randn(size, 4, generator=draw, dtype=F64)

    def product(v):
        return (A @ v[..., None])[..., 0], {"image": v @ T}

    exact = torch.linalg.solve(A, b)
    error = lambda x: ((x - exact)[:, None] @ A @ (x - exact)[..., None]).flatten()  # noqa: E731
    last = error(torch.zeros_like(b))
    for m in range(1, steps + 1):
        x, image = cg_steps(product, b, lambda r: r / P, m)
        assert (error(x) <= last * (1 + 1e-9) + 1e-20).all()
        torch.testing.assert_close(image["image"], x @ T, rtol=1e-9, atol=1e-9)
        last = error(x)
    x, _ = cg_steps(product, b, lambda r: r / P, 4 * size, tolerance=1e-13)
    torch.testing.assert_close(x, exact, rtol=1e-7, atol=1e-8)
    assert x[0].abs().max() == 0


@pytest.mark.parametrize("mass", [2.0, "entries"])
def test_stacked_kernels_are_those_of_the_layer_factors(mass):
    model, x, _, _, _ = small_problem(seed=2, n=4)
    draw = torch.Generator().manual_seed(1)
    params = {n: torch.randn(3, *p.shape, generator=draw, dtype=F64) for n, p in model.named_parameters()}
    masses = {
        n: 2.0 if mass == 2.0 else torch.rand(p.shape[1:], generator=draw, dtype=F64) + 0.5 for n, p in params.items()
    }
    points = torch.stack([x, 2 * x, x - 1])
    y, factors = stacked_layer_factors(model, params, points)
    stack = CandidateStack(model, params, {}, points, masses)
    torch.testing.assert_close(stack.outputs, y)
    for names in (["0.weight", "0.bias"], ["2.weight"], list(params)):
        kernel = stack.kernel(names)
        for seed in (5, 6):  # the first product and those after it go different ways
            v = torch.randn(y.shape, generator=draw.manual_seed(seed), dtype=F64)
            grads = {k: g for f in factors.values() for k, g in f.vjp(v).items() if k in names}
            image = {k: g / masses[k] for k, g in grads.items()}
            Kv = sum(
                f.jvp({k: g for k, g in image.items() if k in f.shapes})
                for f in factors.values()
                if image.keys() & f.shapes
            )
            found, found_image = kernel(v)
            torch.testing.assert_close(found, Kv)
            for k in names:
                torch.testing.assert_close(found_image[k], image[k])
                torch.testing.assert_close(stack.pull(names, v)[k], image[k])
