"""Conjugate gradients against dense solves: conditions 1 … 1e8, both types, many right-hand sides, breakdowns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel import NumericalError
from nt_kernel.metric.conjugate_gradient import conjugate_gradient
from nt_kernel.metric.preconditioner import kronecker_preconditioner
from nt_kernel.products.forms import Outer

F64 = torch.float64


def positive_definite(size, decades, seed=0):
    """A with eigenvalues 1 … 10^decades."""
    torch.manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, dtype=F64))[0]
    A = (Q * torch.logspace(0, decades, size, dtype=F64)) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decades", range(9))
def test_against_a_dense_solve(decades, dtype):
    A, b = positive_definite(40, decades), torch.randn(5, 40, dtype=F64)
    eps = torch.finfo(dtype).eps
    tolerance = 1e-12 if dtype == F64 else 1e-4
    own = A.to(dtype)
    found = conjugate_gradient(lambda v: v @ own, b.to(dtype), tolerance=tolerance, max_iterations=1500)
    residuals = (b - found.x.double() @ own.double()).norm(dim=1) / b.norm(dim=1)
    # What is reported is the true residual, up to the rounding of one product.
    torch.testing.assert_close(found.residuals.double(), residuals, rtol=0.1, atol=40 * eps * 10.0**decades)
    assert found.converged == (found.residual <= tolerance)
    if 10 * eps * 10.0**decades < tolerance:  # what rounding allows
        assert found.converged
    if found.converged:  # A ⪰ I: the residual bounds the error
        exact = torch.linalg.solve(own.double(), b.T).T
        assert (found.x.double() - exact).norm() <= 1.01 * (tolerance + 1e-14) * b.norm() + 40 * eps * b.norm()


@given(
    st.integers(1, 12),
    st.integers(0, 4),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_shape_and_any_preconditioner(size, decades, lead, preconditioned, seed):
    A, D = positive_definite(size, decades, seed), 0.5 + torch.rand(size, dtype=F64)
    b = torch.randn(*lead, size, dtype=F64)
    precondition = (lambda r: r / D) if preconditioned else None
    found = conjugate_gradient(lambda v: v @ A, b, precondition=precondition, tolerance=1e-11, max_iterations=500)
    assert found.converged
    assert found.residuals.shape == lead
    assert (found.x - torch.linalg.solve(A, b[..., None])[..., 0]).norm() <= 1e-11 * b.norm() + 1e-14


def test_each_right_hand_side_has_its_own_convergence():
    """A stack solved together equals each solved alone; a finished one is not touched again."""
    A = positive_definite(30, 4)
    vectors = torch.linalg.eigh(A)[1]
    b = torch.stack([vectors[:, 0], torch.randn(30, dtype=F64), torch.zeros(30, dtype=F64), 1e-9 * vectors.sum(1)])
    together = conjugate_gradient(lambda v: v @ A, b, tolerance=1e-10)
    for k in range(4):
        alone = conjugate_gradient(lambda v: v @ A, b[k], tolerance=1e-10)
        assert alone.converged
        assert together.residuals[k] <= 1e-10
        torch.testing.assert_close(together.x[k], alone.x, rtol=1e-9, atol=1e-18)
    assert conjugate_gradient(lambda v: v @ A, b[0], tolerance=1e-10).iterations == 1
    assert conjugate_gradient(lambda v: v @ A, b[2], tolerance=1e-10).iterations == 0


def test_several_dimensions_as_one_vector():
    A, b = positive_definite(12, 2), torch.randn(2, 3, 4, dtype=F64)
    found = conjugate_gradient(lambda v: (v.flatten(-2) @ A).unflatten(-1, (3, 4)), b, tolerance=1e-12, dims=2)
    assert found.residuals.shape == (2,)
    torch.testing.assert_close(found.x.flatten(1), torch.linalg.solve(A, b.flatten(1).T).T, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="expected at least the 2 dimensions"):
        conjugate_gradient(lambda v: v, b[0, 0], dims=2)


def test_as_many_steps_as_distinct_eigenvalues_and_one_with_the_exact_preconditioner():
    Q = torch.linalg.qr(torch.randn(20, 20, dtype=F64))[0]
    A = (Q * torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=F64).repeat(5)) @ Q.T
    b = torch.randn(20, dtype=F64)
    assert conjugate_gradient(lambda v: v @ A, b, tolerance=1e-9).iterations == 4
    inverse = torch.linalg.inv(A)
    inverse = (inverse + inverse.T) / 2
    assert conjugate_gradient(lambda v: v @ A, b, precondition=lambda r: r @ inverse, tolerance=1e-9).iterations == 1


def test_the_true_residual_counts_where_the_recursion_drifts():
    """float32, condition 1e5: the recursion's own residual falls to 1e-4, b − Ax does not; the run says so."""
    A = positive_definite(60, 5).float()
    b = torch.randn(60)
    found = conjugate_gradient(lambda v: v @ A, b, tolerance=1e-6, max_iterations=3000)
    assert not found.converged
    assert found.residual == pytest.approx(((b - found.x @ A).norm() / b.norm()).item(), rel=1e-3)


