"""The layer metric G_α = D_α + c·J_αᵀM J_α: steps and kernels through its inner system, never as a matrix."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.factors import Factor, join_factors
from nt_kernel.mass import Mass, Masses, divide_by_mass, resolve_mass
from nt_kernel.metric.cg_system import ConjugateGradientSystem, auto_budget, tolerance_of
from nt_kernel.metric.cost_model import worth_a_try
from nt_kernel.metric.inner import InnerSystem, inner_system
from nt_kernel.metric.mean_jacobian import MeanJacobianSystem
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric

SCALES = ("mean", "sum", "none", "mean-jacobian")
SOLVERS = ("auto", "cholesky", "cg")

KernelSystem = InnerSystem | MeanJacobianSystem
StepSystem = InnerSystem | ConjugateGradientSystem | MeanJacobianSystem


def check_scale(scale: str) -> None:
    """Raises ValueError, naming the known scales, for any other."""
    if scale not in SCALES:
        raise ValueError(unknown_name("scale", scale, SCALES))


def check_solver(solver: str) -> None:
    """Raises ValueError, naming the known solvers, for any other."""
    if solver not in SOLVERS:
        raise ValueError(unknown_name("solver", solver, SOLVERS))


def scale_factor(scale: str, n: int) -> float:
    """c of G = D + c·JᵀMJ: 1/n ("mean"), 1 ("sum"), 0 ("none": G = D, plain gradient descent at mass 1).

    Raises ValueError for an unknown scale, and for "mean-jacobian", whose G = D + J̄ᵀM̄ J̄ is of another form.

    >>> scale_factor("mean", 8)
    0.125
    """
    check_scale(scale)
    if scale == "mean-jacobian":
        raise ValueError('scale="mean-jacobian" has no factor c (G = D + J̄ᵀM̄ J̄); write "mean", "sum" or "none" here')
    return {"mean": 1 / n, "sum": 1.0, "none": 0.0}[scale]


def step_system(
    factor: Factor,
    n: int,
    mass: Masses,
    scale: str,
    metric: OutputMetric,
    y: Tensor,
    where: str = "",
    *,
    solver: str = "auto",
) -> StepSystem:
    """What steps on the first n points of ``factor`` are computed by: ``dual``, ``woodbury``, and ``last``, how it went.

    ``solver``: "cholesky"; "cg" (preconditioned conjugate gradients to 1e-12 in float64, 1e-4 in float32, K never
    formed); "auto", conjugate gradients as long as Cholesky would cost more (``nt_kernel.metric.cost_model``). The inner
    matrix of "mean-jacobian" is q × q: Cholesky always. Raises ValueError for unknown names.
    """
    check_solver(solver)
    if scale == "mean-jacobian":
        return MeanJacobianSystem(factor, n, mass, metric, y, where)
    c = scale_factor(scale, n)
    budget = auto_budget(factor, n, mass, metric, y) if solver == "auto" and c else None
    if solver == "cholesky" or (budget is not None and not worth_a_try(budget, tolerance_of(y.dtype))):
        return inner_system(factor.rows(n), n, mass, c, metric, y, where)[0]
    return ConjugateGradientSystem(factor, n, mass, c, metric, y, where, budget=budget)


class LayerMetric:
    """G_α of one layer, built on the points its factor was seen at.

    Parameters
    ----------
    factor: J_α (:class:`nt_kernel.Factor`); y: the outputs [..., N, C] there (for metrics that depend on them).
    mass: D_α; output_metric: M, by name or callable; scale: "mean", "sum" or "none" (c = 1/N, 1, 0), or
        "mean-jacobian" (G = D + J̄ᵀM̄ J̄ with the batch means of the J_i and M_i).
    solver: of ``push`` and ``solve``, "auto", "cholesky" or "cg" (:func:`step_system`). Kernels are always Cholesky's.

    >>> from nt_kernel import layer_factors
    >>> y, factors = layer_factors(torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))
    >>> metric = LayerMetric(factors["."], y, mass=1.0)  # G = 1 + 2²
    >>> metric.solve({"weight": torch.tensor([[10.0]])})["weight"].item(), metric.kernel().item()
    (2.0, 0.8)
    """

    def __init__(
        self,
        factor: Factor,
        y: Tensor,
        *,
        mass: Mass = 1.0,
        output_metric: "str | OutputMetric | Callable" = "identity",
        scale: str = "mean",
        solver: str = "auto",
    ):
        self.factor, self.n = factor, y.shape[-2]
        self.mass, metric = factor.resolved_mass(mass), resolve_output_metric(output_metric)
        self.system = step_system(factor, self.n, self.mass, scale, metric, y, solver=solver)

    @property
    def inner(self) -> KernelSystem:
        """The system that kernels are computed by; from its first use on it solves the steps too."""
        return self.system.exact if isinstance(self.system, ConjugateGradientSystem) else self.system

    def push(self, r: Tensor) -> dict[str, Tensor]:
        """G⁻¹g for g = (1/n)Jᵀr, r [..., N, C]: (1/n)·D⁻¹Jᵀv with v = ``system.dual(r)`` (push-through form)."""
        return push_through(self.factor, self.system.dual(r) / self.n, self.mass)

    def solve(self, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G⁻¹g for any g by full parameter name: D⁻¹g − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹g (general Woodbury form)."""
        return solve_metric(self.factor, self.system, g, self.mass)

    def kernel(self, A: Factor | None = None, B: Factor | None = None) -> Tensor:
        """J_A G⁻¹J_Bᵀ [..., A, C, B, C] for the same layer seen at points A and B (default: those of the metric)."""
        inner, own = self.inner, self.factor
        if A is None and B is None:
            R = inner.expand(inner.self_kernel())
        elif isinstance(inner, MeanJacobianSystem):
            R = inner.kernel(A or own, B or own)
        else:
            A, B = A or own, B or own
            R = inner.expand(inner.reduce(self._gram(A, own), self._gram(own, B), self._gram(A, B)))
        return R.unflatten(-1, (-1, inner.C)).unflatten(-3, (-1, inner.C))

    def _gram(self, A: Factor, B: Factor) -> Tensor:
        if self.inner.decoupled:
            return A.sample_gram(B, self.mass)
        return A.gram(B, self.mass).flatten(-4, -3).flatten(-2)


