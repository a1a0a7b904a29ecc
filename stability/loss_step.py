"""How large a step a loss bears: lr·λ_max(ΛHΛᵀ) < 2 with ∇²ℓ = ΛᵀΛ, bounded for free where the curvature is known.

**Derived.** A step e ← (I − lr·H∇²ℓ)e contracts in no norm unless lr·λ_max(H∇²ℓ) < 2, and HΛᵀΛ has the eigenvalues of
ΛHΛᵀ. With ∇²ℓ ⪯ κ_ℓI: λ_max(ΛHΛᵀ) ≤ κ_ℓ·λ_max(H); with M = ∇²ℓ, singular or not, c·Λ R_α Λᵀ = I − S_α⁻¹ ≺ I per block.
"""

from torch import Tensor

from nt_kernel.metric.inner import apply_blocks
from nt_kernel.metric.layer_metric import rate_limit
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from optim.steps.step_limit import auto_lr
from stability.losses import Loss


def rate_name(loss: Loss) -> str:
    """What lr is held against, in messages."""
    return "λ_max" if loss.sigma(1) == 1 else "λ_max(ΛHΛᵀ)"


def is_own_metric(loss: Loss, metric: OutputMetric) -> bool:
    """Whether the output metric is ∇²ℓ of this loss at every y."""
    return any(metric is resolve_output_metric(name) for name in loss.metrics)


def rate_bound(loss: Loss, metric: OutputMetric, blocks: int, n: int, c: float, y: Tensor) -> float:
    """A bound on λ_max(ΛHΛᵀ) of every network with outputs y [..., n, p] on its own data; inf where none is known.

    >>> import torch
    >>> from stability.losses import resolve_loss
    >>> y, identity = torch.zeros(8, 4), resolve_output_metric("identity")
    >>> [rate_bound(resolve_loss(name), identity, 3, 8, 1 / 8, y) for name in ("squared", "mse", "logistic", "cross_entropy")]
    [3.0, 1.5, 0.75, 1.5]
    """
    if c == 0:
        return float("inf")
    bound = loss.curvature(y.shape[-1]) * rate_limit(blocks, n, c, metric, y)
    return min(bound, blocks / (c * n)) if is_own_metric(loss, metric) else bound


def weighed_kernel(loss: Loss, H: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """ΛHΛᵀ [..., n·q, n·q] of kernels H [..., n·p, n·p] at outputs y [..., n, p]."""
    sigma = loss.sigma(y.shape[-1])
    return weighed(H, loss.factor(y, a)) if sigma is None else H if sigma == 1 else sigma * H


def weighed(H: Tensor, root: Tensor) -> Tensor:
    """ΛHΛᵀ for blocks Λ [..., n, q, p]."""
    return apply_blocks(root, apply_blocks(root, H).mT)


def auto_step(loss: Loss, metric: OutputMetric, blocks: int, scale: str, y: Tensor) -> float:
    """lr = 1/(κN), half of what λ_max(ΛHΛᵀ) ≤ κN guarantees: κ bounds ∇²ℓ where M = I, and is 1 where M = ∇²ℓ.

    Raises ValueError where no κ is known, or for another scale than "mean".
    """
    kappa = loss.curvature(y.shape[-1]) if metric.factor(y) is None else float("inf")
    if is_own_metric(loss, metric):
        kappa = min(kappa, 1.0)
    if kappa == float("inf"):
        raise ValueError(
            'lr="auto" rests on ∇²ℓ ⪯ κM with a known κ, which needs M = I under a loss of bounded curvature, or M = ∇²ℓ; '
            f"with loss={loss.name!r} and output_metric={metric.name!r} write a number"
        )
    return auto_lr(blocks, scale) / kappa
