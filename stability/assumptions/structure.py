"""What can be read off J at one point θ: its rank, and the floor of the metric that is built of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nt_kernel.capture.probe import split_state
from nt_kernel.factors import Factor, layer_factors
from nt_kernel.mass import Mass, RowColumnMass
from nt_kernel.metric.layer_metric import model_mass, resolve_blocks, scale_factor
from nt_kernel.metric.output_metric import resolve_output_metric
from nt_kernel.spectra.spectrum import rounding_radius
from stability.assumptions.verdict import Assumption
from stability.assumptions.verdicts import verdict_on
from stability.replacement import duplicate_rows


def full_row_rank(
    model: nn.Module, x: Tensor, points: Mapping[int, Mapping[str, Tensor] | None], structural: str
) -> Assumption:
    """J has full row rank n·p at every θ of ``points`` {step: parameters}, seen in float64 at mass 1.

    Violated where the structure forces a rank below n·p (``structural`` says how) or a row of J is exactly 0; undecided
    where λ_min(JJᵀ) cannot be told from 0. The sample named has the largest share of the weakest direction.
    """
    worst, dead = None, ""
    for step, params in points.items():
        y, factors = layer_factors(model, x, params=params)
        K = sum(f.to(torch.float64).gram() for f in factors.values()).flatten(2, 3).flatten(0, 1)  # [np, np]
        if not bool(torch.isfinite(K).all()):
            return verdict_on("full_row_rank", math.nan, 0.0, "undecided", "J is not finite", step=step)
        values, vectors = torch.linalg.eigh((K + K.mT) / 2)
        p = y.shape[-1]
        share = vectors[:, 0].reshape(-1, p).square().sum(1)
        norm = values[-1].item()
        noise = 2 * rounding_radius(len(K), 1.0, y.dtype)
        ratio = max(values[0].item(), 0.0) / norm if norm > 0 else 0.0
        found = (ratio, noise, step, int(share.argmax()))
        zero = (K.diagonal() == 0).nonzero().flatten()
        if len(zero):
            i, c = divmod(int(zero[0]), p)
            dead = f"no parameter moves output {c} of sample {i}"
            worst = (0.0, noise, step, i)
            break
        worst = found if worst is None or ratio < worst[0] else worst
    ratio, threshold, step, sample = worst
    place = {"step": step, "sample": sample}
    if structural or dead:
        return verdict_on("full_row_rank", 0.0, threshold, "violated", structural or dead, **place)
    if ratio > threshold:
        return verdict_on("full_row_rank", ratio, threshold, "holds", "the smallest eigenvalue is no rounding", **place)
    reason = "no reason known that lowers the rank, but λ_min(JJᵀ) cannot be told from 0"
    return verdict_on("full_row_rank", ratio, threshold, "undecided", reason, **place)


def metric_floor(
    model: nn.Module, x: Tensor, points: Mapping[int, Mapping[str, Tensor] | None], declared: float, *, mass: Mass,
    output_metric, scale: str, blocks: str,
) -> Assumption:  # fmt: skip
    """G_α ⪰ μI at every θ of ``points``; μ the smallest mass, or what was ``declared`` (> 0) in bounds that use it.

    **Derived**: λ_min(G_α) ≥ min D_α + c·min(0, λ_min(K^½MK^½)), K = J_αJ_αᵀ, with equality for a scalar mass and more
    parameters than outputs: on the range of J_αᵀ, c·J_αᵀMJ_α has the eigenvalues of c·K^½MK^½, elsewhere 0. M is taken as
    the user's callable gives it, before anything makes it symmetric or refuses it.
    """
    worst = None
    for step, params in points.items():
        y, factors = layer_factors(model, x, params=params)
        factors = {name: f.to(torch.float64) for name, f in factors.items()}
        masses, c = model_mass(factors, mass), scale_factor(scale, len(x))
        M = output_matrices(output_metric, y) if c else None
        for name, block in resolve_blocks(factors, blocks).items():
            pull, sample = (0.0, -1) if M is None else _weakest(block, M)
            least = min(_smallest(masses[n]) for n in block.shapes)
            worst = min(worst or (math.inf,), (least + c * min(pull, 0.0), least, name, sample, step))
    value, least, name, sample, step = worst
    mu = declared or min(_smallest(m) for m in masses.values())
    holds = value >= mu * (1 - 1e-9)
    if holds:
        reason = "the smallest mass is at least μ, the pulled-back term positive semidefinite"
    elif value < least * (1 - 1e-9):
        reason = f"M has a negative direction: the pulled-back term comes down to {value - least:.3g}"
    else:
        reason = f"the smallest mass is {least:.4g}, the μ of the bound {mu:.4g}"
    sample = sample if value < least else -1
    return verdict_on(
        "metric_floor", value, mu, "holds" if holds else "violated", reason, layer=name, sample=sample, step=step
    )


def output_matrices(output_metric, y: Tensor) -> Tensor | None:
    """M [n, p, p] in float64, as it is given; None for M = I."""
    if callable(output_metric) and not hasattr(output_metric, "factor"):
        given = output_metric(y)
        if given.shape[-1] == given.shape[-2]:
            return given.double()
        return (given.mT @ given).double()
    factor = resolve_output_metric(output_metric).factor(y)
    return None if factor is None else (factor.mT @ factor).double()


def _weakest(block: Factor, M: Tensor) -> tuple[float, int]:
    """λ_min(K^½MK^½), rounding taken for 0, and the sample with the largest share of its direction."""
    K = block.gram().flatten(2, 3).flatten(0, 1)
    values, vectors = torch.linalg.eigh((K + K.mT) / 2)
    root = vectors * values.clamp_min(0).sqrt()  # K = root·rootᵀ
    whole = torch.block_diag(*((m + m.mT) / 2 for m in M))
    inner = root.mT @ whole @ root
    found, directions = torch.linalg.eigh((inner + inner.mT) / 2)
    if found[0] >= -rounding_radius(len(K), found.abs().max().item(), torch.float64):
        return 0.0, -1
    share = (root @ directions[:, 0]).reshape(-1, M.shape[-1]).square().sum(1)
    return found[0].item(), int(share.argmax())


def _smallest(mass) -> float:
    if isinstance(mass, RowColumnMass):
        return (mass.row.min() * mass.column.min()).item()
    return mass.min().item() if isinstance(mass, Tensor) else float(mass)


def why_singular(model: nn.Module, x: Tensor, outputs: int) -> str:
    """What forces λ_min(H) = 0, in words; "" if nothing does.

    >>> why_singular(nn.Linear(1, 1), torch.tensor([[1.0], [2.0], [1.0]]), 1)
    'n·p = 3 > 2 parameters and inputs 0 and 2 of S are equal'
    """
    reasons, parameters = [], sum(p.numel() for p in split_state(model)[0].values())
    if len(x) * outputs > parameters:
        reasons.append(f"n·p = {len(x) * outputs} > {parameters} parameters")
    if rows := duplicate_rows(x):
        reasons.append(f"inputs {rows[0]} and {rows[1]} of S are equal")
    return " and ".join(reasons)