def push_through(factor: Factor, v: Tensor, mass: Masses) -> dict[str, Tensor]:
    """D⁻¹Jᵀv by parameter name, v [..., N, C]."""
    return {name: divide_by_mass(g, mass[name]) for name, g in factor.vjp(v).items()}


def solve_metric(factor: Factor, inner: StepSystem, g: Mapping[str, Tensor], mass: Masses) -> dict[str, Tensor]:
    """G⁻¹g for any g by parameter name: D⁻¹g − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹g (general Woodbury form)."""
    scaled = {name: divide_by_mass(g[name], mass[name]) for name in factor.shapes}
    pulled = push_through(factor, inner.woodbury(factor.jvp(scaled)), mass)
    return {name: scaled[name] - pulled[name] for name in scaled}


def resolve_blocks(factors: Mapping[str, Factor], blocks: str) -> dict[str, Factor]:
    """The metric blocks: one per layer, or one for all parameters (``"network"``)."""
    if blocks == "layer":
        return dict(factors)
    if blocks == "network":
        return {"network": join_factors(factors)}
    raise ValueError(f"blocks must be 'layer' or 'network', got {blocks!r}")


def model_mass(factors: Mapping[str, Factor], mass: Mass) -> Masses:
    """{parameter: μ} for a whole model, checked (:func:`nt_kernel.mass.resolve_mass`)."""
    shapes = {name: shape for f in factors.values() for name, shape in f.shapes.items()}
    return resolve_mass(mass, {layer: tuple(f.shapes) for layer, f in factors.items()}, shapes)


def rate_limit(blocks: int, n: int, c: float, metric: OutputMetric, y: Tensor) -> float:
    """The bound λ_max(H) ≤ N/(c·n·λ_min(M)), N metric blocks; inf where c = 0 or M is singular.

    **Derived**: c·L_y R_α L_yᵀ = I − S_α⁻¹ ≺ I with S_α = I + c·L_y K_α L_yᵀ ⪰ I; so c·R_α ≺ M⁻¹ where M is invertible.

    >>> rate_limit(3, 8, 1 / 8, resolve_output_metric("identity"), torch.zeros(8, 2))
    3.0
    """
    if c == 0:
        return float("inf")
    factor = metric.factor(y)
    if factor is None:
        return blocks / (c * n)
    if factor.shape[-2] < factor.shape[-1]:
        return float("inf")
    smallest = torch.linalg.svdvals(factor)[..., -1].min().item() ** 2
    return blocks / (c * n * smallest) if smallest > torch.finfo(y.dtype).tiny else float("inf")
