"""Embedded manifolds by projection: tangent projection, retraction and transport of the sphere and the Stiefel manifold.

The metric is the ambient Euclidean one, so the Riemannian gradient is the tangent projection of the gradient (Absil, Mahony
& Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, §3.6, §4.1, §8.1). Leading dimensions are a product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name


@dataclass(frozen=True)
class EmbeddedManifold:
    """A manifold as a subset of its parameters' space, by four maps of tensors of the parameter's shape.

    tangent(x, u): the orthogonal projection P_x u onto T_x, which is also the transport to x; retract(x, u) = R_x(u) for u in
    T_x, R_x(0) = x and dR_x(0) = identity; onto(x): the nearest point; defect(x): how far x is off, a scalar tensor.

    >>> sphere = embedded_manifold("sphere")
    >>> x, u = torch.tensor([1.0, 0.0]), torch.tensor([5.0, 1.0])
    >>> sphere.tangent(x, u), sphere.retract(x, sphere.tangent(x, u))
    (tensor([0., 1.]), tensor([0.7071, 0.7071]))
    """

    name: str
    tangent: Callable[[Tensor, Tensor], Tensor]
    retract: Callable[[Tensor, Tensor], Tensor]
    onto: Callable[[Tensor], Tensor]
    defect: Callable[[Tensor], Tensor]

    def check(self, x: Tensor, where: str = "the parameter") -> None:
        """Raise ValueError unless x is on the manifold, to √ε of its dtype (what ``torch.nn.init`` and a cast leave)."""
        off, allowed = float(self.defect(x)), torch.finfo(x.dtype).eps ** 0.5
        if not off <= allowed:
            raise ValueError(
                f"{where}, {tuple(x.shape)}, is off the manifold {self.name!r} by {off:.3g} (allowed {allowed:.1g}); "
                f"put it there first: p.data = embedded_manifold({self.name!r}).onto(p.data)"
            )


def embedded_manifold(manifold: "str | EmbeddedManifold") -> EmbeddedManifold:
    """ "euclidean"; "sphere": every row (last dimension) has norm 1; "stiefel": [..., n, p] with orthonormal columns, n ≥ p,
    or orthonormal rows, n < p. Raises ValueError for another name, TypeError for what is no manifold.

    >>> embedded_manifold("stiefel").onto(torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 0.0]]))
    tensor([[0., 1.],
            [1., 0.],
            [0., 0.]])
    """
    if isinstance(manifold, EmbeddedManifold):
        return manifold
    if not isinstance(manifold, str):
        raise TypeError(
            f"manifold must be one of {', '.join(map(repr, _KNOWN))} or an EmbeddedManifold, got {manifold!r}"
        )
    if manifold not in _KNOWN:
        raise ValueError(unknown_name("manifold", manifold, _KNOWN))
    return _KNOWN[manifold]


def _tall(matrix: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``matrix`` on transposes where the point is wide: orthonormal rows are the columns of the transpose."""

    def both(x: Tensor, *u: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"a point of the Stiefel manifold is a matrix, got the shape {tuple(x.shape)}")
        if x.shape[-2] >= x.shape[-1]:
            return matrix(x, *u)
        out = matrix(x.mT, *(v.mT for v in u))
        return out.mT if out.dim() else out

    return both


def _norm(x: Tensor) -> Tensor:
    if x.dim() < 1:
        raise ValueError("a point of the sphere is a vector (or rows of vectors), got a number")
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _sphere_tangent(x: Tensor, u: Tensor) -> Tensor:
    return u - (x * u).sum(-1, keepdim=True) * x


def _sphere_retract(x: Tensor, u: Tensor) -> Tensor:
    y = x + u  # ‖x + u‖² = 1 + ‖u‖²: never zero
    return y / _norm(y)


@_tall
def _stiefel_tangent(x: Tensor, u: Tensor) -> Tensor:
    inner = x.mT @ u
    return u - 0.5 * x @ (inner + inner.mT)


@_tall
def _stiefel_retract(x: Tensor, u: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x + u)  # (x + u)ᵀ(x + u) = I + uᵀu: always of full rank
    # The factor with a positive diagonal of R; the other signs are no retraction, R_x(0) ≠ x.
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)[..., None, :]


@_tall
def _stiefel_onto(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


@_tall
def _stiefel_defect(x: Tensor) -> Tensor:
    return (x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().amax()


_KNOWN = {
    "euclidean": EmbeddedManifold(
        "euclidean", lambda x, u: u, lambda x, u: x + u, lambda x: x, lambda x: x.new_zeros(())
    ),
    "sphere": EmbeddedManifold(
        "sphere", _sphere_tangent, _sphere_retract, lambda x: x / _norm(x), lambda x: (_norm(x) - 1).abs().amax()
    ),
    "stiefel": EmbeddedManifold("stiefel", _stiefel_tangent, _stiefel_retract, _stiefel_onto, _stiefel_defect),
}
