"""The mean-Jacobian metric G = D + J̄ᵀM̄ J̄: an inner matrix of q × q whatever the batch (theory §2, third variant).

J̄ = EᵀJ with E = (1/n) 1 ⊗ I_C is the batch mean of the per-sample Jacobians, [C, m], M̄ = L̄ᵀL̄ the mean of the M_i. With
W = J D⁻¹J̄ᵀL̄ᵀ [NC, q] and S = I + L̄EᵀW [q, q], Woodbury's identity reads

    G⁻¹Jᵀr = D⁻¹Jᵀ[r − E L̄ᵀS⁻¹Wᵀr]        G⁻¹g = D⁻¹g − D⁻¹Jᵀ[E L̄ᵀS⁻¹L̄ Eᵀ] J D⁻¹g        J_A G⁻¹J_Bᵀ = K_AB − W_A S⁻¹W_Bᵀ

and costs O(m·q + q³) plus W on the metric's own points: C·o·N·min(N, d) multiplications for a weight [o, d] used once a sample
(J̄ formed by C gradients of mean outputs would take C·o·N·d), at other points one product with J for each of its columns.
"""

from functools import cached_property

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from nt_kernel.factors import Factor
from nt_kernel.mass import Masses, divide_by_mass
from nt_kernel.metric.inner import Solve
from nt_kernel.metric.output_metric import OutputMetric, psd_factor
from nt_kernel.metric.triangular import solve_factored
from nt_kernel.products.matvec import mean_product


def mean_factor(metric: OutputMetric, y: Tensor) -> Tensor:
    """L̄ [..., q, C] with L̄ᵀL̄ = M̄, the mean over samples of M at the outputs y [..., N, C]; the identity for M = I.

    >>> from nt_kernel.metric.output_metric import resolve_output_metric
    >>> metric = resolve_output_metric(lambda y: torch.diag_embed(y))
    >>> mean_factor(metric, torch.tensor([[1.0, 4.0], [7.0, 14.0]]))  # √ of the means 4 and 9
    tensor([[2., 0.],
            [0., 3.]])
    """
    factor = metric.factor(y)
    if factor is None:
        return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand(*y.shape[:-2], -1, -1)
    mean = (factor.mT @ factor).mean(-3, keepdim=True)  # [..., 1, C, C]
    return psd_factor(mean, y[..., :1, :])[..., 0, :, :]


class MeanJacobianSystem:
    """Cholesky of S = I + L̄J̄D⁻¹J̄ᵀL̄ᵀ [..., q, q] of one metric block, on the first n points of its factor.

    It offers what :class:`nt_kernel.metric.inner.InnerSystem` offers to steps (``dual``, ``woodbury``) and to kernels
    (``self_kernel``, ``expand``, ``error_scale``), and ``kernel(A, B)`` between other points. There is no scale c, and
    the bound λ_max ≤ N/(c·n·λ_min(M)) does not hold. Raises NumericalError where S is not positive definite or finite.
    """

    last = Solve("cholesky")

    def __init__(self, factor: Factor, n: int, mass: Masses, metric: OutputMetric, y: Tensor, where: str = ""):
        y = y[..., :n, :]
        self.n, self.C, self.mass = n, y.shape[-1], mass
        self.factor = factor.rows(n)
        self.mean = mean_factor(metric, y)  # L̄ [..., q, C]
        means = mean_product(self.factor.forms(mass))  # J D⁻¹J̄ᵀ
        if metric.factor(y) is None:
            self.columns, S = means, means.mean(-3)
        else:
            self.columns = (means.flatten(-3, -2) @ self.mean.mT).unflatten(-2, means.shape[-3:-1])  # W [..., N, C, q]
            S = self.mean @ self.columns.mean(-3)
        S.diagonal(dim1=-2, dim2=-1).add_(1)
        self.S = (S + S.mT) / 2
        self.chol, info = torch.linalg.cholesky_ex(self.S)
        if bool((info != 0).any()) or not bool(self.chol.isfinite().all()):
            where = f"{where}layer {factor.name!r}"
            if not bool(self.S.isfinite().all()):
                raise NumericalError("the mean Jacobian is not finite (did training diverge?)", where=where)
            smallest = torch.linalg.eigvalsh(self.S)[..., 0].min().item()
            raise NumericalError(
                "I + L̄J̄D⁻¹J̄ᵀL̄ᵀ is not positive definite: smallest eigenvalue", where=where, value=smallest
            )

    def _means(self) -> Tensor:
        """E L̄ᵀ as one vector for each row of L̄, [q, ..., N, C]."""
        rows = self.mean.movedim(-2, 0)[..., None, :] / self.n
        return rows.expand(*rows.shape[:-2], self.n, self.C)

    def pushed(self, points: Factor) -> Tensor:
        """W_A = J_A D⁻¹J̄ᵀL̄ᵀ [..., A, C, q] at the samples of ``points``, one column at a time."""
        columns = []
        for v in self._means():
            pulled = {name: divide_by_mass(g, self.mass[name]) for name, g in self.factor.vjp(v).items()}
            columns.append(points.jvp(pulled))
        return torch.stack(columns, -1)

    def dual(self, r: Tensor) -> Tensor:
        """v [..., N, C] with G⁻¹Jᵀr = D⁻¹Jᵀv: v = r − E L̄ᵀS⁻¹Wᵀr, for r [..., N, C]."""
        return r - self._spread(self.columns.flatten(-3, -2).mT @ r.flatten(-2)[..., None])

    def woodbury(self, b: Tensor) -> Tensor:
        """E L̄ᵀS⁻¹L̄Eᵀb for b [..., N, C]: the correction of G⁻¹ = D⁻¹ − D⁻¹Jᵀ(E L̄ᵀS⁻¹L̄Eᵀ)J D⁻¹."""
        return self._spread(self.mean @ b.mean(-2)[..., None]).expand_as(b)

    def _spread(self, w: Tensor) -> Tensor:
        """E L̄ᵀS⁻¹w [..., 1, C], the same for all samples, for w [..., q, 1]."""
        return (self.mean.mT @ solve_factored(self.chol, w)).mT / self.n

    @cached_property
    def gram(self) -> Tensor:
        """K = J D⁻¹Jᵀ [..., NC, NC] on the points of the metric."""
        return self.factor.gram(mass=self.mass).flatten(-4, -3).flatten(-2)

    def self_kernel(self) -> Tensor:
        """R = J G⁻¹Jᵀ [..., NC, NC] on the points of the metric."""
        half = self._half(self.columns)
        return self.gram - half.mT @ half

    def kernel(self, A: Factor, B: Factor) -> Tensor:
        """J_A G⁻¹J_Bᵀ = K_AB − W_A S⁻¹W_Bᵀ, [..., AC, BC]."""
        half_A, half_B = (self._half(self.pushed(points)) for points in (A, B))
        return A.gram(B, self.mass).flatten(-4, -3).flatten(-2) - half_A.mT @ half_B

    def _half(self, W: Tensor) -> Tensor:
        """chol⁻¹Wᵀ, [..., q, AC]."""
        return torch.linalg.solve_triangular(self.chol, W.flatten(-3, -2).mT, upper=False)

    def expand(self, matrix: Tensor) -> Tensor:
        """The matrix itself: it runs over (sample, output) pairs already."""
        return matrix

    def error_scale(self, n: int) -> float:
        """The size whose rounding (1/n)R carries: ‖K‖, and W S⁻¹Wᵀ ⪯ K times the condition of S ⪰ I."""
        norm, condition = (t.norm(dim=(-2, -1)).max().item() for t in (self.gram, self.S))
        return (2 + condition) * norm / n
