"""Matrix-free kernels against the matrices they stand for, in torch and through scipy's solvers."""

import itertools

import pytest
import scipy.sparse.linalg
import torch

from nt_kernel import empirical_ntk, generalized_ntk, generalized_ntk_operator, ntk_operator
from nt_kernel.spectra.extremal import extremal_eigenvalues
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import definite_metric
from tests.thinned import thinned

NAMES = ["mlp", "tied weights", "convolution", "attention", "embedding", "layer norm", "old weight_norm", "two inputs"]
METRICS = [
    {},
    {"mass": 0.1, "scale": "sum"},
    {"scale": "none"},
    {"output_metric": "cross_entropy", "mass": 0.01},
    {"output_metric": definite_metric},
    {"blocks": "network"},
    {"scale": "mean-jacobian"},
]


def matrix(kernel):
    return kernel.flatten(0, 1).flatten(1)


def check(operator, K, tolerance=1e-12):
    """Products with one vector and with several, of the operator and its transpose, and those scipy sees."""
    draw = torch.Generator().manual_seed(0)
    allowed = tolerance * max(1.0, K.norm().item())
    assert operator.shape == tuple(K.shape)
    assert operator.dtype == K.dtype
    for A, M in ((operator, K), (operator.T, K.T), (operator.T.T, K)):
        V = torch.randn(M.shape[1], 3, dtype=M.dtype, generator=draw)
        assert A.shape == tuple(M.shape)
        assert (A @ V - M @ V).norm() <= 10 * allowed
        assert (A @ V[:, 0]).shape == (M.shape[0],)
        assert (A @ V[:, 0] - M @ V[:, 0]).norm() <= 10 * allowed
        assert (A @ V[:, :0]).shape == (M.shape[0], 0)
        in_scipy = A.to_scipy()
        assert in_scipy.dtype == "float64"
        for found in (in_scipy @ V.double().numpy(), (in_scipy.H.H @ V.double().numpy())):
            assert (torch.from_numpy(found) - M @ V).norm() <= 10 * allowed


@pytest.mark.parametrize("name", NAMES)
def test_ntk_operator(name):
    case = CASES[name]
    model, x, other = case.make()
    for x2 in (None, other):
        K = matrix(empirical_ntk(model, x, x2, mass=0.5))
        for chunk in (None, 2):
            operator = ntk_operator(model, x, x2, mass=0.5, chunk_size=chunk)
            check(operator, K)
            if x2 is None:
                blocks = empirical_ntk(model, x, mass=0.5).diagonal(dim1=0, dim2=2).movedim(-1, 0)
                assert (operator.diagonal_blocks() - blocks).norm() <= 1e-12 * blocks.norm()


@pytest.mark.parametrize(
    ("name", "solver", "options"),
    thinned(itertools.product(["mlp", "attention"], ["cg", "cholesky", "auto"], METRICS), 3),
)
def test_generalized_ntk_operator(name, solver, options):
    model, x, other = CASES[name].make()
    for x1, x2 in ((None, None), (other, None), (None, other), (other, x)):
        ntk = generalized_ntk(model, x, x1, x2, **options)
        operator = generalized_ntk_operator(model, x, x1, x2, solver=solver, **options)
        check(operator, ntk.matrix, 1e-10)
        assert list(operator.solves) == list(ntk.layers)
        if solver == "cg" and options.get("scale") not in ("none", "mean-jacobian"):
            assert all(s.solver == "cg" and s.residual <= 1e-12 for s in operator.solves.values())
        if ntk.symmetric:
            blocks = ntk.kernel.diagonal(dim1=0, dim2=2).movedim(-1, 0)
            assert (operator.diagonal_blocks() - blocks).norm() <= 1e-10 * blocks.norm()


def test_float32():
    model, x, other = CASES["mlp"].make()
    operator = ntk_operator(model.float(), x.float(), other.float(), dtype="model")
    check(operator, matrix(empirical_ntk(model, x.float(), other.float(), dtype="model")), 1e-5)
    H = generalized_ntk(model, x.float())
    operator = generalized_ntk_operator(model, x.float(), dtype=torch.float32)
    check(operator, H.matrix.float(), 1e-3)
    assert all(0 < s.residual <= 1e-4 for s in operator.solves.values() if s.solver == "cg")


