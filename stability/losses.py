"""Losses of twins, each with its value, ∇_y ℓ, ∇²_y ℓ as an action and by a factor, and its secant between two outputs.

All functions take outputs y and targets a [..., N, p], one loss per sample, and run under ``torch.func`` transforms. The
*secant* S̄(y, y') is a symmetric positive semidefinite matrix per sample with S̄·(y' − y) = ∇ℓ(y') − ∇ℓ(y): what the
curvature between two twins does to their divergence (``stability.loss_ladder``, ``docs/losses.md``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.metric.gauss_newton import logistic_factor, softmax_factor
from nt_kernel.metric.output_metric import OutputMetric, from_factor, resolve_output_metric, scaled

PerSample = Callable[[Tensor, Tensor], Tensor]  # (y, a), both [..., N, p]


@dataclass(frozen=True)
class Loss:
    """A convex loss ℓ(y, a) of one sample. ``curve(y, a, v)`` is ∇²ℓ(y)·v, ``factor`` a Λ with ∇²ℓ = ΛᵀΛ.

    ``curvature(p)`` bounds λ_max(∇²ℓ) over all y of p outputs (inf: no bound is known); where ``quadratic``, ∇²ℓ is that
    number σ times the identity. ``shift_invariant``: ℓ(y + s·1) = ℓ(y), so that ∇²ℓ·1 = 0 (softmax). ``metrics`` names
    the output metrics that equal ∇²ℓ. ``targets``: "real", "distribution" (rows ≥ 0 that sum to 1), "unit" (in [0, 1]).

    >>> loss = resolve_loss("cross_entropy")
    >>> y, a = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> loss.gradient(y, a), loss.hessian(y, a)
    (tensor([[-0.5000,  0.5000]]), tensor([[[ 0.2500, -0.2500],
             [-0.2500,  0.2500]]]))
    """

    name: str
    value: PerSample  # [..., N]
    gradient: PerSample  # ∇_y ℓ [..., N, p]
    curve: Callable[[Tensor, Tensor, Tensor], Tensor]  # v [..., N, p] → ∇²ℓ v
    factor: PerSample  # Λ [..., N, q, p]
    secant: Callable[[Tensor, Tensor, Tensor], Tensor]  # (y, y', a) → S̄ [..., N, p, p]
    curvature: Callable[[int], float]
    quadratic: bool = False
    shift_invariant: bool = False
    metrics: tuple[str, ...] = ()
    targets: str = "real"

    def sigma(self, p: int) -> float | None:
        """σ of ∇²ℓ = σI for p outputs; None where the curvature is not constant.

        >>> resolve_loss("mse").sigma(4), resolve_loss("huber").sigma(4)
        (0.5, None)
        """
        return self.curvature(p) if self.quadratic else None

    def hessian(self, y: Tensor, a: Tensor) -> Tensor:
        """∇²ℓ [..., N, p, p]."""
        columns = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)  # row j: the unit vector e_j
        return self.curve(y[..., None, :], a[..., None, :], columns)

    def metric_for(self, targets: Tensor) -> OutputMetric:
        """∇²ℓ as an output metric; where it depends on the targets [N, p] it belongs to these samples (not ``pointwise``)."""
        if self.quadratic:
            sigma = self.curvature(targets.shape[-1])
            return resolve_output_metric("squared") if sigma == 1 else scaled("squared", sigma)
        if self.metrics:
            return resolve_output_metric(self.metrics[0])
        return replace(from_factor(lambda y: self.factor(y, targets.to(y)), self.name), pointwise=False)

    def encoded(self, targets: Tensor, p: int, dtype: torch.dtype | None = None, name: str = "targets") -> Tensor:
        """Targets as the loss takes them, [..., p]: class indices [...] (integers) of cross-entropy become one-hot rows.

        Raises ValueError/TypeError for targets that are none of this loss (labels ±1 of "logistic", rows that do not sum
        to 1 of "cross_entropy"), saying what to write instead.

        >>> resolve_loss("cross_entropy").encoded(torch.tensor([2, 0]), 3, torch.float32)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
        """
        if not isinstance(targets, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(targets).__name__}")
        if not targets.is_floating_point():
            if self.targets != "distribution" or targets.is_complex() or targets.dtype == torch.bool:
                raise TypeError(
                    f"{name} must be a floating-point tensor for loss={self.name!r}, got {targets.dtype}; class indices "
                    "go with loss='cross_entropy' alone"
                )
            bad = (targets < 0) | (targets >= p)
            if bool(bad.any()):
                raise ValueError(f"{name} must hold class indices 0..{p - 1}, got {targets[bad][0].item()}")
            return torch.nn.functional.one_hot(targets.long(), p).to(dtype or torch.get_default_dtype())
        _check_targets(self, targets, name)
        return targets


def _check_targets(loss: Loss, a: Tensor, name: str) -> None:
    slack = 64 * torch.finfo(a.dtype).eps * max(a.shape[-1] if a.dim() else 1, 1)
    if loss.targets == "distribution":
        gap = torch.maximum((a.sum(-1) - 1).abs(), (-a).amax(-1))
        if not bool((gap <= slack).all()):
            raise ValueError(
                f"{name} of loss={loss.name!r} must be distributions, rows >= 0 that sum to 1, or class indices as integers; "
                f"the worst row is off by {gap.max().item():.3g}"
            )
    elif loss.targets == "unit" and not bool(((a >= -slack) & (a <= 1 + slack)).all()):
        worst = a.flatten()[(a - 0.5).abs().argmax()].item()
        raise ValueError(
            f"{name} of loss={loss.name!r} must lie in [0, 1], got {worst:.3g}; write labels ±1 as (a + 1)/2"
        )


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def squared_loss(sigma: float = 1.0) -> Loss:
    """(σ/2)‖y − a‖²: ∇ℓ = σ(y − a), ∇²ℓ = σI. σ = 1 is "squared", the loss of theorem 3.

    >>> squared_loss(0.5).gradient(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    tensor([[1.]])
    """
    sigma = _positive("sigma", sigma)
    return _quadratic("squared" if sigma == 1 else f"squared(sigma={sigma:g})", lambda p: sigma)


def _quadratic(name: str, sigma: Callable[[int], float]) -> Loss:
    def scale(v: Tensor) -> Tensor:
        s = sigma(v.shape[-1])
        return v if s == 1 else s * v

    def matrix(y: Tensor, root: Callable[[float], float]) -> Tensor:
        p = y.shape[-1]
        eye = torch.eye(p, dtype=y.dtype, device=y.device)
        return (root(sigma(p)) * eye).expand(*y.shape[:-1], p, p)

    return Loss(
        name,
        value=lambda y, a: scale(y - a).mul(y - a).sum(-1) / 2,
        gradient=lambda y, a: scale(y - a),
        curve=lambda y, a, v: scale(v).expand(torch.broadcast_shapes(y.shape, v.shape)),
        factor=lambda y, a: matrix(y, math.sqrt),
        secant=lambda y, y2, a: matrix(y, lambda s: s),
        curvature=sigma,
        quadratic=True,
        metrics=("squared", "identity", "fisher_gaussian") if name == "squared" else (),
    )


def huber_loss(delta: float = 1.0) -> Loss:
    """Σ_c ½r² where |r| ≤ δ, δ(|r| − ½δ) beyond, r = y_c − a_c: ``torch.nn.HuberLoss(reduction="sum")`` of a sample.

    ∇ℓ is r cut to [−δ, δ], ∇²ℓ the diagonal 1[|r| ≤ δ]; the secant is the share of the way from r to r' inside [−δ, δ].

    >>> loss, zero = huber_loss(delta=1.0), torch.zeros(1, 1)
    >>> loss.secant(torch.tensor([[0.0]]), torch.tensor([[4.0]]), zero)
    tensor([[[0.2500]]])
    """
    delta = _positive("delta", delta)

    def value(y: Tensor, a: Tensor) -> Tensor:
        size = (y - a).abs()
        return torch.where(size <= delta, size.square() / 2, delta * (size - delta / 2)).sum(-1)

    def inside(y: Tensor, a: Tensor) -> Tensor:
        return ((y - a).abs() <= delta).to(y.dtype)

    def secant(y: Tensor, y2: Tensor, a: Tensor) -> Tensor:
        low, high = torch.minimum(y, y2) - a, torch.maximum(y, y2) - a
        within = (high.clamp(max=delta) - low.clamp(min=-delta)).clamp_min(0)
        apart = high > low
        share = torch.where(apart, within / torch.where(apart, high - low, 1), inside(y, a)).clamp_max(1)
        return torch.diag_embed(share)

    return Loss(
        "huber" if delta == 1 else f"huber(delta={delta:g})",
        value=value,
        gradient=lambda y, a: (y - a).clamp(-delta, delta),
        curve=lambda y, a, v: inside(y, a) * v,
        factor=lambda y, a: torch.diag_embed(inside(y, a)),
        secant=secant,
        curvature=lambda p: 1.0,
    )


def softmax_secant(y: Tensor, y2: Tensor, a: Tensor | None = None) -> Tensor:
    """S̄ of softmax cross-entropy in closed form, [..., N, p, p]: S̄(y' − y) = s' − s, S̄ symmetric, ⪰ 0, S̄1 = 0.

    S̄ = diag(W1) − W, W_cd the logarithmic mean of s'_c s_d and s_c s'_d. **Derived**: with e = y' − y,
    log(s'_c s_d) − log(s_c s'_d) = e_c − e_d, so W_cd(e_c − e_d) = s'_c s_d − s_c s'_d, and the sum over d is s'_c − s_c.
    W ≥ 0 makes it a graph Laplacian. At y' = y it is diag(s) − ssᵀ. (The mean of ∇²ℓ over the segment is another such
    matrix.)

    >>> y, y2 = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    >>> gap = softmax_secant(y, y2) @ (y2 - y)[..., None] - (y2.softmax(-1) - y.softmax(-1))[..., None]
    >>> gap.abs().max().item() < 1e-6
    True
    """
    s, s2, e = y.softmax(-1), y2.softmax(-1), y2 - y
    one = s2[..., :, None] * s[..., None, :]  # s'_c s_d
    gap = (e[..., :, None] - e[..., None, :]).abs()
    W = torch.maximum(one, one.mT) * _mean_exp(gap)
    W = W - torch.diag_embed(W.diagonal(dim1=-2, dim2=-1))
    return torch.diag_embed(W.sum(-1)) - W


def _logistic_secant(y: Tensor, y2: Tensor, a: Tensor) -> Tensor:
    """diag((σ(y') − σ(y))/(y' − y)) without the difference: σ(u) − σ(v) = sinh((u − v)/2)/(2cosh(u/2)cosh(v/2))."""
    near = torch.where(y * y2 > 0, torch.exp(-torch.minimum(y.abs(), y2.abs())), 1)
    both = (1 + torch.exp(-y.abs())) * (1 + torch.exp(-y2.abs()))
    return torch.diag_embed(_mean_exp((y2 - y).abs()) * near / both)


def _mean_exp(x: Tensor) -> Tensor:
    """(1 − e^{−x})/x for x ≥ 0, 1 at 0."""
    return torch.where(x > 0, -torch.expm1(-x) / torch.where(x > 0, x, 1), 1)


def _sigmoid_curve(y: Tensor, a: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(y) * torch.sigmoid(-y) * v


def _softmax_curve(y: Tensor, a: Tensor, v: Tensor) -> Tensor:
    s = y.softmax(-1)
    return s * (v - (s * v).sum(-1, keepdim=True))


NAMED: dict[str, Loss] = {
    "squared": squared_loss(),
    "mse": _quadratic("mse", lambda p: 2 / p),
    "cross_entropy": Loss(
        "cross_entropy",
        value=lambda y, a: -(a * y.log_softmax(-1)).sum(-1),
        gradient=lambda y, a: y.softmax(-1) - a,
        curve=_softmax_curve,
        factor=lambda y, a: softmax_factor(y),
        secant=softmax_secant,
        curvature=lambda p: 0.5,  # vᵀ∇²ℓv is the variance of v_c under s: at most ¼(max v − min v)² ≤ ½‖v‖²
        shift_invariant=True,
        metrics=("cross_entropy", "fisher_categorical"),
        targets="distribution",
    ),
    "logistic": Loss(
        "logistic",
        value=lambda y, a: (torch.nn.functional.softplus(y) - a * y).sum(-1),
        gradient=lambda y, a: torch.sigmoid(y) - a,
        curve=_sigmoid_curve,
        factor=lambda y, a: logistic_factor(y),
        secant=_logistic_secant,
        curvature=lambda p: 0.25,
        metrics=("logistic", "fisher_bernoulli"),
        targets="unit",
    ),
    "huber": huber_loss(),
}


def resolve_loss(loss: "str | Loss | PerSample") -> Loss:
    """A :class:`Loss` from its name, or from a convex function of the user's own.

    - "squared", ½‖y − a‖²; "mse", ‖y − a‖²/p (``torch.nn.MSELoss()`` of one sample: σ = 2/p); :func:`squared_loss` for any σ;
    - "cross_entropy", −Σ a_c log softmax(y)_c, a one-hot, any distribution, or class indices;
    - "logistic", Σ log(1 + e^{y_c}) − a_c y_c (``BCEWithLogitsLoss``, summed over the outputs), a in [0, 1];
    - "huber", threshold 1; :func:`huber_loss` for any δ;
    - a function (y [N, p], a [N, p]) → losses [N], each of its own row alone (``reduction="none"``): gradient and Hessian
      by torch.func, convexity checked wherever the Hessian is taken (:func:`stability.own_loss.own_loss`).

    Raises ValueError for an unknown name, TypeError for anything else.

    >>> resolve_loss("huber").gradient(torch.tensor([[3.0, 0.5]]), torch.zeros(1, 2))
    tensor([[1.0000, 0.5000]])
    >>> resolve_loss("crossentropy")
    Traceback (most recent call last):
    ValueError: unknown loss 'crossentropy'; known are 'squared', ...; did you mean 'cross_entropy'?
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMED:
            raise ValueError(unknown_name("loss", loss, NAMED))
        return NAMED[loss]
    if callable(loss):
        from stability.own_loss import own_loss

        return own_loss(loss)
    raise TypeError(f"loss must be a name or a function (y, a) -> losses [N], got {type(loss).__name__}")
