"""Sampled Fisher matrices of the outputs: the score of a likelihood at labels drawn from the model itself.

The Fisher matrix E[∇_y log p ∇_y log pᵀ], the label drawn from p(· | y), equals the Gauss–Newton matrix for the
likelihoods here (Martens 2020, "New insights and perspectives on the natural gradient method", JMLR 21): exactly it is
"fisher_categorical", "fisher_bernoulli" or "fisher_gaussian" (``nt_kernel.metric.output_metric``). This file has the Monte
Carlo estimate from q draws, whose inner systems are n·q instead of n·C on a side.
"""

import numpy
import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.metric.output_factor import OutputMetric, lift_by_pinv


def sampled_fisher(likelihood: str = "categorical", probes: int = 4, seed: int = 0) -> OutputMetric:
    """The Fisher matrix of a likelihood estimated from q = ``probes`` draws per sample; rows of L_y [..., N, q, C]:

    - "categorical": (s − onehot(k))ᵀ/√q, k drawn from s = softmax(y);
    - "bernoulli": (s − b)ᵀ/√q, every b_c drawn with probability s_c = 1/(1 + e^{−y_c});
    - "gaussian" (unit variance): gᵀ/√q, g standard normal.

    So E[L_yᵀL_y] is diag(s) − ssᵀ, diag(s(1 − s)), I: unbiased over seeds, with an error that falls as 1/√q.

    The draws are functions of y and of uniform numbers [N, q, C], made on the CPU in float64 from a fresh
    ``numpy.random.default_rng(seed)`` at every call: the same y gives the same factor, on any device, whatever was
    called in between, and no global stream is touched. The numbers belong to the row i = 1…N of y, so stacked networks
    [..., N, C] share them and the first n rows draw alike in any longer batch; not ``pointwise``. Independent draws in
    every step: a new seed each.

    Raises ValueError for an unknown likelihood, probes < 1, a negative seed, or one output under "categorical".

    >>> metric = sampled_fisher("categorical", probes=2, seed=1)
    >>> L = metric.factor(torch.zeros(5, 3))
    >>> L.shape, torch.equal(L, metric.factor(torch.zeros(5, 3)))
    (torch.Size([5, 2, 3]), True)
    """
    if likelihood not in SCORES:
        raise ValueError(unknown_name("likelihood", likelihood, SCORES))
    for name, value, least in (("probes", probes, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"sampled_fisher needs an integer {name} ≥ {least}, got {value!r}")

    def factor(y: Tensor) -> Tensor:
        score = SCORES[likelihood](y[..., None, :], _uniform(y, probes, seed))  # [..., N, q, C]
        return score.to(y.dtype) / probes**0.5

    name = f"sampled_fisher({likelihood!r}, probes={probes}, seed={seed})"
    return OutputMetric(name, factor, lift_by_pinv, pointwise=False)


def _uniform(y: Tensor, probes: int, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), [N, q, C] in float64, filled row by row: a longer batch begins with the same ones."""
    numbers = numpy.random.default_rng(seed).random((y.shape[-2], probes, y.shape[-1]))
    numbers = torch.from_numpy(numbers).clamp_(min=torch.finfo(torch.float64).tiny)  # 0 itself has no logarithm
    return numbers.to(y.device)


def _categorical(y: Tensor, uniform: Tensor) -> Tensor:
    # Gumbel's argmax rather than the inverse distribution: a class of probability zero is never drawn by rounding.
    if y.shape[-1] < 2:
        raise ValueError(
            "the categorical likelihood needs at least 2 outputs (softmax of one output is constant); "
            "for one logit per sample write likelihood='bernoulli'"
        )
    logits = y.double()
    logits = logits - logits.amax(-1, keepdim=True)
    drawn = (logits - uniform.log().neg().log()).argmax(-1, keepdim=True)
    index = torch.arange(y.shape[-1], device=y.device)
    return logits.softmax(-1) - (index == drawn).to(logits.dtype)


def _bernoulli(y: Tensor, uniform: Tensor) -> Tensor:
    logits = y.double()
    drawn = logits > torch.logit(uniform)
    return torch.where(drawn, -torch.sigmoid(-logits), torch.sigmoid(logits))  # s − 1 without cancellation


def _gaussian(y: Tensor, uniform: Tensor) -> Tensor:
    return torch.special.ndtri(uniform).expand(*y.shape[:-2], *uniform.shape[-2:])


SCORES = {"categorical": _categorical, "bernoulli": _bernoulli, "gaussian": _gaussian}
