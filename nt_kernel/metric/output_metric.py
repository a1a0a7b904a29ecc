"""Output metrics M = L_yᵀL_y, block diagonal over samples, by name: what ``output_metric=...`` accepts everywhere.

``output_factor`` says what a metric is and takes users' callables; ``gauss_newton`` has the closed forms (softmax,
logistic, Huber), ``fisher`` the sampled Fisher matrices.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.metric.fisher import sampled_fisher
from nt_kernel.metric.gauss_newton import huber, lift_logistic, lift_softmax, logistic_factor, softmax_factor
from nt_kernel.metric.output_factor import OutputMetric, from_callable, from_factor, psd_factor, remainder

__all__ = [
    "NAMED",
    "OutputMetric",
    "from_factor",
    "huber",
    "psd_factor",
    "resolve_output_metric",
    "sampled_fisher",
    "scaled",
    "softmax_factor",
]


def resolve_output_metric(metric: "str | OutputMetric | Callable") -> OutputMetric:
    """An :class:`OutputMetric` from its name, or from a user's callable ``y [N, C] -> M [N, C, C]`` or ``[N, q, C]``.

    Names, each the Gauss–Newton matrix ∇²_y ℓ of the loss of ONE sample, summed over its outputs:

    - ``"identity"``, ``"squared"``: M = I, of ½‖y − a‖². (torch's ``MSELoss()`` divides ‖y − a‖² by n·C: its own matrix
      per sample is (2/C)·I, ``scaled("squared", 2 / C)``.)
    - ``"cross_entropy"``: M = diag(s) − ssᵀ, s = softmax(y), of rank C − 1.
    - ``"logistic"``: M = diag(s(1 − s)), s = 1/(1 + e^{−y}), of binary cross-entropy with logits.
    - ``"fisher_gaussian"``, ``"fisher_categorical"``, ``"fisher_bernoulli"``: the exact Fisher matrix of that likelihood
      (unit variance), which is the three above, in this order (Martens 2020, "New insights and perspectives on the
      natural gradient method", JMLR 21).

    :func:`huber`, :func:`sampled_fisher`, :func:`from_factor` and :func:`scaled` make further ones. A callable is given
    the outputs of one network at a time; what it returns is M where its blocks are square, a factor L (M = LᵀL)
    elsewhere; a square factor goes through :func:`from_factor`.

    Raises ValueError for an unknown name, TypeError for anything else; errors of a callable come when it is used.

    >>> resolve_output_metric("cross_entropy").factor(torch.zeros(1, 3)).shape
    torch.Size([1, 2, 3])
    """
    if isinstance(metric, OutputMetric):
        return metric
    if isinstance(metric, str):
        if metric not in NAMED:
            hint = f": {HINTS[metric]}" if metric in HINTS else ""
            raise ValueError(unknown_name("output metric", metric, NAMED) + hint)
        return NAMED[metric]
    if callable(metric):
        return from_callable(metric)
    raise TypeError(
        "output_metric must be a name or a callable y [N, C] -> M [N, C, C] or its factor L [N, q, C], or the result of "
        f"huber, sampled_fisher, from_factor or scaled; got {metric!r}"
    )


def scaled(metric: "str | OutputMetric | Callable", constant: float) -> OutputMetric:
    """The metric ``constant``·M, for losses that carry a constant per sample.

    (2/C)·I is the Gauss–Newton matrix of ``torch.nn.MSELoss()``, whose gradient per sample is (2/C)(y − a).

    Raises ValueError unless 0 < constant < ∞, and what :func:`resolve_output_metric` raises.

    >>> scaled("squared", 4.0).factor(torch.zeros(1, 2))
    tensor([[[2., 0.], [0., 2.]]])
    """
    if isinstance(constant, bool) or not isinstance(constant, int | float) or not 0 < constant < math.inf:
        raise ValueError(f"scaled needs a constant above 0 and finite, got {constant!r}")
    base, root = resolve_output_metric(metric), math.sqrt(constant)

    def factor(y: Tensor) -> Tensor:
        L = base.factor(y)
        if L is None:
            L = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand(*y.shape, -1)
        return root * L

    def lift(y: Tensor, L: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        rho = base.lift(y, L / root, r)[0] / root
        return rho, remainder(L, rho, r)

    return OutputMetric(f"{constant:g}·{base.name}", factor, lift, base.pointwise)


def _identity(name: str) -> OutputMetric:
    return OutputMetric(name, lambda y: None, lambda y, factor, r: (r, torch.zeros_like(r)))


NAMED = {
    "identity": _identity("identity"),
    "squared": _identity("squared"),
    "cross_entropy": OutputMetric("cross_entropy", softmax_factor, lift_softmax),
    "logistic": OutputMetric("logistic", logistic_factor, lift_logistic),
    "fisher_gaussian": _identity("fisher_gaussian"),
    "fisher_categorical": OutputMetric("fisher_categorical", softmax_factor, lift_softmax),
    "fisher_bernoulli": OutputMetric("fisher_bernoulli", logistic_factor, lift_logistic),
}
HINTS = {
    "fisher": "which one is a matter of the likelihood, 'fisher_categorical', 'fisher_bernoulli' or 'fisher_gaussian'",
    "huber": "it needs the targets, write output_metric=huber(targets, delta=1.0)",
    "sampled_fisher": "write output_metric=sampled_fisher('categorical', probes=4, seed=0)",
}
