"""The closed loop of training with momentum, A_t of (e_t, f_t), its step limits, and its rates on quadratics.

e_t is the divergence of two runs (or the residual of one on a quadratic), f_t = e_t − e_{t−1}. A_t is not symmetric: stable
steps expand in the Euclidean norm and contract in another (``stability.contraction.metric``). **Derived**, for squared loss,
full batches and a momentum buffer that takes in the preconditioned gradient G⁻¹∇h.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from optim.steps.step_limit import product_limit
from stability.contraction.result import ContractionMetric


def momentum_matrices(
    kernels: Sequence[Tensor] | Tensor,
    lr: float,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    first_step: bool = True,
) -> Tensor:
    """A_t of (e_{t+1}, f_{t+1}) = A_t (e_t, f_t) for H_t along a run, ``kernels`` T of [D, D] → [T, 2D, 2D].

    Heavy ball, v ← bv + (1 − damp)G⁻¹g, lr' = lr(1 − damp):  A_t = [[I − lr'H_t, bI], [−lr'H_t, bI]]. With b = 0 there is no
    buffer and nothing to dampen: ``dampening`` is without effect, as in torch.optim.SGD, here and in what follows.
    Nesterov as in torch.optim.SGD: e_{t+1} = (1 + b)(I − lrH_t)e_t − b(I − lrH_{t−1})e_{t−1}, so that
    A_t = [[I − C_t, bB_t], [−C_t, bB_t]] with C_t = lr(1 + b)H_t − lr·bH_{t−1}, B_t = I − lrH_{t−1}.

    ``first_step``: ``kernels[0]`` is that of the very first step, where the buffer is empty (f_0 = 0). torch then takes the
    gradient undamped (lr for lr'), and Nesterov has no H_{−1} (0 stands for it). False for a run cut out of a longer one:
    heavy ball uses lr' throughout, Nesterov needs a predecessor and gives T − 1 matrices, those of ``kernels[1:]``.

    With f_0 = 0 the recursion is exact for models linear in their parameters. Raises ValueError as torch.optim.SGD would.

    >>> A = momentum_matrices([torch.eye(1)], lr=0.5, momentum=0.9)
    >>> A[0]
    tensor([[ 0.5000,  0.9000],
            [-0.5000,  0.9000]])
    """
    dampening = _checked_dampening(lr, momentum, dampening, nesterov)
    H = torch.stack(list(kernels)) if not isinstance(kernels, Tensor) else kernels
    if H.dim() != 3 or H.shape[1] != H.shape[2] or len(H) == 0:
        raise ValueError(f"kernels must be T >= 1 matrices [D, D], got shape {tuple(H.shape)}")
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    b, matrices = momentum, []
    if nesterov:
        before = torch.cat([torch.zeros_like(H[:1]), H]) if first_step else H
        for last, now in pairwise(before):
            change = lr * (1 + b) * now - lr * b * last
            matrices.append(_blocks(eye, change, b * (eye - lr * last)))
        if not matrices:
            raise ValueError("Nesterov's A_t needs H_{t−1}: with first_step=False give at least two kernels")
    else:
        for t, now in enumerate(H):
            damp = 0.0 if first_step and t == 0 else dampening
            matrices.append(_blocks(eye, lr * (1 - damp) * now, b * eye))
    return torch.stack(matrices)


def momentum_step_limit(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> float:
    """The x for which lr·λ_max(H) < x is stable on a quadratic: 2(1 + b)/(1 − damp), Nesterov 2(1 + b)/(1 + 2b).

    >>> momentum_step_limit(0.9), round(momentum_step_limit(0.9, nesterov=True), 4)
    (3.8, 1.3571)
    """
    dampening = _checked_dampening(1.0, momentum, dampening, nesterov)
    return product_limit(momentum, dampening, nesterov)


def momentum_rate(
    eigenvalues: Tensor, lr: float, momentum: float, dampening: float = 0.0, nesterov: bool = False
) -> Tensor:
    """Spectral radius of the constant A of every eigenvalue λ of H, [...] → [...], in closed form.

    The roots of z² − sz + d with s = 1 + b − lr'λ, d = b; Nesterov s = (1 + b)(1 − lrλ), d = b(1 − lrλ). Where they are
    complex (underdamped) the radius is √d: √b for heavy ball, whatever λ. Polyak (USSR Comput. Math. Math. Phys. 4, 1964);
    O'Donoghue & Candès, arXiv 1204.3982.

    >>> momentum_rate(torch.tensor([0.5, 1.0]), lr=1.0, momentum=0.81)
    tensor([0.9000, 0.9000])
    """
    dampening = _checked_dampening(lr, momentum, dampening, nesterov)
    b = momentum
    x = lr * eigenvalues * (1.0 if nesterov else 1 - dampening)
    total = (1 + b) * (1 - x) if nesterov else 1 + b - x
    product = b * (1 - x) if nesterov else torch.full_like(x, b)
    discriminant = total.square() - 4 * product
    real = (total.abs() + discriminant.clamp_min(0).sqrt()) / 2
    return torch.where(discriminant < 0, product.clamp_min(0).sqrt(), real)


def momentum_metric(
    kernels: Sequence[Tensor] | Tensor,
    lr: float,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    first_step: bool = True,
    *,
    condition: float | None = None,
    objective: str = "rate",
) -> ContractionMetric:
    """A metric Θ₂ ⊗ I of the states (e, f), Θ₂ [2, 2], for momentum on any number of outputs and any symmetric H_t.

    **Derived.** Θ₂ ⊗ I commutes with orthogonal changes of e, so heavy ball's inequality at H_t splits into those of the 2 × 2
    matrices A(λ) of its eigenvalues; A is affine in λ, x ↦ (A(λ)x)ᵀΘ(A(λ)x) convex in λ, so λ_min and λ_max over the run imply
    all between. Nothing need commute between steps, and the program has three unknowns whatever D. Nesterov's A_t splits so
    only where H_t and H_{t−1} commute. In either case the result is certified on the full A_t, as in
    :func:`stability.contraction.metric.contraction_metric`, which finds better rates where D is small: an H_t that hardly
    turns allows each eigenvector its own Θ₂.

    >>> found = momentum_metric([torch.diag(torch.tensor([0.2, 1.0], dtype=torch.float64))], lr=0.3, momentum=0.5)
    >>> found.feasible, found.metric.shape
    (True, torch.Size([4, 4]))
    """
    from stability.contraction.metric import certified_metric, contraction_metric

    matrices = momentum_matrices(kernels, lr, momentum, dampening, nesterov, first_step)
    H = torch.stack(list(kernels)).double() if not isinstance(kernels, Tensor) else kernels.double()
    if not bool(torch.isfinite(H).all()):
        raise ValueError("kernels hold NaN or inf")
    values = torch.linalg.eigvalsh((H + H.mT) / 2)
    ends = torch.stack([values.min(), values.max()])
    if nesterov:  # (H_{t−1}, H_t) with equal eigenvectors in the order of their eigenvalues, and the extremes
        last = torch.cat([values[:-1].flatten(), ends]) if len(values) > 1 else ends
        now = torch.cat([values[1:].flatten(), ends]) if len(values) > 1 else ends
        scalar = [torch.stack([a, b])[:, None, None] for a, b in zip(last, now, strict=True)]
        small = [momentum_matrices(pair, lr, momentum, 0.0, True, False)[0] for pair in scalar]
        if first_step:
            first = torch.stack([values[0].min(), values[0].max()])  # no predecessor: affine in H_0 alone
            small += [momentum_matrices(v[None, None, None], lr, momentum, 0.0, True)[0] for v in first]
    else:
        first = [True] if len(H) == 1 else [False]
        if first_step and dampening and len(H) > 1:
            first.append(True)
        small = [
            momentum_matrices(v[None, None, None], lr, momentum, dampening, False, undamped and first_step)[0]
            for v in ends
            for undamped in first
        ]
    found = contraction_metric(small, kind="discrete", condition=condition, objective=objective)
    if not found.feasible:
        return replace(found, reason=f"no metric Θ₂ ⊗ I for λ in [{ends[0]:.4g}, {ends[1]:.4g}]: {found.reason}")
    whole = torch.kron(found.metric, torch.eye(H.shape[-1], dtype=torch.float64)).to(H.device)
    return certified_metric(matrices, whole, kind="discrete")


def _blocks(eye: Tensor, change: Tensor, carry: Tensor) -> Tensor:
    return torch.cat([torch.cat([eye - change, carry], 1), torch.cat([-change, carry], 1)])


def _checked_dampening(lr: float, momentum: float, dampening: float, nesterov: bool) -> float:
    """The dampening that takes effect: 0 without momentum, for torch.optim.SGD then has no buffer."""
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    if not 0 <= dampening <= 1:
        raise ValueError(f"dampening must be in [0, 1], got {dampening!r}")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"Nesterov needs momentum > 0 and dampening = 0, got {momentum!r} and {dampening!r}")
    return dampening if momentum else 0.0
