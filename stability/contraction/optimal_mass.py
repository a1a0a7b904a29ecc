"""Layer masses that make the bound T1 of a recorded run smallest: a semidefinite program in one number per layer.

With weights w_α = 1/μ_α and c = 0 (scale "none"), H = (1/n) Σ_α w_αJ_αJ_αᵀ and R_ii = Σ_α w_αJ_{iα}J_{iα}ᵀ are linear in w,
and T1 = 2hL/(ξ√n) with ξ = inf_t λ_min(H), h = sup_t max_i λ_max(R_ii). Smallest h/ξ:

    maximise s  subject to  (1/n) Σ_α w_αK_α,t ⪰ sI  and, for i ∈ S ∪ S' and all sampled t,  R_ii,t ⪯ I  ("exact"),
    or  Σ_α w_α κ_α² ≤ 1 with κ_α = sup ‖J_{iα}‖₂ ("norms": cheaper, with h ≤ 1 all the same).

Unknowns are few and matrices large, so the cones are met by cutting planes: λ_min(K(w)) = min_v vᵀK(w)v over unit v, a linear
program in w whose value bounds the optimum from above, while every w on the way bounds it from below. **Derived.** The
optimum is one for the recorded run: with other masses another run is made. Bounds, not divergences, are optimised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nt_kernel.errors import NumericalError, unknown_name
from nt_kernel.factors import layer_factors

CONSTRAINTS = ("exact", "norms")
MOST_ROUNDS = 200
CUTS = 3  # eigenvectors added per matrix and round


@dataclass(frozen=True)
class MassSnapshot:
    """What the program needs of one instant: K_α = J_αJ_αᵀ on S, and its diagonal blocks on S ∪ S', at mass 1."""

    kernels: dict[str, Tensor]  # {layer: [n·p, n·p]}
    blocks: dict[str, Tensor]  # {layer: [n + extra, p, p]}
    samples: int  # n


@dataclass(frozen=True)
class OptimalMasses:
    """``masses`` {layer: μ_α}, scaled so that h on the snapshots is that of mass 1; and what they do to T1 there.

    ``ratio`` = h/ξ, ``ratio_equal`` that of equal masses: T1 falls by ``improvement`` = ratio_equal/ratio if the run stays.
    ``bound``: no layer masses within ``floor`` give a smaller ratio (constraint "exact"). ``ratio`` and ``improvement`` are
    computed from eigenvalues of the final masses; for ξ they presume that λ_min is well above rounding.
    """

    masses: dict[str, float]
    ratio: float
    ratio_equal: float
    improvement: float
    bound: float
    rounds: int
    kind: str = "optimum of T1's constants for the recorded run"
    assumptions: str = (
        'scale "none", one mass per layer; another run is made with them, and it is bounds that are optimised'
    )

    @property
    def cost(self) -> str:
        return f"{self.rounds} linear programs, and the eigenvalues of every snapshot's H for each"


def mass_snapshot(model: nn.Module, x: Tensor, extra: Tensor | None = None) -> MassSnapshot:
    """The layers of the model at its present parameters on S = ``x`` [n, …] and the further inputs ``extra`` (of S').

    >>> snapshot = mass_snapshot(nn.Linear(2, 1), torch.eye(2), torch.zeros(1, 2))
    >>> snapshot.kernels["."], snapshot.blocks["."].flatten()
    (tensor([[2., 1.],
            [1., 2.]], dtype=torch.float64), tensor([2., 2., 1.], dtype=torch.float64))
    """
    points = x if extra is None else torch.cat([x, extra])
    _, factors = layer_factors(model, points)
    n, kernels, blocks = len(x), {}, {}
    for layer, factor in factors.items():
        K = factor.gram().detach().double()  # [N, p, N, p]
        own = K[:n, :, :n].flatten(2).flatten(0, 1)
        kernels[layer] = (own + own.mT) / 2
        blocks[layer] = K.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    return MassSnapshot(kernels, blocks, n)


