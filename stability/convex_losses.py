"""Constants of Hardt–Recht–Singer and Kozachkov et al. that hold for ALL θ: outputs affine in θ under a tame convex loss.

**Derived.** For y_j = J_jθ + b_j the risk has ∇²h = (1/n) Σ J_jᵀ(∇²ℓ)J_j, and both losses bound their derivatives in y:

    cross entropy, a a distribution    ‖s − a‖ ≤ √2    0 ⪯ diag(s) − ssᵀ ⪯ ½I    (Böhning, Ann. Inst. Statist. Math. 44, 1992)
    logistic, a in [0, 1]^p            ‖s − a‖ ≤ √p    0 ⪯ diag(s(1 − s)) ⪯ ¼I

so that in the coordinates D^½θ, with weight decay w: L_θ = sup‖J_jD^{−½}‖·‖s − a‖, β = (½ or ¼)·λ_max((1/n)JD⁻¹Jᵀ) +
w·sup D⁻¹, γ = w·inf D⁻¹. No run is looked at. (Squared loss has a constant Hessian but no bound of the gradient for all θ:
there ``stability.risk_constants`` measures it along the runs.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nt_kernel.errors import unknown_name
from nt_kernel.factors import layer_factors
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import model_mass
from stability.assumptions import smooth_activations
from stability.losses import resolve_loss
from stability.risk_constants import SAMPLINGS, ParameterConstants, is_affine, mass_roots

LOSSES = ("cross_entropy", "logistic")  # of bounded gradient and curvature, whatever θ


def convex_constants(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    others: Tensor,
    other_targets: Tensor,
    lrs: Sequence[float],
    *,
    loss: str,
    weight_decay: float = 0.0,
    mass: Mass = 1.0,
    sampling: str = "full batch",
) -> ParameterConstants:
    """L_θ, β and γ of a generalised linear model for every θ, on S = (x, targets) and the others.

    lrs: the steps, in order. Other arguments as in :func:`stability.risk_constants.parameter_constants`; L_θ is the supremum
    over S and the others: give all samples that z' and z may be.

    Raises ValueError for outputs that are not affine in θ, for another loss, and for targets outside its range.

    >>> x, a = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
    >>> found = convex_constants(nn.Linear(1, 1, bias=False).double(), x, a, x, a, [0.1], loss="logistic", weight_decay=0.5)
    >>> found.lipschitz, found.smoothness, found.curvature  # 2, ¼(1 + 4)/2 + ½, ½
    (2.0, 1.125, 0.5)
    """
    if loss not in LOSSES:
        raise ValueError(unknown_name("loss", loss, LOSSES))
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay!r}")
    steps = tuple(float(lr) for lr in lrs)
    if not steps or not all(0 < lr < float("inf") for lr in steps):
        raise ValueError(f"lrs must be one positive number per step, got {lrs!r}")
    points, aims = torch.cat([x, others]), torch.cat([targets, other_targets]).double()
    whole = loss == "logistic" or bool(((aims.sum(1) - 1).abs() < 1e-6).all())
    if not bool(((aims >= 0) & (aims <= 1)).all()) or not whole:
        wanted = "in [0, 1]" if loss == "logistic" else "distributions (rows >= 0 that sum to 1)"
        raise ValueError(f"targets of loss {loss!r} must be {wanted}: elsewhere the bound of its gradient is another")
    if not is_affine(model, points):
        raise ValueError(
            "the outputs are not affine in θ: the loss of this model is not convex; use parameter_constants"
        )
    _, factors = layer_factors(model, points)
    masses = model_mass(factors, mass)
    factors = [f.to(torch.float64) for f in factors.values()]
    blocks = sum(f.block_gram(masses) for f in factors)  # J_jD⁻¹J_jᵀ, [N, p, p]
    largest = torch.linalg.eigvalsh(blocks)[:, -1].max().item()
    if sampling == "one sample":
        top = largest
    else:
        n, p = targets.shape
        K = sum(f.to(torch.float64).gram(mass=masses) for f in layer_factors(model, x)[1].values()).reshape(
            n * p, n * p
        )
        top = torch.linalg.eigvalsh((K + K.mT) / 2)[-1].item() / n
    inverse = mass_roots(model, x[:1], mass, dict(model.named_parameters())).square().reciprocal()
    residual = (2.0 if loss == "cross_entropy" else aims.shape[1]) ** 0.5
    return ParameterConstants(
        n=len(x), lrs=steps, lipschitz=residual * largest**0.5,
        smoothness=resolve_loss(loss).curvature(aims.shape[1]) * top + weight_decay * inverse.max().item(),
        curvature=weight_decay * inverse.min().item(), everywhere=True, both_runs=True, sampling=sampling,
        smooth=smooth_activations(model),
    )  # fmt: skip
