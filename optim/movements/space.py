"""Function space on the sample points: u [N, C] with ⟨u, v⟩ = (1/N) Σ_i u_i·v_i, and quadratic forms on it.

One inner product for everything: gradients, λ, τ, δ and norms are those of this one. With E(u) = (1/N)Σ ½‖u_i − a_i‖² the
gradient is u − a and λ = 1. In the Euclidean inner product the same movements have τ·N for τ and λ/N for λ; q = 1/(1 + τλ)
is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from nt_kernel.metric.triangular import solve_factored


def inner_product(u: Tensor, v: Tensor) -> Tensor:
    """(1/N) Σ_i u_i·v_i over the last two dimensions.

    >>> inner_product(torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0], [4.0]])).item()
    5.0
    """
    return (u * v).sum((-2, -1)) / u.shape[-2]


def norm(u: Tensor) -> Tensor:
    """‖u‖ = √⟨u, u⟩, [..., N, C] → [...].

    >>> norm(torch.tensor([[3.0, 4.0]])).item()
    5.0
    """
    return torch.linalg.vector_norm(u, dim=(-2, -1)) / u.shape[-2] ** 0.5


@dataclass(frozen=True)
class Curvature:
    """B = ∇²E + 1/τ as an operator on u [N, C], by the cheapest of four forms of ∇²E (the shift 1/τ kept apart).

    ``hessian``: a number (b·I); [N, N] with kind="samples" (A ⊗ I_C); [N, C, C], one block per sample; [NC, NC].

    >>> B = Curvature("number", torch.tensor(2.0), 0.5)
    >>> B.apply(torch.ones(1, 1)), B.solve(torch.ones(1, 1))
    (tensor([[2.5000]]), tensor([[0.4000]]))
    """

    kind: str  # number | samples | blocks | dense
    hessian: Tensor
    shift: float = 0.0

    def shifted(self, shift: float) -> "Curvature":
        """∇²E + ``shift``."""
        return Curvature(self.kind, self.hessian, shift)

    def matrix(self) -> Tensor:
        """B in its own form, [1, 1], [N, N], [N, C, C] or [NC, NC]."""
        full = self.hessian.reshape(1, 1) if self.kind == "number" else self.hessian
        return full + self.shift * torch.eye(full.shape[-1], dtype=full.dtype, device=full.device)

    def smallest(self) -> float:
        """λ_min(B)."""
        matrix = self.matrix()
        return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[..., 0].min().item()

    def apply(self, v: Tensor) -> Tensor:
        """B v, v [N, C]."""
        return self._on(v, lambda matrix, columns: matrix @ columns)

    def solve(self, v: Tensor) -> Tensor:
        """B⁻¹v; NumericalError where B is not positive definite."""
        return self._on(v, lambda matrix, columns: solve_factored(definite(matrix, "∇²E + 1/τ"), columns))

    def inverse(self) -> Tensor:
        """B⁻¹ in the form of :meth:`matrix`."""
        return torch.cholesky_inverse(definite(self.matrix(), "∇²E + 1/τ"))

    def _on(self, v: Tensor, act) -> Tensor:
        matrix = self.matrix()
        if self.kind == "number":
            return act(matrix, v.reshape(1, -1)).reshape(v.shape)
        if self.kind == "samples":
            return act(matrix, v)
        if self.kind == "blocks":
            return act(matrix, v[..., None])[..., 0]
        return act(matrix, v.reshape(-1, 1)).reshape(v.shape)

    def add_to(self, gram: Tensor, epsilon: float, C: int) -> Tensor:
        """K + ε·B⁻¹, a new tensor; ``gram`` K is [NC, NC] with row (i, c) at i·C + c."""
        inverse, total = epsilon * self.inverse(), gram.clone()
        if self.kind == "number":
            total.diagonal().add_(inverse[0, 0])
        elif self.kind == "samples":  # ⊗ I_C
            total.unflatten(1, (-1, C)).unflatten(0, (-1, C)).diagonal(dim1=1, dim2=3).add_(inverse[..., None])
        elif self.kind == "blocks":
            blocks = total.unflatten(1, (-1, C)).unflatten(0, (-1, C)).diagonal(dim1=0, dim2=2)  # [C, C, N]
            blocks.add_(inverse.movedim(0, -1))
        else:
            total.add_(inverse)
        return total


def definite(matrix: Tensor, what: str) -> Tensor:
    """The Cholesky factor of a symmetric matrix (or a stack); NumericalError where it is not positive definite.

    >>> definite(torch.tensor([[4.0]]), "S")
    tensor([[2.]])
    """
    chol, info = torch.linalg.cholesky_ex(matrix)
    if bool((info == 0).all() & chol.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        return chol
    if not bool(matrix.isfinite().all()):
        raise NumericalError(f"{what} is not finite", where="minimizing movement")
    smallest = torch.linalg.eigvalsh(matrix)[..., 0].min().item()
    raise NumericalError(
        f"{what} is not positive definite: smallest eigenvalue", where="minimizing movement", value=smallest
    )
