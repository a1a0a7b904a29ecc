"""What users' callables return: matrices and factors, what is refused and with which words."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel import NumericalError
from nt_kernel.metric.output_factor import checked_factor, lift_by_pinv, psd_factor
from nt_kernel.metric.output_metric import from_factor, resolve_output_metric

F64 = torch.float64


def test_a_callable_sees_one_network_at_a_time():
    shapes = []

    def metric(y):
        shapes.append(tuple(y.shape))
        return torch.eye(y.shape[-1], dtype=y.dtype).expand(*y.shape, -1) / len(y)

    factor = resolve_output_metric(metric).factor(torch.zeros(5, 4, 3, dtype=F64))
    assert set(shapes) == {(4, 3)}
    torch.testing.assert_close(factor[2, 1], torch.eye(3, dtype=F64) / 2)
    assert resolve_output_metric(metric).name == "metric"


@pytest.mark.parametrize("q", [1, 2, 4, 9])
def test_a_callable_may_return_a_factor(q):
    torch.manual_seed(0)
    y, L = torch.randn(2, 5, 3, dtype=F64), torch.randn(5, q, 3, dtype=F64)
    for metric in (lambda y: L, from_factor(lambda y: L)):
        assert torch.equal(resolve_output_metric(metric).factor(y), L.expand(2, -1, -1, -1))
        assert torch.equal(resolve_output_metric(metric).factor(y[0]), L)


def test_square_blocks_are_matrices_unless_said_otherwise():
    torch.manual_seed(0)
    y, L = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, 3, dtype=F64).tril()
    assert torch.equal(from_factor(lambda y: L).factor(y), L)
    root = resolve_output_metric(lambda y: L.mT @ L).factor(y)
    torch.testing.assert_close(root.mT @ root, L.mT @ L)
    with pytest.raises(ValueError, match=r"sample \d is not symmetric: entries differ by .*from_factor\(callable\)"):
        resolve_output_metric(lambda y: L).factor(y)
    rounded = L.mT @ L * (1 + 1e-12 * torch.randn(3, 3, dtype=F64))  # as autograd may leave a Hessian
    resolve_output_metric(lambda y: rounded).factor(y)


def test_names():
    assert from_factor(torch.nn.Identity()).name == "Identity"
    assert from_factor(lambda y: y, name="mine").name == "mine"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.integers(-315, 100), st.integers(0, 1000))
def test_the_lift_of_any_factor_is_exact(C, q, rank, log_size, seed):
    """Of any rank, zero included, and any size: r⊥ is the part of r outside the range of Lᵀ."""
    torch.manual_seed(seed)
    L = torch.randn(4, q, rank, dtype=F64) @ torch.randn(4, rank, C, dtype=F64) * 10.0**log_size
    r = torch.randn(4, C, dtype=F64)
    rho, rest = lift_by_pinv(r, L, r)
    assert torch.isfinite(rho).all()
    pulled = (L.mT @ rho[..., None])[..., 0]
    torch.testing.assert_close(pulled + rest, r, rtol=0, atol=1e-14)
    assert rest.norm() <= (1 + 1e-9) * r.norm()


def test_root_of_a_singular_matrix_has_its_rank():
    """A root of rounding, √1e-17 = 3e-9, would look like a direction of M."""
    torch.manual_seed(0)
    v = torch.randn(50, 4, dtype=F64)
    M = v[:, :, None] * v[:, None, :]
    assert (torch.linalg.matrix_rank(psd_factor(M, v), tol=1e-12) == 1).all()
    torch.testing.assert_close(psd_factor(M, v).square().sum((1, 2)), v.square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_roundings_and_zeros_are_not_refused(dtype):
    y = torch.zeros(3, 12, dtype=dtype)
    assert not psd_factor(torch.zeros(3, 12, 12, dtype=dtype), y).any()
    torch.manual_seed(0)
    for size in (1e-12, 1.0, 1e12):
        v = torch.randn(3, 12, dtype=dtype) * size
        M = v[:, :, None] * v[:, None, :]  # rank one: half of the other eigenvalues come out negative
        torch.testing.assert_close(psd_factor(M, y).square().sum((1, 2)), v.square().sum(1), rtol=1e-5, atol=0)
    assert torch.equal(
        psd_factor(torch.eye(12, dtype=torch.int64).repeat(3, 1, 1), y), torch.eye(12).to(y).repeat(3, 1, 1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_indefinite_metric_is_refused_with_its_eigenvalue(dtype):
    M = torch.eye(2, dtype=dtype).repeat(3, 1, 1)
    M[1] = torch.tensor([[1.0, 0.0], [0.0, -1e-3]])
    y = torch.zeros(3, 2, dtype=dtype)
    with pytest.raises(
        NumericalError, match=r"sample 1 is not positive semidefinite: smallest eigenvalue \(-0\.001\)"
    ) as error:
        psd_factor(M, y)
    assert error.value.value == pytest.approx(-1e-3)
    M[1, 1, 1] = -torch.finfo(dtype).eps / 8  # rounding
    assert torch.equal(psd_factor(M, y)[1], torch.diag(torch.tensor([1.0, 0.0], dtype=dtype)))


@given(st.integers(0, 3), st.integers(0, 4), st.floats(-1e3, -1e-3), st.sampled_from([torch.float32, F64]))
def test_the_refusal_names_sample_and_run(run, sample, eigenvalue, dtype):
    torch.manual_seed(run)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=F64))[0]
    indefinite = (Q * torch.tensor([1.0, 2.0, eigenvalue], dtype=F64)) @ Q.mT
    y = torch.zeros(4, 5, 3, dtype=dtype)
    y[run, sample] = 1

    def metric(y):
        return torch.where(y[:, :1, None] > 0, (indefinite + indefinite.mT).to(dtype) / 2, torch.eye(3, dtype=dtype))

    with pytest.raises(NumericalError, match=f"sample {sample} of run {run} is not positive semidefinite") as error:
        resolve_output_metric(metric).factor(y)
    assert error.value.value == pytest.approx(eigenvalue, rel=1e-3, abs=1e-5)
    with pytest.raises(NumericalError, match=f"sample {sample} of run 0, {run} is not positive"):
        resolve_output_metric(metric).factor(y[None])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_sample(bad):
    y = torch.zeros(2, 3, 2)
    blocks = torch.eye(2).repeat(2, 3, 1, 1)
    blocks[1, 2, 0, 1] = bad
    for check in (psd_factor, checked_factor):
        with pytest.raises(NumericalError, match="the output metric of sample 2 of run 1 holds NaN or inf"):
            check(blocks, y)
        with pytest.raises(NumericalError, match="the output metric of sample 2 holds NaN or inf"):
            check(blocks[1], y[1])
    with pytest.raises(NumericalError, match="sample 0 holds NaN or inf"):  # beyond the dtype of the outputs
        psd_factor(1e300 * torch.eye(2, dtype=F64)[None], y[0, :1])


FORMS = r"expected M \(4, 2, 2\) = \[N, C, C\] or a factor L \(4, q, 2\) = \[N, q, C\]"
BAD = {
    "one block": (lambda y: torch.eye(2), ValueError, rf"returned shape \(2, 2\), {FORMS}"),
    "other samples": (lambda y: torch.zeros(3, 1, 2), ValueError, rf"returned shape \(3, 1, 2\), {FORMS}"),
    "other outputs": (lambda y: torch.zeros(4, 1, 3), ValueError, rf"returned shape \(4, 1, 3\), {FORMS}"),
    "no rows": (lambda y: torch.zeros(4, 0, 2), ValueError, rf"returned shape \(4, 0, 2\), {FORMS}"),
    "the diagonal": (lambda y: y, ValueError, rf"returned shape \(4, 2\), {FORMS}"),
    "no tensor": (lambda y: y.tolist(), TypeError, rf"must return a tensor, {FORMS}, got list"),
    "nothing": (lambda y: None, TypeError, "got NoneType"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("make", [resolve_output_metric, from_factor])
def test_bad_returns(case, make):
    metric, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make(metric).factor(torch.zeros(4, 2))
    with pytest.raises(error, match=message):
        make(metric).factor(torch.zeros(3, 4, 2))


def test_bad_uses():
    with pytest.raises(TypeError, match=r"from_factor needs a callable y \[N, C\] -> L \[N, q, C\], got Tensor"):
        from_factor(torch.eye(2))
    with pytest.raises(ValueError, match=r"expected square blocks M \[N, C, C\], got \(4, 1, 2\)"):
        psd_factor(torch.zeros(4, 1, 2), torch.zeros(4, 2))
    rank = lambda y: torch.zeros(len(y), 3 + int(y.sum() > 0), 2)  # noqa: E731
    with pytest.raises(ValueError, match=r"different shapes for stacked networks, \[\(4, 3, 2\), \(4, 4, 2\)\]"):
        from_factor(rank).factor(torch.stack([torch.zeros(4, 2), torch.ones(4, 2)]))
