"""ξ, κ, L, h, col, d and the drift at one instant, from a snapshot of the stacked system; suprema are taken along the run."""

import torch
from torch import Tensor

from nt_kernel.spectrum import largest_block_eigenvalues, safe_lambda_min, symmetric_eigenvalues
from stability.system import Snapshot, TwinSystem


def spectrum_of(snapshot: Snapshot) -> tuple[Tensor, float]:
    """Eigenvalues of H ascending [np], and ξ(t): its safe λ_min (0.0 where it cannot be told from rounding)."""
    eigenvalues = symmetric_eigenvalues(snapshot.H)
    return eigenvalues, safe_lambda_min(eigenvalues[0].item(), snapshot.H_error)


def jacobian_bound(snapshot: Snapshot) -> Tensor:
    """κ(t) = max ‖J_i‖₂ over both runs of each pair, each on S ∪ S', [R]."""
    own = snapshot.jacobian_norms[0, :-1].max()
    return torch.maximum(own, torch.maximum(snapshot.probe_norms, snapshot.jacobian_norms[1:].amax(-1)))


def gradient_bound(snapshot: Snapshot) -> Tensor:
    """L(t) = max ‖∇_y ℓ‖₂ over both runs of each pair, each on S ∪ S', [R]."""
    own = snapshot.residuals[0, :-1].norm(dim=-1).max()
    probes = snapshot.probe_residuals.norm(dim=-1)
    return torch.maximum(own, torch.maximum(probes, snapshot.residuals[1:].norm(dim=-1).amax(-1)))


def metric_norm(snapshot: Snapshot, p: int) -> Tensor:
    """h(t) = max λ_max(R'_ii) over i ∈ S ∪ S', [R]."""
    R = snapshot.twin_kernel
    blocks = R.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)).diagonal(dim1=1, dim2=3)  # [R, p, p, n + 1]
    return largest_block_eigenvalues(blocks.permute(0, 3, 1, 2)).amax(-1)


def column_norm(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """col(t) = max_{j ∈ {k, k'}} ‖(1/n)J'_S G'⁻¹J'_jᵀ‖₂, [R]."""
    n, p = system.n, system.p
    R = snapshot.twin_kernel.unflatten(-1, (n + 1, p))  # [R, (n+1)p, n + 1, p]
    columns = [R[:, :, n], R[torch.arange(system.R), :, system.replaced]]
    norms = [_spectral(system.on_S(c.unflatten(1, (n + 1, p))).flatten(1, 2)) for c in columns]
    return torch.maximum(*norms) / n


def disturbance(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """d(t) = (1/n)[J'_S G'⁻¹J'_kᵀ r'(x_k) − J'_S G'⁻¹J'_{k'}ᵀ r'(x'_k)] (eq. P8), [R, n·p]."""
    r = torch.zeros_like(snapshot.residuals[1:])
    runs = torch.arange(system.R)
    r[:, -1] = snapshot.residuals[1:, -1]
    r[runs, system.replaced] = -snapshot.residuals[1:][runs, system.replaced]
    return _apply_on_S(snapshot, system, r)


def kernel_drift(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """(H'_S − H)r' on S, the term the proof of theorem 3 leaves out, [R, n·p]; H'_S reads the twin's kernel on S."""
    r = snapshot.residuals[1:].clone()
    r[torch.arange(system.R), system.replaced] = 0  # x'_k is not a sample of S
    on_S = system.on_S(snapshot.residuals[1:]).flatten(1)
    return _apply_on_S(snapshot, system, r) - on_S @ snapshot.H


def _apply_on_S(snapshot: Snapshot, system: TwinSystem, r: Tensor) -> Tensor:
    moved = (snapshot.twin_kernel @ r.flatten(1)[..., None])[..., 0].unflatten(-1, (-1, system.p))
    return system.on_S(moved).flatten(1) / system.n


def _spectral(tall: Tensor) -> Tensor:
    return largest_block_eigenvalues(tall.mT @ tall).clamp_min(0).sqrt()
