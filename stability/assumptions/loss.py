"""The loss of the theorem: ½‖y − a‖² or a multiple of it, found by its curvature, whatever it is called."""

from collections.abc import Callable

import torch
from torch import Tensor

from stability.assumptions.verdict import Assumption
from stability.assumptions.verdicts import undecided, verdict_on
from stability.losses import resolve_loss

Loss = str | Callable[[Tensor, Tensor], Tensor]


def squared_loss(loss: Loss, y: Tensor, targets: Tensor, limit: float) -> Assumption:
    """∇²_y ℓ = σI at the outputs of θ₀, at the targets, halfway and beyond; σ = tr/p at the first sample's outputs.

    A σ ≠ 1 (torch's ``MSELoss()`` has 2/p) leaves the theorem standing with the rate σξ and the step limit
    lr·σλ_max < 2.
    """
    ell = loss_function(loss)
    y, targets = y.detach().double(), targets.double()
    sigma, worst = None, (0.0, 0)
    with torch.enable_grad():
        for t in (0.0, 0.5, 1.0, -3.0):  # outputs, halfway, targets, three residuals beyond
            for i, (at, a) in enumerate(zip(y + t * (targets - y), targets, strict=True)):
                hessian = torch.autograd.functional.hessian(lambda v, a=a: ell(v[None], a[None]), at)
                sigma = hessian.diagonal().mean().item() if sigma is None else sigma
                if not sigma > 0:
                    return undecided("squared_loss", limit, "the loss has no curvature at θ₀", sample=i)
                eye = torch.eye(len(at), dtype=hessian.dtype)
                gap = torch.linalg.matrix_norm(hessian.cpu() / sigma - eye, 2).item()
                worst = max(worst, (gap, -i))
    gap, sample = worst[0], -worst[1]
    if gap > limit:
        reason = "the curvature of the loss is no multiple of I that is the same everywhere"
        return verdict_on("squared_loss", gap, limit, "violated", reason, sample=sample)
    reason = (
        "ℓ = ½‖y − a‖²" if abs(sigma - 1) < 1e-9 else f"σ = {sigma:.6g}: the rate is σξ, the step limit lr·σλ_max < 2"
    )
    return verdict_on("squared_loss", gap, limit, "holds", reason)


def loss_function(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """ℓ(y [1, p], a [1, p]) by name, or the user's own (a torch loss module does)."""
    if callable(loss):
        return loss
    return lambda y, a: resolve_loss(loss).value(y, a).sum()


def curvature(loss: Loss, y: Tensor, targets: Tensor) -> float:
    """σ of a squared loss: tr ∇²_yℓ/p at the first sample."""
    ell, a = loss_function(loss), targets[0].double()
    with torch.enable_grad():
        hessian = torch.autograd.functional.hessian(lambda v: ell(v[None], a[None]), y[0].detach().double())
    return hessian.diagonal().mean().item()
