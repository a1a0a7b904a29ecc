"""Kernels as matrix-free operators: products K v by a pull through Jᵀ and a push through J, K never formed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor
from nt_kernel.kernels.generalized import point_sets
from nt_kernel.kernels.points import Points, model_points
from nt_kernel.mass import Mass, Masses
from nt_kernel.metric.inner import InnerSystem, Solve
from nt_kernel.metric.layer_metric import (
    StepSystem,
    model_mass,
    push_through,
    resolve_blocks,
    solve_metric,
    step_system,
)
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from nt_kernel.products.matvec import kernel_product
from nt_kernel.products.tiles import blocks_of

Product = Callable[[Tensor], Tensor]

# So many bytes of parameter-sized vectors at a time: a product with many columns takes them in groups.
COLUMN_BYTES = 64 * 2**20
UNIT_VECTORS = 64


@dataclass(frozen=True)
class KernelOperator:
    """A kernel [N·C, N'·C] known by its products: ``operator @ v`` for v [N'·C] or [N'·C, R], (sample, output) at i·C + c.

    ``T`` is its transpose, ``to_scipy()`` the ``scipy.sparse.linalg.LinearOperator`` of the same products. It keeps the
    factors of the points it was made for (or observes them anew in every product, where it was given a ``chunk_size``)
    and does not follow later changes of the model.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    outputs: int  # C
    forward: Product  # [R, N', C] → [R, N, C]
    backward: Product  # [R, N, C] → [R, N', C]
    symmetric: bool
    blocks: Callable[[], Tensor] | None = None
    systems: Mapping[str, StepSystem] | None = None

    def __matmul__(self, v: Tensor) -> Tensor:
        """K v, [N·C] or [N·C, R]. Raises TypeError and ValueError for a v of another type or shape."""
        if not isinstance(v, Tensor) or v.dtype != self.dtype:
            got = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise TypeError(f"v must be a tensor of {self.dtype}, got {got}; to_scipy() takes numpy arrays")
        if v.dim() not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"v has shape {tuple(v.shape)}, expected [{self.shape[1]}] or [{self.shape[1]}, R]; write v.flatten() for "
                "one that runs over samples and outputs [N', C]"
            )
        columns = v[:, None] if v.dim() == 1 else v
        if columns.shape[1] == 0:
            return v.new_zeros(self.shape[0], 0)
        found = self.forward(columns.mT.unflatten(1, (-1, self.outputs))).flatten(1).mT
        return found[:, 0] if v.dim() == 1 else found

    @property
    def T(self) -> "KernelOperator":
        """Kᵀ, the kernel with rows and columns exchanged."""
        return replace(self, shape=self.shape[::-1], forward=self.backward, backward=self.forward)

    @property
    def solves(self) -> dict[str, Solve]:
        """How the inner system of each metric block was last solved, with the residual (of the generalized kernel)."""
        return {name: system.last for name, system in (self.systems or {}).items()}

    def diagonal_blocks(self) -> Tensor:
        """K_ii, [N, C, C]. For the generalized kernel by N·C products. Raises ValueError between two point sets."""
        if not self.symmetric:
            raise ValueError(f"a kernel {list(self.shape)} between two point sets has no diagonal blocks")
        if self.blocks is not None:
            return self.blocks()
        size, C, found = self.shape[0], self.outputs, []
        width = C * max(1, UNIT_VECTORS // C)
        for start in range(0, size, width):
            which = slice(start, min(start + width, size))
            unit = torch.zeros(size, which.stop - start, dtype=self.dtype, device=self.device)
            unit[which].fill_diagonal_(1)
            tile = (self @ unit)[which].unflatten(1, (-1, C)).unflatten(0, (-1, C))
            found.append(tile.diagonal(dim1=0, dim2=2).movedim(-1, 0))
        return torch.cat(found)

    def to_scipy(self):
        """The same as a ``scipy.sparse.linalg.LinearOperator`` in float64, for eigsh, lobpcg, cg and their siblings."""
        from scipy.sparse.linalg import LinearOperator

        def times(operator: KernelOperator):
            def product(v):
                v = torch.tensor(v, dtype=operator.dtype, device=operator.device)
                return (operator @ v).to("cpu", torch.float64).numpy()

            return product

        there, back = times(self), times(self.T)
        return LinearOperator(self.shape, matvec=there, matmat=there, rmatvec=back, rmatmat=back, dtype="float64")


def ntk_operator(
    model: nn.Module,
    x1,
    x2=None,
    *,
    mass: Mass = 1.0,
    chunk_size: int | None = None,
    output: Callable | None = None,
    dtype: "torch.dtype | str" = torch.float64,
) -> KernelOperator:
    """The empirical NTK K = J(x₁) D⁻¹ J(x₂)ᵀ (:func:`nt_kernel.empirical_ntk`) as an operator; x2=None is x1.

    A product takes as many multiplications as about two passes over the model for each column, not N·N'. With
    ``chunk_size`` nothing is kept between products: every product observes the points again, that many samples at a time,
    and holds one vector of the parameters' size for each column.

    Raises what ``empirical_ntk`` raises.

    >>> K = ntk_operator(nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    >>> K @ torch.tensor([1.0, 0.0], dtype=torch.float64), K.shape
    (tensor([2., 2.], dtype=torch.float64), (2, 2))
    """
    whole = chunk_size is None
    if not whole and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of samples >= 1, got {chunk_size!r}")
    rows = model_points(model, x1, output=output, dtype=dtype, whole=whole)
    if not whole:  # the model may be changed before the next product
        params, fixed = ({name: t.clone() for name, t in part.items()} for part in (rows.params, rows.fixed))
        rows = replace(rows, params=params, fixed=fixed)
    columns = rows if x2 is None else rows.at(x2, whole=whole)
    if whole:
        once = {id(p): replace(p, memo={}) for p in (rows, columns)}
    else:
        once = {id(p): p.chunked(chunk_size) for p in (rows, columns)}
    rows, columns = once[id(rows)], once[id(columns)]
    y, factors = rows.observed(rows.blocks[0])
    C, masses = y.shape[1], model_mass(factors, mass)

    if rows is columns and whole:
        forward = backward = kernel_product(_forms(factors, masses))
    else:
        forward, backward = _between(rows, columns, masses), _between(columns, rows, masses)

    def blocks() -> Tensor:
        return torch.cat([blocks_of(_forms(rows.observed(which)[1], masses)) for which in rows.blocks])

    shape = (rows.size * C, columns.size * C)
    return KernelOperator(shape, y.dtype, y.device, C, forward, backward, rows is columns, blocks)


def generalized_ntk_operator(
    model: nn.Module,
    x,
    x1=None,
    x2=None,
    *,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    solver: str = "cg",
    output: Callable | None = None,
    dtype: "torch.dtype | str" = torch.float64,
) -> KernelOperator:
    """The generalized NTK H = (1/n) J_A G⁻¹J_Bᵀ (:func:`nt_kernel.generalized_ntk`, whose arguments these are) as an operator.

    A product is (1/n) Σ_α J_A[D⁻¹ − c·D⁻¹J_SᵀL_yᵀ S⁻¹ L_y J_S D⁻¹]J_Bᵀv, on the points of the metric alone
    (1/n) Σ_α K(v − c·L_yᵀS⁻¹L_y K v), with S⁻¹ by conjugate gradients (``solver="cg"``, nothing of size (N·C)² formed;
    residual 1e-12 in float64, 1e-4 in float32, the achieved ones in ``operator.solves``), by a kept Cholesky factor per
    block ("cholesky"), or by whichever promises to be cheaper ("auto").

    Raises what ``generalized_ntk`` raises, and ValueError for an unknown solver.

    >>> x = torch.tensor([[3.0]], dtype=torch.float64)
    >>> H = generalized_ntk_operator(nn.Linear(1, 1, bias=False).double(), x)
    >>> H @ torch.ones(1, dtype=torch.float64)  # 9/(1 + 9)
    tensor([0.9000], dtype=torch.float64)
    """
    metric = resolve_output_metric(output_metric)
    S, A, B = point_sets(model, x, x1, x2, output=output, dtype=dtype).values()
    seen = {id(p): p.observed(slice(0, p.size)) for p in (S, A, B)}
    y, factors = seen[id(S)]
    n, C = y.shape
    masses = model_mass(factors, mass)
    own, rows, columns = (resolve_blocks(seen[id(p)][1], blocks) for p in (S, A, B))
    of = {name: {p: masses[p] for p in f.shapes} for name, f in own.items()}
    systems = {name: step_system(f, n, of[name], scale, metric, y, solver=solver) for name, f in own.items()}

    if A is S and B is S:
        products = {name: kernel_product(f.forms(of[name])) for name, f in own.items()}

        def forward(v: Tensor) -> Tensor:
            return sum(product(_each(systems[name], "dual", v)) for name, product in products.items()) / n

        backward = forward
    else:

        def through(left: Mapping[str, Factor], right: Mapping[str, Factor]) -> Product:
            def product(v: Tensor) -> Tensor:
                total = 0
                for name, f in own.items():
                    solved = solve_metric(f, _Each(systems[name]), right[name].vjp(v), of[name])
                    total = total + left[name].jvp(solved)
                return total / n

            return _in_groups(product, max(f.size for f in own.values()), y.element_size())

        forward, backward = through(rows, columns), through(columns, rows)
    shape = (A.size * C, B.size * C)
    return KernelOperator(shape, y.dtype, y.device, C, forward, backward, A is B, systems=systems)


def _forms(factors: Mapping[str, Factor], masses: Masses) -> list:
    return [form for f in factors.values() for form in f.forms({name: masses[name] for name in f.shapes})]


def _between(rows: Points, columns: Points, masses: Masses) -> Product:
    """v [R, N', C] ↦ J D⁻¹J'ᵀv [R, N, C], block by block."""

    def product(v: Tensor) -> Tensor:
        pulled: dict[str, Tensor] = {}
        for which in columns.blocks:
            for factor in columns.observed(which)[1].values():
                mass = {name: masses[name] for name in factor.shapes}
                for name, u in push_through(factor, v[:, which], mass).items():
                    pulled[name] = pulled[name].add_(u) if name in pulled else u
        pushed = []
        for which in rows.blocks:
            factors = rows.observed(which)[1].values()
            pushed.append(sum(f.jvp({name: pulled[name] for name in f.shapes}) for f in factors))
        return torch.cat(pushed, 1)

    size = sum(p.numel() for p in rows.params.values())
    return _in_groups(product, size, next(iter(rows.params.values())).element_size())


def _in_groups(product: Product, size: int, itemsize: int) -> Product:
    step = max(1, COLUMN_BYTES // (size * itemsize))
    return lambda v: torch.cat([product(part) for part in v.split(step)])


def _each(system: StepSystem, verb: str, v: Tensor) -> Tensor:
    """A verb of an inner system for v [R, N, C]; one at a time where a Cholesky factor would be copied R times."""
    if isinstance(system, InnerSystem):
        return torch.stack([getattr(system, verb)(one) for one in v])
    return getattr(system, verb)(v)


@dataclass(frozen=True)
class _Each:
    """The ``woodbury`` of an inner system for batches of vectors."""

    system: StepSystem

    def woodbury(self, b: Tensor) -> Tensor:
        return _each(self.system, "woodbury", b)
