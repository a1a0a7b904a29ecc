"""Extremal eigenvalues of symmetric matrices and matrix-free operators: scipy iterates, residuals taken afresh judge."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError, unknown_name
from nt_kernel.spectra.directed import checked_symmetric, column_norms
from nt_kernel.spectra.ritz import RitzPairs, enclose, ritz_pairs
from nt_kernel.spectra.spectrum import rounding_radius

ENDS = ("largest", "smallest")
METHODS = ("auto", "dense", "lanczos", "lobpcg")
# Sizes up to which "auto" takes all eigenvalues. P products write an operator out; Lanczos needs some 50 for the upper end of
# a kernel's spectrum and thousands for the lower, where eigenvalues crowd.
DENSE_MATRIX, DENSE_OPERATOR = 1024, {"largest": 64, "smallest": 1024}
COLUMNS = 64  # written out at a time
# ARPACK's own 20 vectors hardly resolve the lower end of a kernel's spectrum, and its 10·P restarts take minutes to say so.
LANCZOS_VECTORS, RESTARTS, LOBPCG_STEPS = 80, 100, 200


def extremal_eigenvalues(
    operator,
    k: int = 1,
    which: str = "largest",
    method: str = "auto",
    *,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
    product_error: float | None = None,
    seed: int = 0,
) -> RitzPairs:
    """The k largest or smallest eigenvalues of a symmetric A [P, P], with intervals that hold eigenvalues of A.

    For a stored matrix that is proved, rounding included; for an operator it rests on ``product_error``. Read
    :class:`nt_kernel.spectra.ritz.RitzPairs` for which numbers are bounds of what: a Lanczos value is a lower bound of λ_max
    and an upper bound of λ_min, never the other way round.

    Parameters
    ----------
    operator: a torch or numpy matrix, or anything with ``shape``, ``dtype`` (torch's or numpy's) and ``@`` on vectors [P]
        and blocks [P, k] of that library: a ``scipy.sparse.linalg.LinearOperator``, a sparse matrix, your own class.
    method: "dense" (all eigenvalues; an operator is written out by P products), "lanczos" (ARPACK), "lobpcg" (blocks; for
        clustered or repeated eigenvalues), "auto": dense up to P = 1024 (largest of an operator: 64) or for
        k > P/5, Lanczos beyond.
    tolerance: a pair counts as converged at ‖Av − θv‖ ≤ tolerance·‖A‖ (not below what rounding allows).
    max_iterations: of ARPACK restarts or LOBPCG steps; None gives 100 restarts of some 80 products, or 200 steps.
    product_error: ‖fl(Av) − Av‖ for ‖v‖ = 1, which widens the intervals of an operator. None is the model 4·P·ε·‖A‖
        of :func:`rounding_radius`, with the largest ‖Av‖ seen for ‖A‖. For a stored matrix it is proved, not asked.
    seed: of the start vectors; the same on every run.

    Pairs that did not converge are kept, with their residuals and ``converged`` False; fewer than k may come back, and
    ``message`` says what the iteration said. Raises TypeError and ValueError for options and matrices that make no sense
    or are not symmetric, NumericalError where a product is not finite.

    >>> A = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
    >>> top = extremal_eigenvalues(A, k=2, method="lanczos")
    >>> top.values, bool((top.lower[1] <= 100) & (100 <= top.upper[1])), top.lambda_max_lower <= 100
    (tensor([ 99., 100.], dtype=torch.float64), True, True)
    """
    if which not in ENDS:
        raise ValueError(unknown_name("end of the spectrum", which, ENDS))
    if method not in METHODS:
        raise ValueError(unknown_name("method", method, METHODS))
    for name, number in (("tolerance", tolerance), ("product_error", product_error)):
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}, expected a finite number ≥ 0")
    if max_iterations is not None and not (isinstance(max_iterations, int) and max_iterations >= 1):
        raise ValueError(f"max_iterations is {max_iterations!r}, expected a whole number ≥ 1, or None")
    A = _stored(operator)
    products = _Products.of(operator if A is None else A)
    size = products.size
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= size:
        raise ValueError(f"k is {k!r}, expected a whole number from 1 to P = {size}")
    small = size <= (DENSE_OPERATOR[which] if A is None else DENSE_MATRIX)
    if method == "auto":
        method = "dense" if small or 5 * k > size else "lanczos"
    if method == "lanczos" and k >= size:
        raise ValueError(f"Lanczos finds fewer than P eigenvalues, k = P = {k}; write method='dense'")

    tolerance = max(tolerance, 10 * math.sqrt(size) * torch.finfo(products.dtype).eps)
    norm = 0.0 if A is not None and method == "dense" else products.rough_norm(seed)
    find = {"dense": _by_dense, "lanczos": _by_lanczos, "lobpcg": _by_lobpcg}[method]
    vectors, message = find(products, k, which, norm, tolerance, max_iterations, seed)
    if A is not None:
        pairs = enclose(A, vectors, tolerance=tolerance)
    else:
        vectors = (vectors / column_norms(vectors)).to(products.dtype).to(torch.float64)  # as the operator sees them
        AV = products(vectors)
        norm = max(norm, column_norms(AV).max().item())
        error = rounding_radius(size, norm, products.dtype) if product_error is None else product_error
        allowance = error * (1 + 1e-12) * column_norms(vectors)
        pairs = ritz_pairs(vectors, AV, allowance, norm=norm, tolerance=tolerance, rounding="modelled")
    return dataclasses.replace(pairs, which=which, method=method, message=message)


def _stored(operator) -> Tensor | None:
    """The matrix, where ``operator`` is one."""
    import numpy

    if not isinstance(operator, Tensor | numpy.ndarray):
        return None
    if operator.ndim != 2:
        raise ValueError(f"operator has shape {list(operator.shape)}, expected one matrix [P, P]; call it on each")
    return checked_symmetric(operator, "operator")


@dataclass(frozen=True)
class _Products:
    """V ↦ AV on float64 CPU tensors [P] or [P, k], whatever library, dtype and device the operator lives in."""

    apply: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, operator) -> "_Products":
        import numpy

        missing = [name for name in ("shape", "dtype", "__matmul__") if not hasattr(operator, name)]
        if missing:
            raise TypeError(
                f"operator is a {type(operator).__name__} without {', '.join(missing)}; expected a matrix, or an object "
                "with .shape, .dtype and @, such as scipy.sparse.linalg.LinearOperator"
            )
        shape, dtype = tuple(operator.shape), operator.dtype
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
            raise ValueError(f"operator has shape {list(shape)}, expected [P, P] with P ≥ 1")
        in_torch = isinstance(dtype, torch.dtype)
        if not in_torch:
            try:
                dtype = torch.from_numpy(numpy.empty(0, numpy.dtype(dtype))).dtype
            except TypeError:
                dtype = None
        if dtype is None or not dtype.is_floating_point:
            raise TypeError(f"operator has dtype {operator.dtype}, expected a real floating-point one, such as float64")
        device = getattr(operator, "device", "cpu")

        def apply(V: Tensor) -> Tensor:
            V = V.to(dtype)
            AV = operator @ V.to(device) if in_torch else torch.as_tensor(numpy.asarray(operator @ V.numpy()))
            if AV.shape != V.shape:
                raise ValueError(f"operator @ {list(V.shape)} gave {list(AV.shape)}, expected {list(V.shape)}")
            AV = AV.detach().cpu().to(torch.float64)
            if not torch.isfinite(AV).all():
                raise NumericalError("operator @ v holds NaN or inf", where="extremal_eigenvalues")
            return AV

        return cls(apply, shape[0], dtype)

    def __call__(self, V: Tensor) -> Tensor:
        return self.apply(V)

    def rough_norm(self, seed: int) -> float:
        """‖A‖ to a tenth or so, never more than it; ValueError where xᵀAy ≠ yᵀAx for random x, y.

        It sets the scale of stopping rules and of the model of rounding; no bound of a stored matrix rests on it.
        """
        from scipy.sparse.linalg import ArpackError, eigsh

        X = torch.randn(self.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        X = (X / X.norm(dim=0)).to(self.dtype).to(torch.float64)
        AX = self(X)
        norm, M = column_norms(AX).max().item(), X.mT @ AX
        skew, allowed = (M[0, 1] - M[1, 0]).abs().item(), math.sqrt(torch.finfo(self.dtype).eps) * norm
        if skew > allowed:
            raise ValueError(
                f"operator is not symmetric: |xᵀAy − yᵀAx| = {skew:.3g} for random unit x, y where ‖Ax‖ is {norm:.3g}; "
                "the eigenvalues of its symmetric part are those of (A + A.T)/2"
            )
        if self.size < 3 or norm == 0:
            return norm
        try:
            [top] = eigsh(self.over(norm), k=1, v0=X[:, 0].numpy(), tol=0.1, return_eigenvectors=False)
        except ArpackError:
            return norm
        return max(norm, abs(top.item()) * norm)

    def over(self, norm: float, shift: float = 0.0, sign: float = 1.0):
        """shift·I + sign·A/norm for scipy, whose stopping rules are not all free of the scale."""
        from scipy.sparse.linalg import LinearOperator

        norm = norm or 1.0

        def product(V):
            V = torch.as_tensor(V)
            return (shift * V + sign * (self(V) / norm)).numpy()

        return LinearOperator((self.size, self.size), matvec=product, matmat=product, dtype="float64")


def _by_dense(products: _Products, k, which, norm, tolerance, max_iterations, seed) -> tuple[Tensor, str]:
    A = torch.cat([products(e) for e in torch.eye(products.size, dtype=torch.float64).split(COLUMNS, dim=1)], dim=1)
    _, vectors = torch.linalg.eigh((A + A.mT) / 2)
    return vectors[:, -k:] if which == "largest" else vectors[:, :k], ""


def _start(products: _Products, k: int, seed: int):
    import numpy

    return numpy.random.default_rng(seed).standard_normal((products.size, k))


def _by_lanczos(products: _Products, k, which, norm, tolerance, max_iterations, seed) -> tuple[Tensor, str]:
    """ARPACK on I ± A/‖A‖: it stops at a residual relative to |θ|, which near an eigenvalue 0 would ask for too much."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh

    shifted = products.over(norm, shift=1.0, sign=1.0 if which == "largest" else -1.0)
    start = _start(products, 1, seed)[:, 0]
    try:
        _, vectors = eigsh(
            shifted,
            k=k,
            which="LA",
            v0=start,
            ncv=min(products.size, max(2 * k + 1, LANCZOS_VECTORS)),
            maxiter=max_iterations or RESTARTS,
            tol=tolerance / 3,
        )
        return torch.as_tensor(vectors), ""
    except ArpackNoConvergence as error:
        vectors, message = torch.as_tensor(error.eigenvectors), str(error)
    except ArpackError as error:  # breakdown: A = 0, or the start lies in an invariant subspace
        vectors, message = torch.empty(0, 0), str(error)
    if vectors.numel() == 0:
        vectors, more = _by_lobpcg(products, k, which, norm, tolerance, max_iterations, seed)
        message = f"{message}; went on with LOBPCG {more}".strip()
    return vectors, message


def _by_lobpcg(products: _Products, k, which, norm, tolerance, max_iterations, seed) -> tuple[Tensor, str]:
    import numpy
    from scipy.sparse.linalg import lobpcg

    start = block = _start(products, k, seed)
    # LOBPCG tells of its failures by warnings, some of them several lines long; they go into the message.
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            _, block = lobpcg(
                products.over(norm),
                block,
                largest=which == "largest",
                tol=tolerance / 2,
                maxiter=max_iterations or LOBPCG_STEPS,
            )
            said = ""
        except (numpy.linalg.LinAlgError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
    if not numpy.isfinite(block).all() or not block.any(axis=0).all():
        block, said = start, f"{said} LOBPCG broke down"
    return torch.as_tensor(block), " ".join([said, *(" ".join(str(w.message).split()) for w in caught)]).strip()