def test_scipy_finds_the_spectrum():
    torch.manual_seed(0)
    model, x = mlp(6, 30, 30, 4).to(F64), torch.randn(12, 6, dtype=F64)
    for operator, K in (
        (ntk_operator(model, x), matrix(empirical_ntk(model, x))),
        (generalized_ntk_operator(model, x, mass=0.1), generalized_ntk(model, x, mass=0.1).matrix),
    ):
        values = torch.linalg.eigvalsh(K)
        found = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=3, which="LM", return_eigenvectors=False)
        assert (torch.from_numpy(found).sort().values - values[-3:]).norm() <= 1e-10 * values[-1]
        pairs = extremal_eigenvalues(operator, k=2, method="lanczos")  # takes any object with @
        assert pairs.values[-1] == pytest.approx(values[-1].item(), rel=1e-8)
        b = torch.ones(len(K), dtype=F64)
        shifted = operator.to_scipy() + scipy.sparse.linalg.aslinearoperator(torch.eye(len(K)).numpy() * 1.0)
        solved, info = scipy.sparse.linalg.cg(shifted, b.numpy(), rtol=1e-10)
        expected = torch.linalg.solve(K + torch.eye(len(K), dtype=F64), b)
        assert info == 0
        assert (torch.from_numpy(solved) - expected).norm() <= 1e-8 * expected.norm()


def test_nothing_of_the_kernels_size_is_formed():
    from tests.nt_kernel.test_allocation import Largest

    torch.manual_seed(0)
    model, x, other = mlp(4, 6, 6, 20).to(F64), torch.randn(40, 4, dtype=F64), torch.randn(30, 4, dtype=F64)
    for make in (lambda: ntk_operator(model, x), lambda: ntk_operator(model, x, other, chunk_size=5)):
        v = torch.ones(make().shape[1], dtype=F64)
        with Largest() as seen:
            make() @ v
        assert seen.numel <= 40 * 20 * 20 < (40 * 20) * (30 * 20) / 20
    v = torch.ones(800, dtype=F64)
    generalized_ntk_operator(model, x) @ v
    with Largest() as seen:
        generalized_ntk_operator(model, x) @ v
    assert seen.numel <= (40 * 20) ** 2 / 20


def test_many_columns_go_in_groups(monkeypatch):
    model, x, other = CASES["mlp"].make()
    K = matrix(empirical_ntk(model, x, other))
    monkeypatch.setattr("nt_kernel.kernels.operators.COLUMN_BYTES", 1)
    check(ntk_operator(model, x, other), K)
    monkeypatch.setattr("nt_kernel.kernels.operators.UNIT_VECTORS", 3)
    operator = generalized_ntk_operator(model, x)
    blocks = generalized_ntk(model, x).kernel.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert (operator.diagonal_blocks() - blocks).norm() <= 1e-10 * blocks.norm()


def test_the_model_may_change_afterwards():
    model, x, _ = CASES["mlp"].make()
    operators, K = [ntk_operator(model, x, chunk_size=c) for c in (None, 2)], matrix(empirical_ntk(model, x))
    generalized, H = generalized_ntk_operator(model, x), generalized_ntk(model, x).matrix
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    for operator in operators:
        check(operator, K)
    check(generalized, H, 1e-10)


def test_refusals():
    model, x, other = CASES["mlp"].make()
    operator = ntk_operator(model, x, other)
    with pytest.raises(ValueError, match=r"v has shape \(8,\), expected \[6\] or \[6, R\]; write v.flatten\(\)"):
        operator @ torch.ones(8, dtype=F64)
    with pytest.raises(TypeError, match=r"v must be a tensor of torch.float64, got torch.float32"):
        operator @ torch.ones(6)
    with pytest.raises(ValueError, match=r"a kernel \[8, 6\] between two point sets has no diagonal blocks"):
        operator.diagonal_blocks()
    with pytest.raises(ValueError, match="chunk_size must be a whole number of samples >= 1, got 0"):
        ntk_operator(model, x, chunk_size=0)
    with pytest.raises(ValueError, match="unknown solver 'cgs'"):
        generalized_ntk_operator(model, x, solver="cgs")
