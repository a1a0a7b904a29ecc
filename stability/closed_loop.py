"""A_t = I − Δt·H_t∇²ℓ(y_t) of the S run: what a step does to a small divergence, fixed before the twin is seen."""

import torch
from torch import Tensor

from nt_kernel.metric.inner import apply_blocks
from stability.loss_step import weighed


class ClosedLoop:
    """A for a kernel H [np, np] with its eigenvalues ascending, and ∇²ℓ = σI or ΛᵀΛ (``root`` [n, q, p], then σ is None).

    ``norm`` is ‖A‖₂: from the eigenvalues of H where A is symmetric, a singular value elsewhere (above 1 whenever H and ∇²ℓ
    do not commute enough, although A has its eigenvalues in (−1, 1]). ``rate`` is λ_max(ΛHΛᵀ).

    >>> H = torch.diag(torch.tensor([1.0, 4.0]))
    >>> loop = ClosedLoop(H, 0.1, torch.tensor([1.0, 4.0]), sigma=0.5)
    >>> loop.norm, loop.rate, loop.apply(torch.ones(2, 1)).flatten()
    (0.95, 2.0, tensor([0.9500, 0.8000]))
    """

    def __init__(self, H: Tensor, dt: float, eigenvalues: Tensor, *, sigma: float | None, root: Tensor | None = None):
        self.H, self.root = H, root
        self.step = dt if sigma is None else dt * sigma
        if root is None:
            gains = 1 - self.step * eigenvalues
            self.norm = max(abs(gains[0].item()), abs(gains[-1].item()))
            self.rate = sigma * eigenvalues[-1].item()
        else:
            self._curvature = root.mT @ root
            A = self.matrix()
            self.norm = torch.linalg.eigvalsh(A @ A.mT)[-1].sqrt().item()
            self.rate = torch.linalg.eigvalsh(weighed(H, root))[-1].item()

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
