"""Gauss–Newton matrices ∇²_y ℓ of the common losses, by closed-form factors: softmax, logistic, Huber.

All are functions of y [..., N, C] that run under ``torch.func.vmap`` and never overflow. Where ℓ = −log p(a | y) for a
distribution of the exponential family in its natural parameters (softmax, logistic), ∇²_y ℓ does not depend on a and is
the Fisher matrix of p (Martens 2020, "New insights and perspectives on the natural gradient method", JMLR 21).
"""

import math

import torch
from torch import Tensor

from nt_kernel.metric.output_factor import OutputMetric, remainder


def softmax_factor(y: Tensor) -> Tensor:
    """Rank C − 1 factor of the softmax Gauss–Newton matrix, L_yᵀL_y = diag(s) − ssᵀ with s = softmax(y).

    With u = √s a unit vector and m its largest entry, L_y = B·diag(u), B the rows other than m of the Householder
    reflection I − (u + e_m)(u + e_m)ᵀ/(1 + u_m), orthonormal and orthogonal to u. [..., C] → [..., C − 1, C].
    Raises ValueError for C = 1.

    >>> y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    >>> s = y.softmax(-1)
    >>> torch.allclose(softmax_factor(y).T @ softmax_factor(y), torch.diag(s) - torch.outer(s, s))
    True
    """
    if y.shape[-1] < 2:
        raise ValueError(
            "the cross_entropy metric needs at least 2 outputs (softmax of one output is constant); "
            "for one logit per sample write 'logistic'"
        )
    u = y.softmax(-1).sqrt()
    return _orthogonal_rows(u) * u[..., None, :]


def _orthogonal_rows(u: Tensor) -> Tensor:
    # Reflected at the largest entry: at a vanishing one, 1 − u_j²/(1 + u_m) cancels for the class that dominates, and
    # the lift would divide by u_m what it then has to subtract again.
    C = u.shape[-1]
    index = torch.arange(C, device=u.device)
    m = u.argmax(-1, keepdim=True)
    w = u + (index == m).to(u.dtype)  # u + e_m
    scale = 1 + u.gather(-1, m)
    reflection = torch.eye(C, dtype=u.dtype, device=u.device) - w[..., :, None] * (w / scale)[..., None, :]
    others = index[:-1] + (index[:-1] >= m).to(index.dtype)  # all rows but m, [..., C − 1]
    return reflection.gather(-2, others[..., None].expand(*others.shape, C))


