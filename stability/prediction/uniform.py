"""One estimate for every replacement, from one run: what all candidates inject, in one ellipsoid, and T5 with it.

**Derived.** Along the predicted divergences e_j (``stability.prediction.predict``) a candidate injects
w_j = e_{j,t+1} − A_te_{j,t}, A_t = I − lr·H_t∇²ℓ(y_t) of the S run. All w_j lie in E(Q), Q = q(Σ_j w_jw_jᵀ + εI) with
q = max_j w_jᵀ(Σ wwᵀ + εI)⁻¹w_j; the recursion of T5 (``stability.enclosures``) takes Q for wwᵀ and tr Q for ‖w‖². It
encloses every predicted twin; for the trained ones, and for candidates that were not among these, it is an *estimate*,
whose coverage has to be measured.

With "strided-path" there is one injection per stride of g steps, w_j = e_{j,t+g} − (I − lr·H_t)^g e_{j,t}: as valid, at the
looks, and tighter, for every outer ellipsoid of a sum forgets signs. It is still loose, one ellipsoid for all (k, z'):
``stability.prediction.per_sample`` has an estimate for each k.

With the injections at e = 0 instead (the twin's first step from θ_t of the S run) it does not cover: a twin no longer
trains on x_k, so its own A' leaves e_k alone where A_t pulls it back, and (A' − A_t)e is as large as what is injected.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.mass import Mass
from nt_kernel.metric.output_metric import OutputMetric
from stability.enclosures import ellipsoid_radii
from stability.losses import Loss, PerSample
from stability.prediction.run import TwinPredictor
from stability.prediction.strided import STRIDE
from stability.replacement import Replacement


@dataclass(frozen=True)
class UniformEstimate:
    """Radii that every candidate's divergence should keep to, at T + 1 instants: every step, or the strided path's looks."""

    radii: Tensor  # per sample of S, [T + 1, n]
    stacked: Tensor  # of the stacked outputs, √λ_max(P_t), [T + 1]
    instants: tuple[int, ...]  # steps

    @property
    def sup(self) -> float:
        """sup over the run and the samples."""
        return self.radii.max().item()


def uniform_estimate(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    candidates: Sequence[Replacement],
    *,
    steps: int = 200,
    lr: float = 0.1,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
    method: str = "parameter-path",
    cg_steps: int = 2,
    stride: int = STRIDE,
    memory_limit: int | None = None,
) -> UniformEstimate:
    """Estimate sup_t |y'_i − y_i| for all ``candidates`` (k, z') at once; no twin is trained.

    Arguments and errors as of :func:`stability.prediction.predict.predict_twins`.

    >>> model = nn.Linear(2, 1).double()
    >>> x, a = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    >>> z = Replacement(0, torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    >>> from stability.twins import train_twins
    >>> train_twins(model, x, a, [z], steps=20).pairs[0]["measured_sup"] <= uniform_estimate(model, x, a, [z], steps=20).sup
    True
    """
    model = deepcopy(model)
    predictor = TwinPredictor(
        model, x, targets, candidates, mass=mass, output_metric=output_metric, scale=scale, blocks=blocks, loss=loss,
        method=method, cg_steps=cg_steps, stride=stride, steps=steps, memory_limit=memory_limit,
    )  # fmt: skip
    n, p = predictor.data.targets.shape
    parameters, F = dict(model.named_parameters()), x.new_zeros(n * p, 1)
    radii, stacked, instants = [ellipsoid_radii(F, p)], [torch.linalg.matrix_norm(F, 2)], [0]
    e = x.new_zeros(len(candidates), n * p)
    for t in range(steps):
        for name, g in predictor.advance(lr).items():
            parameters[name].data.sub_(g, alpha=lr)
        if predictor.next_look > t + 1:
            continue
        loop = predictor.closed_loop(lr)
        Ae, e = e, predictor.look()[0].S.flatten(1)
        for _ in range(t + 1 - instants[-1]):
            F, Ae = loop.apply(F), Ae - loop.pull(Ae)
        F = uniform_step(F, injection_factor(e - Ae))
        radii.append(ellipsoid_radii(F, p))
        stacked.append(torch.linalg.matrix_norm(F, 2))
        instants.append(t + 1)
    return UniformEstimate(torch.stack(radii), torch.stack(stacked), tuple(instants))


def injection_factor(W: Tensor, floor: float = 1e-6) -> Tensor:
    """B with w_jw_jᵀ ⪯ BBᵀ for every row w_j of W [R, D]: BBᵀ = q(WᵀW + εI), ε = ``floor``·tr(WᵀW)/D. [D, D].

    q is the largest leverage max_j w_jᵀ(WᵀW + εI)⁻¹w_j ≤ 1.

    >>> B = injection_factor(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), floor=0.0)  # two equal rows: q = ½
    >>> B @ B.T
    tensor([[4., 0.],
            [0., 0.]])
    """
    U, sizes, V = torch.linalg.svd(W, full_matrices=False)
    D = W.shape[1]
    epsilon = floor * sizes.square().sum() / D
    total = sizes.square() + epsilon
    q = (U.square() @ torch.where(total > 0, sizes.square() / torch.where(total > 0, total, 1), 0)).max()
    inside = V.mT * (q * total).sqrt()
    if len(sizes) == D:
        return inside
    rest = torch.eye(D, dtype=W.dtype, device=W.device) - V.mT @ V  # the directions that no w_j has: εI alone
    return torch.cat([inside, (q * epsilon).sqrt() * rest], 1)


def uniform_step(AF: Tensor, B: Tensor) -> Tensor:
    """P ← (1 + 1/β)A P Aᵀ + (1 + β)Q in factor form, β = √(tr APAᵀ/tr Q), Q = BBᵀ; AF [D, R], B [D, S] → [D, ≤ D].

    >>> F = uniform_step(torch.eye(2)[:, :1], torch.eye(2)[:, 1:])
    >>> F @ F.mT
    tensor([[2., 0.],
            [0., 2.]])
    """
    a, b = AF.norm(), B.norm()
    grow = ((a + b) / a).sqrt() if a > 0 else 0
    inject = ((a + b) / b).sqrt() if b > 0 else 0
    F = torch.cat([grow * AF, inject * B], 1)
    return torch.linalg.qr(F.mT, mode="r").R.mT if F.shape[1] > F.shape[0] else F