def optimal_masses(
    snapshots: Sequence[MassSnapshot], *, constraint: str = "exact", floor: float = 1e-3, tolerance: float = 1e-3
) -> OptimalMasses:
    """The layer masses of smallest h/ξ over all ``snapshots``, hence of smallest T1 for that run at scale "none".

    ``floor``: no weight 1/μ_α below this share of the weight all layers have at equal masses, so that every mass is finite.
    ``tolerance``: of the optimum, relative, where λ_min allows it. Use: ``train_twins(..., mass=found.masses, scale="none")``.

    Raises ValueError for snapshots of different layers and bad options, NumericalError where λ_min(H) is 0 to rounding for
    all masses (n·p above the number of parameters, equal inputs) or the linear program fails.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> found = optimal_masses([mass_snapshot(model, torch.randn(3, 4, dtype=torch.float64))])
    >>> found.improvement >= 1, sorted(found.masses)
    (True, ['0', '2'])
    """
    layers = _check(snapshots, constraint, floor, tolerance)
    kernels = [np.stack([s.kernels[a].cpu().numpy() for a in layers]) / s.samples for s in snapshots]  # [N, np, np]
    blocks = np.concatenate(
        [np.stack([s.blocks[a].cpu().numpy() for a in layers], 1) for s in snapshots]
    )  # [·, N, p, p]
    norms = np.linalg.eigvalsh(blocks)[..., -1].max(0)  # κ_α², [N]
    equal = np.ones(len(layers))

    def size(w: np.ndarray) -> float:
        if constraint == "norms":
            return float(w @ norms)
        return float(np.linalg.eigvalsh(np.einsum("bnij,n->bij", blocks, w))[:, -1].max())

    least = floor / size(equal)
    unit = max(float(np.linalg.eigvalsh(K.sum(0))[-1]) for K in kernels) / size(equal)  # of s
    objective = -np.eye(len(layers) + 1)[-1]
    rows, sides = [], []
    if constraint == "norms":
        rows.append([*norms, 0.0])
        sides.append(1.0)
    w = equal / size(equal)
    best, value, upper, rounds = w, -math.inf, math.inf, 0
    while rounds < MOST_ROUNDS:
        rounds += 1
        smallest = math.inf
        for K in kernels:
            values, vectors = np.linalg.eigh(np.einsum("nij,n->ij", K, w))
            smallest = min(smallest, float(values[0]))
            for v in vectors[:, :CUTS].T:
                rows.append([*(-np.einsum("nij,i,j->n", K, v, v) / unit), 1.0])
                sides.append(0.0)
        h = size(w)
        if smallest / h > value:
            best, value = w / h, smallest / h
        if constraint == "exact":
            values, vectors = np.linalg.eigh(np.einsum("bnij,n->bij", blocks, w))
            for i in np.argsort(-values[:, -1])[:CUTS]:
                v = vectors[i, :, -1]
                rows.append([*np.einsum("nij,i,j->n", blocks[i], v, v), 0.0])
                sides.append(1.0)
        if upper - value <= tolerance * max(value, 0.0) or upper <= 1e-14 * unit:
            break
        w, upper = _program(objective, np.array(rows), np.array(sides), least, norms, unit)
    if value <= 0:
        raise NumericalError("λ_min(H) is 0 to rounding for all layer masses: nothing to optimise", value=value)
    return _result(layers, kernels, blocks, best, upper, rounds)


def _program(objective, rows, sides, least: float, norms, unit: float) -> tuple[np.ndarray, float]:
    """The linear program of the cuts so far: (w, upper bound of s). Every weight is at most 1/κ_α², as R_ii ⪯ I implies."""
    from scipy.optimize import linprog

    bounds = [(min(least, 1 / k), 1 / k) for k in np.maximum(norms, 1e-300)] + [(None, None)]
    found = linprog(objective, A_ub=rows, b_ub=sides, bounds=bounds, method="highs")
    if found.status != 0:
        raise NumericalError(f"the linear program of the layer masses failed: {found.message}")
    return found.x[:-1], float(found.x[-1]) * unit


def _result(layers, kernels, blocks, w, upper: float, rounds: int) -> OptimalMasses:
    """Everything recomputed from the final weights: exact h whatever the constraint was."""

    def constants(w) -> tuple[float, float]:
        xi = min(float(np.linalg.eigvalsh(np.einsum("nij,n->ij", K, w))[0]) for K in kernels)
        return xi, float(np.linalg.eigvalsh(np.einsum("bnij,n->bij", blocks, w))[:, -1].max())

    (xi, h), (xi_equal, h_equal) = constants(w), constants(np.ones(len(layers)))
    ratio, ratio_equal = h / xi, h_equal / xi_equal if xi_equal > 0 else math.inf
    weights = w * (h_equal / h)
    return OptimalMasses(
        {a: 1 / float(v) for a, v in zip(layers, weights, strict=True)},
        ratio, ratio_equal, ratio_equal / ratio, 1 / upper if upper > 0 else math.inf, rounds,
    )  # fmt: skip


def _check(snapshots, constraint: str, floor: float, tolerance: float) -> list[str]:
    if not snapshots:
        raise ValueError("snapshots is empty: give mass_snapshot(model, x) of at least one instant")
    for t, snapshot in enumerate(snapshots):
        if not isinstance(snapshot, MassSnapshot):
            raise TypeError(f"snapshots[{t}] must be a MassSnapshot, got {type(snapshot).__name__}")
    layers = list(snapshots[0].kernels)
    for t, snapshot in enumerate(snapshots):
        if list(snapshot.kernels) != layers:
            raise ValueError(f"snapshots[{t}] has layers {list(snapshot.kernels)}, the first one {layers}")
    if constraint not in CONSTRAINTS:
        raise ValueError(unknown_name("constraint", constraint, CONSTRAINTS))
    if not 0 < floor < 1:
        raise ValueError(f"floor must be between 0 and 1, got {floor!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    return layers
