"""What a replaced sample does to the outputs by influence functions: one damped Gauss–Newton step at the end of the run.

The rivals of ``stability`` that the field uses share one object, the *pull* of a sample j on a point q,

    pull_{qj} = −(1/n) J_q G⁻¹J_jᵀ r_j  [p],    r_j = ∇_y ℓ(y_j, a_j),

the change of the outputs at q that the gradient of sample j alone makes in the metric G, per unit of step. Replacing
(x_k, a_k) by z' = (x', a') then moves the outputs at q by pull_{qz'} − pull_{qk}. Influence functions take G = H + λD
with the Gauss–Newton matrix H = (1/n)JᵀMJ of the whole network at the end of the run (Koh & Liang, arXiv 1703.04730;
damped, as in Grosse et al., arXiv 2308.03296); TracIn sums over the run (``stability.tracing``). Everything is
computed in output space: by the Woodbury identity J_qG⁻¹J_jᵀ = K_qj − c·K_qS L_yᵀS⁻¹L_y K_Sj, and no m × m matrix is
formed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor, layer_factors
from nt_kernel.mass import Mass, Masses
from nt_kernel.metric.inner import InnerSystem
from nt_kernel.metric.layer_metric import model_mass, resolve_blocks, scale_factor
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from stability.losses import Loss, PerSample, resolve_loss


@dataclass(frozen=True)
class Effects:
    """First-order effects of single samples on the outputs, n samples of S, Z others, Q query points, p outputs.

    ``per_sample`` [n + Z, n + Z + Q, p]: what the presence of sample j (weight 1/n) adds to the outputs at point q; both
    run over S, then the others, q then over the query points. The effect of a replacement is a difference of two rows.
    """

    per_sample: Tensor
    n: int

    def replaced(self, k, j) -> Tensor:
        """y' − y where sample k of S gives way to other j, at all points [n + Z + Q, p]; k and j may be index tensors [R].

        >>> Effects(torch.tensor([[[1.0]], [[4.0]]]), 1).replaced(0, 0)
        tensor([[3.]])
        """
        others, own = len(self.per_sample) - self.n, self.n
        for name, index, size in (("k", k, own), ("j", j, others)):
            index = torch.as_tensor(index)
            if index.is_floating_point() or bool(((index < 0) | (index >= size)).any()):
                raise ValueError(f"{name} must be in 0..{size - 1}, got {index.tolist()}")
        return self.per_sample[self.n + torch.as_tensor(j)] - self.per_sample[torch.as_tensor(k)]

    def all(self) -> Tensor:
        """y' − y for every (k, z') at once, [n, Z, n + Z + Q, p]."""
        return self.per_sample[None, self.n :] - self.per_sample[: self.n, None]


def influence(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    others: Tensor,
    other_targets: Tensor,
    query: Tensor | None = None,
    *,
    damping: Mass,
    params: Mapping[str, Tensor] | None = None,
    loss: "str | Loss | PerSample" = "squared",
) -> Effects:
    """Damped inverse Gauss–Newton influence of every replacement (k, z') on the outputs at S, the others and ``query``:

        y'(q) − y(q) ≈ −(1/n) J_q (H + λD)⁻¹(J_z'ᵀr_z' − J_kᵀr_k),   H = (1/n) JᵀMJ, M = ∇²_y ℓ, all at θ.

    Parameters
    ----------
    model, params: θ, {name: tensor}, the end of the run on S (default: the model's own parameters).
    x [n, …], targets [n, p]: S. others [Z, …], other_targets [Z, p]: the z'. query [Q, …]: where to read, beside them.
    damping: λD: a number, or a dict by parameter or layer name. Where no weight decay fixes it, mass/T stands for a run of
        length T = Σ lr stopped early: on an eigenvalue s of D^(−½)HD^(−½) gradient flow has gone 1 − e^(−Ts) of the way,
        the Woodbury flow (one block) 1 − e^(−Ts/(1+s)), the damped step s/(s + λ); all three begin as Ts for λ = 1/T.
    loss: by name, or any convex function (:func:`stability.resolve_loss`; targets as probabilities for cross-entropy).

    First order in 1/n: for a quadratic risk with weight decay λ at its minimum the truth is this with the H of S'. It takes θ
    for stationary, which no unfinished run is. Cost: one pass on all points, per layer a Gram matrix of all points with S and
    the others, one Cholesky of [np, np].

    Raises ValueError/TypeError for data that do not fit, NumericalError where λ is too small for the arithmetic.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> nn.init.ones_(model.weight).sum().item()  # y = w·x, w = 1
    1.0
    >>> x, z = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0]])
    >>> effects = influence(model, x, torch.tensor([[1.0], [2.0]]), z, torch.tensor([[0.0]]), damping=0.5)
    >>> effects.replaced(0, 0)[0].item()  # −(1/2)·1·(2.5 + 0.5)⁻¹·(1 − 0)
    -0.166666...
    """
    per_sample = pulls(
        model, x, targets, others, other_targets, query, params=params, mass=damping, blocks="network", loss=loss
    )
    return Effects(per_sample, len(x))


def pulls(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    others: Tensor,
    other_targets: Tensor,
    query: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable | None" = None,
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
) -> Tensor:
    """−(1/n) J_q G⁻¹J_jᵀ r_j for every sample j of S and the others, at every point q of S, the others and the query points,
    [n + Z, n + Z + Q, p] in float64.

    G = D + c·JᵀMJ is built on S (mass, output_metric, scale, blocks: as for ``nt_kernel.generalized_ntk``; scale "none" is
    G = D); ``output_metric`` None is the Gauss–Newton matrix of the loss.
    """
    loss = resolve_loss(loss)
    points = _points(x, targets, others, other_targets, query)
    n, B = len(x), len(x) + len(others)
    y, factors = layer_factors(model, points, params=params)
    if y.shape[1] != targets.shape[1]:
        raise ValueError(f"the model gives {y.shape[1]} outputs, targets have {targets.shape[1]}")
    y, factors = y.double(), {name: factor.to(torch.float64) for name, factor in factors.items()}
    r = loss.gradient(y[:B], torch.cat([targets, other_targets]).double())
    masses = model_mass(factors, mass)
    metric, c = resolve_output_metric(output_metric or loss.metric_for(targets.double())), scale_factor(scale, n)
    total = sum(_block_pulls(f, n, masses, c, metric, y, r) for f in resolve_blocks(factors, blocks).values())
    return total.movedim(-1, 0) / -n


def _block_pulls(factor: Factor, n: int, mass: Masses, c: float, metric: OutputMetric, y: Tensor, r: Tensor) -> Tensor:
    """J_q G⁻¹J_jᵀr_j of one metric block, [U, p, B]: G on the first n of the U points, j over the first B = len(r)."""
    own, columns = y[:n], factor.rows(len(r))
    if factor.decouples(mass) and (c == 0 or metric.factor(own) is None):
        gram, decoupled = factor.sample_gram(columns, mass), True  # [U, B]; the outputs do not meet
        Kr = (gram[:, None, :] * r.T).flatten(1)  # [U, p·B]
    else:
        gram, decoupled = factor.gram(columns, mass), False  # [U, p, B, p]
        Kr = torch.einsum("ucbd,bd->ucb", gram, r).flatten(0, 1)  # [U·p, B]
        gram = gram.flatten(2).flatten(0, 1)
    size = n if decoupled else own.numel()
    where = f"layer {factor.name!r}"
    inner = InnerSystem(gram[:size, :size], y.shape[1], c, metric, own, decoupled=decoupled, where=where)
    return inner.reduce(gram[:, :size], Kr[:size], Kr).reshape(len(y), y.shape[1], len(r))


def _points(x, targets, others, other_targets, query) -> Tensor:
    """S, the others and the query points as one batch."""
    named = {"x": x, "targets": targets, "others": others, "other_targets": other_targets}
    named |= {} if query is None else {"query": query}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {type(value).__name__}")
        if (value.dtype, value.device) != (x.dtype, x.device):
            raise TypeError(f"{name} is {value.dtype} on {value.device}, x is {x.dtype} on {x.device}; use one of each")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or inf")
    for name, a, of, rows in (("targets", targets, "x", x), ("other_targets", other_targets, "others", others)):
        if a.dim() != 2 or len(a) != len(rows) or len(rows) == 0 or a.shape[1] != targets.shape[1]:
            raise ValueError(f"{name} must be [rows of {of}, p], got {tuple(a.shape)} for {of} {tuple(rows.shape)}")
    for name, rows in (("others", others), *([] if query is None else [("query", query)])):
        if rows.shape[1:] != x.shape[1:]:
            raise ValueError(f"{name} has samples of shape {tuple(rows.shape[1:])}, x of {tuple(x.shape[1:])}")
    return torch.cat([x, others, *([] if query is None else [query])])