def lift_softmax(y: Tensor, factor: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """r = L_yᵀρ + r⊥ with ρ = B(r/u); r⊥ = (1ᵀr)·s, zero for the gradient of cross-entropy.

    >>> y = torch.zeros(2, 3)
    >>> rho, rest = lift_softmax(y, softmax_factor(y), y.softmax(-1) - torch.eye(3)[:2])
    >>> rest.abs().max().item() < 1e-6
    True
    """
    # L_yᵀρ = diag(u)(I − uuᵀ)(r/u) = r − (1ᵀr)·s. Where s underflowed, r/u := 0 and r⊥ holds the rest.
    u = y.softmax(-1).sqrt()
    rho = (_orthogonal_rows(u) @ _divide(r, u)[..., None])[..., 0]
    return rho, remainder(factor, rho, r)


def logistic_factor(y: Tensor) -> Tensor:
    """Factor of the Gauss–Newton matrix of binary cross-entropy with logits, summed over the outputs.

    ℓ = Σ_c log(1 + e^{y_c}) − a_c y_c (``torch.nn.BCEWithLogitsLoss`` of one sample with reduction="sum"), so
    M = diag(s(1 − s)), s = 1/(1 + e^{−y}), and L_y = diag(1/(2 cosh(y/2))), which is above zero up to |y| = 1490 in
    float64 where s(1 − s) is zero from 745. [..., C] → [..., C, C].

    >>> logistic_factor(torch.tensor([0.0, 1000.0], dtype=torch.float64)).diagonal().tolist()
    [0.5, 7.12e-218]
    """
    return torch.diag_embed(_logistic_root(y))


def _logistic_root(y: Tensor) -> Tensor:
    half = torch.exp(-y.abs() / 2)  # e^{−|y|/2}/(1 + e^{−|y|}): nothing overflows, nothing cancels
    return half / (1 + half.square())


def lift_logistic(y: Tensor, factor: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """r = L_yᵀρ + r⊥ with ρ_c = r_c·2 cosh(y_c/2); r⊥ is r where that would overflow.

    >>> y = torch.tensor([[0.0, 1e4]])
    >>> lift_logistic(y, logistic_factor(y), torch.tensor([[0.5, 1.0]]))
    (tensor([[1., 0.]]), tensor([[0., 1.]]))
    """
    root = _logistic_root(y)
    rho = _divide(r, root)
    return rho, r - root * rho


def _divide(r: Tensor, root: Tensor) -> Tensor:
    """r/root, and 0 where root² underflows: M has nothing there, and the quotient could overflow."""
    alive = root >= math.sqrt(torch.finfo(root.dtype).tiny)
    return torch.where(alive, r / torch.where(alive, root, 1), 0 * r)


def huber(targets: Tensor, delta: float = 1.0) -> OutputMetric:
    """Gauss–Newton of the Huber loss at the targets a: M = diag(1 where |y_c − a_c| ≤ δ, else 0), L_y = M.

    The loss is ``torch.nn.HuberLoss(delta, reduction="sum")`` of one sample: ½r² where |r| ≤ δ, δ(|r| − ½δ) beyond. It
    has no second derivative at |r| = δ; the entry there is 1, as torch's own Hessian has it. (``torch.nn.SmoothL1Loss``
    is this loss over its beta = δ; with "mean" over C outputs it is this one over C:
    :func:`nt_kernel.metric.output_metric.scaled`.)

    targets: [N, C] (or [N] for C = 1), those of exactly the points at which the metric is taken, in their order, copied
    here; leading dimensions [..., N, C] broadcast against stacked networks. So the metric is not ``pointwise``: for a
    mini-batch build it from the targets of that batch.

    Raises TypeError where targets are not a tensor of numbers, ValueError where they hold NaN or inf, δ is not
    positive, or (from ``factor``) their shape does not match y.

    >>> huber(torch.tensor([[0.0, 0.0]]), delta=1.0).factor(torch.tensor([[0.5, -3.0]]))
    tensor([[[1., 0.],
             [0., 0.]]])
    """
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise TypeError(f"huber needs the targets as a real tensor [N, C], got {_describe(targets)}")
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not delta > 0:
        raise ValueError(f"huber needs a number delta > 0, got {delta!r}")
    if targets.dim() == 0:
        raise ValueError("huber needs targets [N, C], got a single number")
    if not bool(torch.isfinite(targets).all()):
        raise ValueError("huber's targets hold NaN or inf")
    a = targets.detach().clone()
    a = a[:, None] if a.dim() == 1 else a

    def inside(y: Tensor) -> Tensor:
        if a.shape[-2:] != y.shape[-2:] or not _broadcasts(a.shape[:-2], y.shape[:-2]):
            raise ValueError(
                f"huber's targets have shape {tuple(targets.shape)}, the outputs {tuple(y.shape)}; expected the targets of "
                f"exactly these {y.shape[-2]} samples, {tuple(y.shape[-2:])} = [N, C]: huber(targets) once per batch"
            )
        r = y - a.to(y)
        return torch.where(r.isnan(), r, (r.abs() <= delta).to(y.dtype))  # NaN outputs must not pass for outliers

    def lift(y: Tensor, factor: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        rho = inside(y) * r
        return rho, r - rho

    return OutputMetric(f"huber(delta={delta:g})", lambda y: torch.diag_embed(inside(y)), lift, pointwise=False)


def _describe(value) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    """Whether ``shape`` broadcasts to ``onto`` and not the other way."""
    if len(shape) > len(onto):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(onto), strict=False))
