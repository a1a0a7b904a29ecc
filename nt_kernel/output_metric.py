"""Output metrics M = L_yᵀL_y, block diagonal over samples, always in factor form [N, q, C] (M itself may be singular).

A metric is a function from the outputs y [..., N, C] to its factor L_y [..., N, q, C]; the identity is ``None``, because
leaving a multiplication out is exact. ``lift`` splits an output gradient into r = L_yᵀρ + r⊥, which is what keeps the
push-through form accurate at small mass (``nt_kernel.metric``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError, unknown_name


@dataclass(frozen=True)
class OutputMetric:
    """``factor(y)`` gives L_y [..., N, q, C] or None for the identity; ``lift(y, L_y, r)`` gives (ρ, r⊥)."""

    name: str
    factor: Callable[[Tensor], Tensor | None]
    lift: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def resolve_output_metric(metric: "str | OutputMetric | Callable") -> OutputMetric:
    """An :class:`OutputMetric` from its name, or from a user's callable ``y [N, C] -> M [N, C, C]``.

    Names: ``"identity"``; ``"squared"`` and ``"cross_entropy"``, the Gauss-Newton matrix ∇²_y ℓ of ½‖y − a‖² (which is
    the identity) and of softmax cross-entropy (diag(s) − ssᵀ, of rank C − 1).

    >>> resolve_output_metric("cross_entropy").factor(torch.zeros(1, 3)).shape
    torch.Size([1, 2, 3])
    """
    if isinstance(metric, OutputMetric):
        return metric
    if isinstance(metric, str):
        if metric not in NAMED:
            raise ValueError(unknown_name("output metric", metric, NAMED))
        return NAMED[metric]
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return OutputMetric(name, lambda y: psd_factor(_each_network(metric, y), y), _lift_by_pinv)
    raise TypeError(f"output_metric must be a name or a callable y -> [N, C, C], got {metric!r}")


def _each_network(metric: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """M [..., N, C, C] from a function of one network's outputs [N, C], called network by network."""
    return metric(y) if y.dim() == 2 else torch.stack([_each_network(metric, one) for one in y])


def softmax_factor(y: Tensor) -> Tensor:
    """Rank C − 1 factor of the softmax Gauss-Newton matrix, L_yᵀL_y = diag(s) − ssᵀ with s = softmax(y).

    With u = √s a unit vector, L_y = B·diag(u), B the rows 2…C of the Householder reflection
    I − (u + e₁)(u + e₁)ᵀ/(1 + u₁), which are orthonormal and orthogonal to u. [..., C] → [..., C − 1, C].

    >>> y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    >>> s = y.softmax(-1)
    >>> torch.allclose(softmax_factor(y).T @ softmax_factor(y), torch.diag(s) - torch.outer(s, s))
    True
    """
    if y.shape[-1] < 2:
        raise ValueError("the cross_entropy metric needs at least 2 outputs (softmax of one output is constant)")
    u = y.softmax(-1).sqrt()
    return _orthogonal_rows(u) * u[..., None, :]


def _orthogonal_rows(u: Tensor) -> Tensor:
    w = u.clone()
    w[..., 0] += 1  # u + e₁
    reflection = (
        torch.eye(u.shape[-1], dtype=u.dtype, device=u.device) - w[..., :, None] * w[..., None, :] / w[..., :1, None]
    )
    return reflection[..., 1:, :]


def _lift_softmax(y: Tensor, factor: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    # For 1ᵀr = 0: ρ = B(r/u) has L_yᵀρ = diag(u)(I − uuᵀ)(r/u) = r. Where s underflowed, r/u := 0 and r⊥ holds the rest.
    u = y.softmax(-1).sqrt()
    ratio = torch.where(u > 0, r / torch.where(u > 0, u, 1), 0)
    rho = (_orthogonal_rows(u) @ ratio[..., None])[..., 0]
    return rho, r - (factor.mT @ rho[..., None])[..., 0]


def _lift_by_pinv(y: Tensor, factor: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    # Any split is exact. Dividing by a singular value σ costs ε/σ digits, leaving it to r⊥ costs ε·‖cK‖ at most with σ²
    # in front: directions below σ = ε^¼ are left.
    rho = (torch.linalg.pinv(factor.mT, rtol=torch.finfo(r.dtype).eps ** 0.25) @ r[..., None])[..., 0]
    return rho, r - (factor.mT @ rho[..., None])[..., 0]


def psd_factor(matrix: Tensor, y: Tensor) -> Tensor:
    """Symmetric square root L = M^½ [..., N, C, C] of positive semidefinite blocks; the eigenvalues say by how much not.

    Raises TypeError or ValueError for anything but a tensor of that shape, NumericalError with the smallest eigenvalue
    and its sample for a block that is not positive semidefinite beyond rounding.

    >>> psd_factor(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2))
    tensor([[[2., 0.], [0., 0.]]])
    """
    expected = (*y.shape, y.shape[-1])
    if not isinstance(matrix, Tensor):
        raise TypeError(f"the output metric must return a tensor {expected} = [N, C, C], got {type(matrix).__name__}")
    if tuple(matrix.shape) != expected:
        raise ValueError(f"the output metric returned shape {tuple(matrix.shape)}, expected {expected} = [N, C, C]")
    if not bool(torch.isfinite(matrix).all()):
        sample = int((~torch.isfinite(matrix)).flatten(-2).any(-1).flatten().nonzero()[0])
        raise NumericalError(f"the output metric of sample {sample} holds NaN or inf")
    eps = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0  # of the matrix as it came
    matrix = matrix.to(y)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = 16 * matrix.shape[-1] * max(eps, torch.finfo(y.dtype).eps) * values.abs().amax(-1)
    below = values[..., 0] + floor
    if bool((below < 0).any()):
        sample = int(below.flatten().argmin())
        raise NumericalError(
            f"output metric of sample {sample} is not positive semidefinite: smallest eigenvalue",
            value=values[..., 0].flatten()[sample].item(),
        )
    # What cannot be told from zero is zero: the root of a rounding, 1e-8, would pass for a direction of M.
    roots = torch.where(values > floor[..., None], values, 0).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT


_IDENTITY = OutputMetric("identity", lambda y: None, lambda y, factor, r: (r, torch.zeros_like(r)))
NAMED = {
    "identity": _IDENTITY,
    "squared": OutputMetric("squared", _IDENTITY.factor, _IDENTITY.lift),
    "cross_entropy": OutputMetric("cross_entropy", softmax_factor, _lift_softmax),
}
