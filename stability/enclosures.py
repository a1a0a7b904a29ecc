"""A-posteriori enclosures of the divergence e_t of two trained runs, and the theory-free path length beside them.

For matrices A_t fixed beforehand, w_t := e_{t+1} − A_t e_t takes in everything A_t does not say (replaced sample, kernel
drift, metric difference, curvature of the step). The enclosures hold for every model, optimizer and step, but need e, the
trained twin: they explain a divergence, they do not foretell it. A = 0 gives back ‖e‖. **Derived** (T4, T5).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.steps.recursion import scalar_recursion
from optim.steps.recursion import scalar_step as scalar_step  # one engine, offered here too


def ellipsoid_step(F: Tensor, AF: Tensor, w: Tensor) -> Tensor:
    """One step of **T5** in factor form: P = FFᵀ ← (1 + 1/β)A P Aᵀ + (1 + β)wwᵀ, β = √tr(APAᵀ)/‖w‖.

    The trace-minimal outer ellipsoid of the sum of {A e : eeᵀ ⪯ P} and ±w. F [..., D, R], ``AF`` = A @ F, w [..., D]; the
    factor grows by a column and is compressed to D columns (by QR) when it would be wider. A vanishing summand is left
    out. Its trace grows to (√tr APAᵀ + ‖w‖)².

    >>> F = ellipsoid_step(torch.eye(2)[:, :1], torch.eye(2)[:, :1] * 0.5, torch.tensor([0.0, 1.0]))
    >>> (F.square().sum(), (0.5 + 1.0) ** 2)
    (tensor(2.2500), 2.25)
    """
    a = AF.flatten(-2).norm(dim=-1)[..., None, None]  # √tr(A P Aᵀ)
    b = w.norm(dim=-1)[..., None, None]
    grow = torch.where(a > 0, ((a + b) / torch.where(a > 0, a, 1)).sqrt(), 0)
    inject = torch.where(b > 0, ((a + b) / torch.where(b > 0, b, 1)).sqrt(), 0)
    F = torch.cat([grow * AF, inject * w[..., None]], -1)
    if F.shape[-1] > F.shape[-2]:
        F = torch.linalg.qr(F.mT, mode="r").R.mT  # FFᵀ = RᵀR
    return F


def ellipsoid_radii(F: Tensor, p: int) -> Tensor:
    """Per sample √λ_max(P_ii), the radius of the enclosure in the outputs of sample i: F [..., n·p, R] → [..., n]."""
    blocks = F.unflatten(-2, (-1, p))
    return torch.linalg.eigvalsh(blocks @ blocks.mT)[..., -1].clamp_min(0).sqrt()


def ellipsoid_norm(F: Tensor) -> Tensor:
    """√λ_max(P) for P = FFᵀ, the radius of the whole enclosure: F [..., D, R] → [...], by the smaller Gram matrix.

    >>> ellipsoid_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    tensor(4.)
    """
    gram = F @ F.mT if F.shape[-2] < F.shape[-1] else F.mT @ F
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()


def spectral_norm(A: Tensor) -> Tensor:
    """‖A‖₂ of a square matrix, by the eigenvalues of A where it is symmetric and of AᵀA elsewhere: [D, D] → [].

    >>> spectral_norm(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    tensor(2.)
    """
    if torch.equal(A, A.mT):
        values = torch.linalg.eigvalsh(A)
        return torch.maximum(values[0].abs(), values[-1].abs())
    return torch.linalg.eigvalsh(A.mT @ A)[-1].clamp_min(0).sqrt()


def scalar_enclosure(errors: Tensor, closed_loop: Sequence[Tensor]) -> Tensor:
    """**T4** along a recorded pair: E_t ≥ ‖e_t‖ for every t, [T + 1].

    ``errors`` [T + 1, D] (e_t stacked), ``closed_loop`` the T matrices A_t [D, D], fixed before the twin was seen.

    >>> e = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.1]])
    >>> scalar_enclosure(e, [0.5 * torch.eye(2)] * 2)
    tensor([0.0000, 1.0000, 0.6000])
    """
    _check(errors, closed_loop)
    injected = [(errors[t + 1] - A @ errors[t]).norm() for t, A in enumerate(closed_loop)]
    return scalar_recursion(errors[0].norm(), (spectral_norm(A) for A in closed_loop), injected)


def ellipsoidal_enclosure(errors: Tensor, closed_loop: Sequence[Tensor], p: int = 1) -> tuple[Tensor, Tensor]:
    """**T5** along a recorded pair: per-sample radii [T + 1, n] ≥ ‖e_{t,i}‖, and √λ_max(P_t) [T + 1] ≥ ‖e_t‖.

    >>> e = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.1]])
    >>> radii, stacked = ellipsoidal_enclosure(e, [0.5 * torch.eye(2)] * 2)
    >>> bool((radii >= e.abs()).all() and (stacked <= scalar_enclosure(e, [0.5 * torch.eye(2)] * 2) + 1e-6).all())
    True
    """
    _check(errors, closed_loop)
    F = errors[0][:, None]
    radii, stacked = [ellipsoid_radii(F, p)], [ellipsoid_norm(F)]
    for t, A in enumerate(closed_loop):
        F = ellipsoid_step(F, A @ F, errors[t + 1] - A @ errors[t])
        radii.append(ellipsoid_radii(F, p))
        stacked.append(ellipsoid_norm(F))
    return torch.stack(radii), torch.stack(stacked)


def path_length(errors: Tensor, p: int = 1) -> tuple[Tensor, Tensor]:
    """Path lengths up to each t: Σ‖e_{s+1} − e_s‖ [T + 1], and per sample Σ‖e_{s+1,i} − e_{s,i}‖ [T + 1, n].

    What the triangle inequality gives with no theory at all (A = I): an enclosure above it explains nothing.

    >>> path_length(torch.tensor([[0.0], [1.0], [0.5]]))[0]
    tensor([0.0000, 1.0000, 1.5000])
    """
    moves = errors.diff(dim=0)
    start = errors[:1].unflatten(-1, (-1, p)).norm(dim=-1)
    stacked = torch.cat([errors[:1].norm(dim=-1), moves.norm(dim=-1)]).cumsum(0)
    return stacked, torch.cat([start, moves.unflatten(-1, (-1, p)).norm(dim=-1)]).cumsum(0)


def _check(errors: Tensor, closed_loop: Sequence[Tensor]) -> None:
    if errors.dim() != 2 or len(closed_loop) != len(errors) - 1:
        raise ValueError(
            f"errors must be [T + 1, D] with T closed-loop matrices; got {tuple(errors.shape)} and {len(closed_loop)}"
        )