def test_budget():
    A, b = positive_definite(50, 6), torch.randn(50, dtype=F64)
    assert conjugate_gradient(lambda v: v @ A, b, tolerance=1e-12, max_iterations=7).iterations == 7
    seen = []

    def hopeless(taken, residual):
        seen.append((taken, residual))
        return taken >= 5

    found = conjugate_gradient(lambda v: v @ A, b, tolerance=1e-12, hopeless=hopeless)
    assert found.iterations == 5
    assert not found.converged
    assert [taken for taken, _ in seen[:5]] == [1, 2, 3, 4, 5]


def test_breakdowns_carry_the_number():
    b = torch.ones(3, dtype=F64)
    with pytest.raises(NumericalError, match=r"here: the matrix is not positive definite: pᵀAp/pᵀp \(-0.333\)"):
        conjugate_gradient(lambda v: v * torch.tensor([1.0, 1.0, -3.0], dtype=F64), b, where="here")
    with pytest.raises(NumericalError, match=r"the preconditioner is not positive definite: rᵀP⁻¹r/rᵀr \(-1\)"):
        conjugate_gradient(lambda v: v, b, precondition=lambda r: -r)
    with pytest.raises(NumericalError, match=r"pᵀAp/pᵀp \(0\)"):
        conjugate_gradient(lambda v: 0 * v, b)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="not finite"):
            conjugate_gradient(lambda v, bad=bad: v * bad, b)
        with pytest.raises(NumericalError, match="not finite"):
            conjugate_gradient(lambda v: v, b * bad)


def test_inputs_are_left_alone():
    A, b = positive_definite(10, 2), torch.randn(10, dtype=F64)
    kept = b.clone()
    conjugate_gradient(lambda v: v @ A, b)
    assert torch.equal(b, kept)


def test_tiny_and_huge_right_hand_sides():
    A = positive_definite(10, 2).float()
    b = torch.randn(10)
    expected = conjugate_gradient(lambda v: v @ A, b, tolerance=1e-5).x
    for size in (1e-35, 1e30):
        found = conjugate_gradient(lambda v: v @ A, size * b, tolerance=1e-5)
        torch.testing.assert_close(found.x / size, expected, rtol=1e-3, atol=1e-5)


def _failed(pair):
    return tuple(t * torch.nan for t in pair)


def test_eigenvalues_that_lapack_fails_on_leave_the_system_as_it_is(monkeypatch):
    """Seen on a saturated softmax, whose factors are near the smallest numbers: NaN, and no error."""
    form, u = Outer(torch.ones(4, 3), torch.full((4, 2, 5), 1e-19)), torch.randn(4, 2)
    eigh, fails = torch.linalg.eigh, iter([False, True])
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: _failed(eigh(A)) if next(fails) else eigh(A))
    torch.testing.assert_close(kronecker_preconditioner([form], 0.1)(u), u)
    assert next(fails, None) is None
