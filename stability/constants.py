"""ξ, κ, L, h, col, d and the drift at one instant, from a snapshot of the stacked system; suprema are taken along the run."""

import torch
from torch import Tensor

from nt_kernel.spectra.spectrum import largest_block_eigenvalues, safe_lambda_min, symmetric_eigenvalues
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


def metric_norm(snapshot: Snapshot) -> Tensor:
    """h(t) = max λ_max(R'_ii) over i ∈ S ∪ S', [R]."""
    return largest_block_eigenvalues(snapshot.twin_blocks).amax(-1)


def column_norm(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """col(t) = max_{j ∈ {k, k'}} ‖(1/n)J'_S G'⁻¹J'_jᵀ‖₂, [R]."""
    columns = _columns_on_S(snapshot, system)
    return torch.maximum(*(_spectral(c) for c in columns[..., :-1].split(system.p, -1)))


def disturbance(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """d(t) = (1/n)[J'_S G'⁻¹J'_kᵀ r'(x_k) − J'_S G'⁻¹J'_{k'}ᵀ r'(x'_k)] (eq. P8), [R, n·p]."""
    r = snapshot.residuals[1:]
    at_k, at_k2 = r[:, -1], r[torch.arange(system.R), system.replaced]
    signed = torch.cat([at_k, -at_k2], -1)  # [R, 2p]
    return (_columns_on_S(snapshot, system)[..., :-1] @ signed[..., None])[..., 0]


def kernel_drift(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """(H'_S − H)r' on S, the term the proof of theorem 3 leaves out, [R, n·p]; H'_S reads the twin's kernel on S."""
    on_S = system.on_S(snapshot.residuals[1:]).flatten(1)
    return _columns_on_S(snapshot, system)[..., -1] - on_S @ snapshot.H


def _columns_on_S(snapshot: Snapshot, system: TwinSystem) -> Tensor:
    """(1/n)R' at x_k, at x'_k and applied to r', read on the samples of S, [R, n·p, 2p + 1]."""
    rows = snapshot.twin_columns.unflatten(1, (system.n + 1, system.p))
    return system.on_S(rows).flatten(1, 2) / system.n


def _spectral(tall: Tensor) -> Tensor:
    return largest_block_eigenvalues(tall.mT @ tall).clamp_min(0).sqrt()
