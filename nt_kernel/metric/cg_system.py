"""The inner system S = I + c·L_y K L_yᵀ solved by conjugate gradients through the forms of J: K is never formed.

S ⪰ I, so a residual is an error bound: ‖u − S⁻¹b‖ ≤ ‖b − Su‖. For the step δθ = D⁻¹Jᵀv that u gives, the error measured in
the metric itself is ‖δθ − G⁻¹g‖_G ≤ ‖b − Su‖/√c (**Derived**: with e = b − Su it is eᵀL_yK L_yᵀS⁻¹e ≤ ‖e‖²/c).
"""

import warnings
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from nt_kernel.factors import Factor
from nt_kernel.mass import Masses
from nt_kernel.metric.conjugate_gradient import Solution, conjugate_gradient
from nt_kernel.metric.cost_model import SMALL, cholesky_in_steps, too_slow
from nt_kernel.metric.inner import InnerSystem, Solve, inner_system
from nt_kernel.metric.output_metric import OutputMetric
from nt_kernel.metric.preconditioner import kronecker_preconditioner
from nt_kernel.products.matvec import kernel_product

# ‖b − Su‖ ≤ tolerance·‖b‖.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
# Where rounding allows no more (S of condition 1e4 and above), a residual of this many tolerances is taken as it is:
# Cholesky's own residual is no smaller there.
ROUNDING = 10
MOST_STEPS = 2000


def tolerance_of(dtype: torch.dtype) -> float:
    """The tolerance of a type."""
    return TOLERANCE.get(dtype, 1e-2)


class ConjugateGradientSystem:
    """S of one metric block, on the first n points of its factor, for steps: ``dual`` and ``woodbury``.

    CG is preconditioned by a Kronecker product (``nt_kernel.metric.preconditioner``). With a ``budget`` (in CG steps, all
    solves together) it makes way for Cholesky, kept from then on, once that is cheaper; ``budget=None`` goes on and warns
    where ``TOLERANCE`` is missed. Kernels (``self_kernel``) are Cholesky's in any case. ``last`` says how the last solve went.
    """

    def __init__(
        self,
        factor: Factor,
        n: int,
        mass: Masses,
        c: float,
        metric: OutputMetric,
        y: Tensor,
        where: str = "",
        *,
        budget: float | None = None,
    ):
        self._rest = (factor, n, mass, c, metric, y, where)
        y = y[..., :n, :]
        self.C, self.c, self.metric, self.y, self.budget = y.shape[-1], c, metric, y, budget
        self.where = f"{where}layer {factor.name!r}"
        self.factor = None if c == 0 else metric.factor(y)  # L_y [..., N, q, C]
        self.forms = factor.rows(n).forms(mass)
        self.tolerance = tolerance_of(y.dtype)
        self.steps = 0  # CG steps taken so far, one for each right-hand side
        self.last = Solve("cg" if c else "none")

    @cached_property
    def exact(self) -> InnerSystem:
        """The same system by Cholesky."""
        return inner_system(*self._rest)[0]

    @cached_property
    def product(self):
        """v ↦ K v."""
        return kernel_product(self.forms)

    @cached_property
    def precondition(self):
        """u ↦ P⁻¹u, P ≈ S."""
        return kronecker_preconditioner(self.forms, self.c, self.factor)

    def dual(self, r: Tensor) -> Tensor:
        """v [..., N, C] with G⁻¹Jᵀr = D⁻¹Jᵀv: v = L_yᵀS⁻¹(ρ − c·L_y K r⊥) + r⊥ with r = L_yᵀρ + r⊥."""
        if self.c == 0:
            return r
        if self._given_up():
            return self.exact.dual(r)
        if self.factor is None:
            u = self._solve(r)
            return self.exact.dual(r) if u is None else u
        rho, rest = self.metric.lift(self.y, self.factor, r)
        u = self._solve(rho - self.c * self.weigh(self.product(rest)))
        return self.exact.dual(r) if u is None else self.unweigh(u) + rest

    def woodbury(self, b: Tensor) -> Tensor:
        """c·L_yᵀS⁻¹L_y b for b [..., N, C]: the correction of G⁻¹ = D⁻¹ − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹."""
        if self.c == 0:
            return torch.zeros_like(b)
        u = None if self._given_up() else self._solve(self.weigh(b))
        return self.exact.woodbury(b) if u is None else self.c * self.unweigh(u)

    def self_kernel(self) -> Tensor:
        """R = J G⁻¹Jᵀ on the points of the metric, by Cholesky, which then takes the solves over too."""
        return self.exact.self_kernel()

    def expand(self, matrix: Tensor) -> Tensor:
        """A matrix of ``self_kernel`` over (sample, output) pairs."""
        return self.exact.expand(matrix)

    def _given_up(self) -> bool:
        """True once Cholesky's factor is there: it solves what comes from then on."""
        if "exact" in vars(self):
            self.last = Solve("cholesky")
        return "exact" in vars(self)

    def weigh(self, v: Tensor) -> Tensor:
        """L_y v: [..., N, C] → [..., N, q]."""
        return v if self.factor is None else (v[..., None, :] @ self.factor.mT)[..., 0, :]

    def unweigh(self, v: Tensor) -> Tensor:
        """L_yᵀv: [..., N, q] → [..., N, C]."""
        return v if self.factor is None else (v[..., None, :] @ self.factor)[..., 0, :]

    def _solve(self, b: Tensor) -> Tensor | None:
        """S⁻¹b for b [..., N, q], each leading index its own problem; None where Cholesky is to take over."""
        each = prod(b.shape[: b.dim() - self.y.dim()])  # right-hand sides; stacked networks share the budget's unit
        left = None if self.budget is None else self.budget - self.steps

        def hopeless(taken: int, residual: float) -> bool:
            return left is not None and too_slow(taken * each, residual, self.tolerance, left)

        found = conjugate_gradient(
            lambda u: u + self.c * self.weigh(self.product(self.unweigh(u))),
            b,
            precondition=self.precondition,
            tolerance=self.tolerance,
            max_iterations=MOST_STEPS,
            dims=2,
            hopeless=hopeless,
            where=self.where,
        )
        return self._judge(found, each)

    def _judge(self, found: Solution, each: int) -> Tensor | None:
        self.steps += found.iterations * each
        done = found.converged or (found.stagnated and found.residual <= ROUNDING * self.tolerance)
        if not done and self.budget is not None:
            self.last = Solve("cholesky", found.iterations, found.residual)
            return None
        self.last = Solve("cg", found.iterations, found.residual)
        if not done:
            warnings.warn(
                f"{self.where}: conjugate gradients stopped at residual {found.residual:.2g} after {found.iterations} steps, "
                f"short of {self.tolerance:g}; write solver='cholesky' or solver='auto', which turns to Cholesky by itself",
                RuntimeWarning,
                stacklevel=2,
            )
        return found.x


def auto_budget(factor: Factor, n: int, mass: Masses, metric: OutputMetric, y: Tensor) -> float:
    """The price of a Cholesky solve of this block in CG steps (:mod:`nt_kernel.metric.cost_model`), 0 without a choice.

    Where S is no larger than the preconditioner, N × N (one output, or an output layer that decouples), CG cannot win.
    """
    own = y[..., :n, :]
    if n * y.shape[-1] <= SMALL:
        return 0.0
    L = metric.factor(own)
    q = y.shape[-1] if L is None else L.shape[-2]
    if n * q <= max(SMALL, n) or (L is None and factor.decouples(mass)):
        return 0.0
    return cholesky_in_steps(factor.rows(n).forms(mass), n * q, n, y.dtype, prod(y.shape[:-2]))
