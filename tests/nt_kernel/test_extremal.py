"""Extremal eigenvalues by every method, against exact inertia counts, known spectra and dense references."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from nt_kernel.errors import NumericalError
from nt_kernel.spectra.extremal import extremal_eigenvalues
from nt_kernel.spectra.ritz import RitzPairs, enclose
from tests.nt_kernel.exact import count_below, largest_is_at_most, smallest_is_at_least

F64 = torch.float64


class Operator:
    """A torch matrix behind ``shape``, ``dtype`` and ``@``."""

    def __init__(self, A: torch.Tensor):
        self.A, self.shape, self.dtype, self.products = A, A.shape, A.dtype, 0

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self.A @ V


def spread(size: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """A dense symmetric matrix with eigenvalues evenly spread over [low, high]."""
    normal = torch.randn(size, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    Q, _ = torch.linalg.qr(normal)
    A = Q @ torch.diag(torch.linspace(low, high, size, dtype=F64)) @ Q.mT
    return (A + A.mT) / 2


def integer_symmetric(size: int, seed: int) -> torch.Tensor:
    A = torch.randint(-9, 10, (size, size), dtype=F64, generator=torch.Generator().manual_seed(seed))
    return A + A.mT


FORMS = {
    "torch": lambda A: A,
    "numpy": lambda A: A.numpy(),
    "operator": Operator,
    "scipy operator": lambda A: aslinearoperator(A.numpy()),
    "sparse": lambda A: scipy.sparse.csr_array(A.numpy()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["auto", "dense", "lanczos", "lobpcg"])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_every_method_finds_the_end_of_every_form(form, method, which):
    A = spread(90, low=0.0)
    k = 3
    reference = torch.linalg.eigvalsh(A)
    wanted = reference[-k:] if which == "largest" else reference[:k]
    pairs = extremal_eigenvalues(FORMS[form](A), k, which, method, tolerance=1e-7)
    assert isinstance(pairs, RitzPairs)
    assert pairs.converged.all(), pairs.message
    assert (pairs.values - wanted).abs().max().item() < 1e-11  # quadratic in the residual
    assert (pairs.lower <= wanted).all()
    assert (wanted <= pairs.upper).all()
    assert pairs.lambda_max_lower <= reference[-1].item() + 1e-15
    assert pairs.lambda_min_upper >= reference[0].item() - 1e-15
    assert pairs.values.shape == pairs.residuals.shape == (k,)
    assert pairs.vectors.shape == (90, k)
    assert pairs.which == which
    assert method in ("auto", pairs.method)
    assert pairs.rounding == ("proved" if form in ("torch", "numpy") else "modelled")


@given(
    st.integers(2, 7), st.integers(0, 10_000), st.sampled_from(["largest", "smallest"]), st.sampled_from([0, 60, -60])
)
@settings(max_examples=60)
def test_intervals_hold_eigenvalues_in_exact_arithmetic(size, seed, which, exponent):
    """By counting: the pair solved to rounding, in intervals of a few ulp."""
    A = integer_symmetric(size, seed) * 2.0**exponent
    pairs = extremal_eigenvalues(A, 1, which)
    below, upto = count_below(A, pairs.lower.item()), count_below(A, pairs.upper.item())
    assume(below is not None and upto is not None)
    assert upto > below
    assert not largest_is_at_most(A, math.nextafter(pairs.lambda_max_lower, -math.inf))
    assert not smallest_is_at_least(A, math.nextafter(pairs.lambda_min_upper, math.inf))
    assert pairs.residuals.item() <= 1e-13 * size * A.norm().item()


@given(st.integers(2, 6), st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=60)
def test_any_vector_whatever_gives_true_statements(size, seed, k):
    A = integer_symmetric(size, seed)
    V = torch.randn(size, min(k, size), dtype=F64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (
        seed % 9 - 4
    )
    pairs = enclose(A, V)
    assert pairs.values.tolist() == sorted(pairs.values.tolist())
    assert enclose(-A, V).lambda_max_lower == -pairs.lambda_min_upper
    for lower, upper in zip(pairs.lower.tolist(), pairs.upper.tolist(), strict=True):
        below, upto = count_below(A, lower), count_below(A, upper)
        assert below is None or upto is None or upto > below
    # "at most" is "<" one ulp further on
    assert not largest_is_at_most(A, math.nextafter(pairs.lambda_max_lower, -math.inf))
    assert not smallest_is_at_least(A, math.nextafter(pairs.lambda_min_upper, math.inf))


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_what_did_not_converge_is_kept_flagged_and_still_true(method, which):
    A = spread(400, seed=1)
    reference = torch.linalg.eigvalsh(A)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = extremal_eigenvalues(A, 4, which, method, tolerance=1e-13, max_iterations=1)
    assert 1 <= len(pairs.values) <= 4
    assert not pairs.converged.all()
    assert pairs.message
    assert pairs.residuals.max().item() > 1e-6
    for lower, upper in zip(pairs.lower, pairs.upper, strict=True):
        assert ((reference >= lower - 1e-14) & (reference <= upper + 1e-14)).any()
    assert pairs.lambda_max_lower <= reference[-1].item() + 1e-14
    assert pairs.lambda_min_upper >= reference[0].item() - 1e-14


def test_converged_at_the_limit_of_few_iterations_are_kept():
    """ARPACK throws with what it has: some pairs converged, some not."""
    A = torch.diag(torch.cat([1 - torch.logspace(-9, 0, 298, dtype=F64), torch.tensor([50.0, 100.0], dtype=F64)]))
    for limit in range(1, 5):
        pairs = extremal_eigenvalues(A, 5, method="lanczos", tolerance=1e-12, max_iterations=limit)
        if "ARPACK" in pairs.message and 0 < len(pairs.values) < 5:
            assert pairs.values[-1].item() == pytest.approx(100, rel=1e-12)
            break
    else:
        pytest.fail("no run of ARPACK kept some pairs and lost others")


def test_nothing_calls_a_krylov_value_a_lower_bound_of_lambda_min():
    names = {name for name in dir(RitzPairs) if "lambda" in name}
    assert names == {"lambda_max_lower", "lambda_min_upper"}


def test_a_missed_eigenvalue_leaves_every_statement_true():
    """The operator hides its largest eigenvalue from vectors that are 0 there: Lanczos misses it and says nothing false."""
    A = torch.diag(torch.cat([torch.linspace(0, 1, 199, dtype=F64), torch.tensor([10.0], dtype=F64)]))
    vectors = torch.zeros(200, 1, dtype=F64)
    vectors[198] = 1.0
    pairs = enclose(A, vectors)
    assert pairs.converged.all()
    assert pairs.upper[0].item() < 10
    assert pairs.lambda_max_lower <= 1.0 <= 10


def test_float32_and_its_coarser_allowance():
    A = spread(120, seed=2).float()
    reference = torch.linalg.eigvalsh(A.double())
    stored = extremal_eigenvalues(A)
    assert abs(stored.values.item() - reference[-1].item()) < 1e-13
    operator = extremal_eigenvalues(Operator(A), method="lanczos")
    assert operator.converged.all()
    assert operator.lower.item() <= reference[-1].item() <= operator.upper.item()
    assert 1e-7 < operator.residuals.item() < 1e-3
    assert operator.lambda_max_lower <= reference[-1].item()


def test_the_stated_product_error_replaces_the_model():
    A = spread(80, seed=3)
    exact = extremal_eigenvalues(Operator(A), method="dense", product_error=0.0)
    modelled = extremal_eigenvalues(Operator(A), method="dense")
    stated = extremal_eigenvalues(Operator(A), method="dense", product_error=1e-3)
    assert exact.residuals.item() < modelled.residuals.item() < 1e-3 <= stated.residuals.item() < 1.1e-3
    assert stated.lambda_max_lower == pytest.approx(1 - 1e-3, abs=1e-9)


def test_same_seed_same_bits_and_no_global_state():
    A = Operator(spread(150, seed=4))
    torch.manual_seed(7)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (extremal_eigenvalues(A, 2, "smallest", "lanczos", seed=5) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.parametrize("method", ["auto", "dense", "lanczos", "lobpcg"])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_zero_identity_and_low_rank(method, which):
    size = 80
    for scale in (0.0, 1.0, 1e-200):
        pairs = extremal_eigenvalues(Operator(scale * torch.eye(size, dtype=F64)), 1, which, method)
        assert pairs.values.item() == pytest.approx(scale, rel=1e-12)
    v = torch.ones(size, dtype=F64)
    pairs = extremal_eigenvalues(Operator(torch.outer(v, v)), 1, which, method)
    assert pairs.values.item() == pytest.approx(size if which == "largest" else 0, abs=1e-6)
    negative = extremal_eigenvalues(Operator(-torch.outer(v, v)), 1, which, method)
    assert negative.values.item() == pytest.approx(0 if which == "largest" else -size, abs=1e-6)
    assert pairs.converged.all()
    assert negative.converged.all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_sizes_and_all_pairs(size):
    A = integer_symmetric(size, 5)
    for form in FORMS.values():
        pairs = extremal_eigenvalues(form(A), size)
        assert torch.allclose(pairs.values, torch.linalg.eigvalsh(A), atol=1e-12)


def test_auto_is_matrix_free_for_large_operators():
    A = Operator(spread(500, seed=6))
    pairs = extremal_eigenvalues(A)
    assert pairs.method == "lanczos"
    assert A.products < 400
    assert extremal_eigenvalues(A.A).method == "dense"


@given(st.integers(3, 8), st.integers(0, 10_000))
def test_kato_temple_holds_the_isolated_eigenvalue_and_is_narrower(size, seed):
    values = torch.cat([torch.arange(size - 1, dtype=F64), torch.tensor([2.0 * size], dtype=F64)])
    A = torch.diag(values)
    noise = torch.randn(size, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    V = 1e-3 * noise
    V[-1] = 1.0
    pairs = enclose(A, V)
    lower, upper = pairs.sharpened(0, below=size - 1.5, above=3.0 * size)
    assert lower <= 2 * size <= upper
    # ρ² over the distance to what is known free, instead of ρ
    assert upper - lower < 0.1 * (pairs.upper - pairs.lower).item()
    one_sided = pairs.sharpened(0, below=size - 1.5)
    assert one_sided[0] <= 2 * size <= one_sided[1]


def test_kato_temple_does_not_cut_with_an_interval_that_may_hold_another_eigenvalue():
    """θ = 0.7 between the eigenvalues 0 and 1: its interval holds 1 alone, and (−5, 0.9) holds 0 alone."""
    A = torch.diag(torch.tensor([0.0, 1.0], dtype=F64))
    pairs = enclose(A, torch.tensor([[math.sqrt(0.3)], [math.sqrt(0.7)]], dtype=F64))
    assert 0 < pairs.lower.item() < 1 < pairs.upper.item()
    lower, upper = pairs.sharpened(0, below=-5.0, above=0.9)
    assert lower <= 0 <= upper
    with pytest.raises(ValueError, match="strictly between"):
        pairs.sharpened(0, below=0.8)


@pytest.mark.parametrize(
    ("operator", "options", "error", "text"),
    [
        (torch.eye(3), {"which": "largets"}, ValueError, "did you mean 'largest'"),
        (torch.eye(3), {"method": "arnoldi"}, ValueError, "'lanczos'"),
        (torch.eye(3), {"k": 4}, ValueError, "from 1 to P = 3"),
        (torch.eye(3), {"k": 0}, ValueError, "from 1 to P = 3"),
        (torch.eye(3), {"k": 1.0}, ValueError, "k is 1.0"),
        (torch.eye(3), {"k": 3, "method": "lanczos"}, ValueError, "method='dense'"),
        (torch.eye(3), {"tolerance": -1e-8}, ValueError, "tolerance is -1e-08"),
        (torch.eye(3), {"product_error": math.nan}, ValueError, "product_error is nan"),
        (torch.eye(3), {"max_iterations": 0}, ValueError, "max_iterations is 0"),
        (torch.ones(2, 3, 3), {}, ValueError, "one matrix"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), {}, ValueError, "not symmetric"),
        (Operator(torch.triu(torch.ones(9, 9, dtype=F64))), {}, ValueError, "operator is not symmetric"),
        (Operator(torch.ones(3, 2)), {}, ValueError, r"shape \[3, 2\]"),
        (Operator(torch.eye(3, dtype=torch.complex64)), {}, TypeError, "complex64"),
        (aslinearoperator(np.eye(3) * 1j), {}, TypeError, "complex128"),
        (aslinearoperator(np.eye(3, dtype=int)), {}, TypeError, "int64"),
        (Operator(torch.full((3, 3), math.nan)), {}, NumericalError, "NaN or inf"),
        (object(), {}, TypeError, "shape, dtype, __matmul__"),
        ([[1.0]], {}, TypeError, "LinearOperator"),
    ],
)
def test_bad_arguments_are_named(operator, options, error, text):
    with pytest.raises(error, match=text):
        extremal_eigenvalues(operator, **options)


def test_a_clustered_lower_end_is_written_out_and_lanczos_gives_up_on_it_in_good_time():
    """Eigenvalues 1e-6 ... 1, evenly in their logarithm: gaps of 1e-7·‖A‖ at the lower end."""
    reference = torch.logspace(-6, 0, 200, dtype=F64)
    operator = Operator(torch.diag(reference))
    pairs = extremal_eigenvalues(operator, 2, "smallest", "lanczos")
    assert operator.products < 10_000
    assert pairs.message
    assert not pairs.converged.any()
    assert 1e-6 * (1 - 1e-9) <= pairs.lambda_min_upper < 1e-4
    operator.products = 0
    pairs = extremal_eigenvalues(operator, 2, "smallest")
    assert operator.products < 200
    assert pairs.method == "dense"
    assert (pairs.values - reference[:2]).abs().max().item() < 1e-14


def test_the_modules_load_torch_only():
    program = "import nt_kernel.spectra.certified, nt_kernel.spectra.extremal, sys; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
