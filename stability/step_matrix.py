"""A_t = I − Δt·H_t∇²ℓ(y_t) of the S run: what a step does to a small divergence, fixed before the twin is seen."""

from functools import cached_property

import torch
from torch import Tensor

from nt_kernel.metric.inner import apply_blocks
from stability.loss_step import weighed


class StepMatrix:
    """A for a kernel H [np, np] and ∇²ℓ = σI, or ΛᵀΛ (``root`` [n, q, p], then σ is None).

    ``norm`` is ‖A‖₂: from the eigenvalues of H where A is symmetric, a singular value elsewhere (above 1 whenever H and ∇²ℓ
    do not commute enough, although A has its eigenvalues in (−1, 1]). ``rate`` is λ_max(ΛHΛᵀ). ``eigenvalues`` of H,
    ascending, where they are known.

    >>> H = torch.diag(torch.tensor([1.0, 4.0]))
    >>> loop = StepMatrix(H, 0.1, sigma=0.5)
    >>> round(loop.norm, 6), loop.rate, loop.apply(torch.ones(2, 1)).flatten()
    (0.95, 2.0, tensor([0.9500, 0.8000]))
    """

    def __init__(
        self,
        H: Tensor,
        dt: float,
        *,
        sigma: float | None,
        root: Tensor | None = None,
        eigenvalues: Tensor | None = None,
    ):
        self.H, self.sigma, self.root = H, sigma, root
        self.step = dt if sigma is None else dt * sigma
        self._eigenvalues = eigenvalues
        self._curvature = None if root is None else root.mT @ root

    @cached_property
    def norm(self) -> float:
        if self.root is None:
            gains = 1 - self.step * self._spectrum
            return max(abs(gains[0].item()), abs(gains[-1].item()))
        A = self.matrix()
        return torch.linalg.eigvalsh(A @ A.mT)[-1].sqrt().item()

    @cached_property
    def rate(self) -> float:
        if self.root is None:
            return self.sigma * self._spectrum[-1].item()
        return torch.linalg.eigvalsh(weighed(self.H, self.root))[-1].item()

    @property
    def _spectrum(self) -> Tensor:
        return torch.linalg.eigvalsh(self.H) if self._eigenvalues is None else self._eigenvalues

    def matrix(self) -> Tensor:
        """A, [np, np]."""
        return self.apply(torch.eye(len(self.H), dtype=self.H.dtype, device=self.H.device))

    def apply(self, F: Tensor) -> Tensor:
        """A F for columns F [..., np, R]."""
        return F - self.step * self.H @ self._curved(F)

    def pull(self, e: Tensor) -> Tensor:
        """e − A e = Δt·H∇²ℓ e for rows e [R, np]."""
        return self.step * self._curved(e.mT).mT @ self.H

    def _curved(self, F: Tensor) -> Tensor:
        """∇²ℓ F (F where ∇²ℓ = σI: σ is in the step)."""
        return F if self.root is None else apply_blocks(self._curvature, F)
