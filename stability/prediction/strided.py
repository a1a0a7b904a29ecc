"""Method "strided-path": the parameter path, looked at only now and then; in between, several steps are taken at once.

**Derived.** Over a stride of g steps with J' and M frozen where the stride begins, g steps of a twin move its parameters by
−(lr/n)D⁻¹J'_αᵀ Σ_j v'_{α,j}, and v' = T'r' is linear in r', so that one backward pass and one inner solve for B' = Σ_j r'_j
do for all g: Δθ'_α = −(lr/n)D⁻¹J'_αᵀT'_αB'. The r'_j are those of the frozen outputs, y'_{j+1} = y'_j − (lr/n)Σ_αK'_αv'_{α,j},
with the rebuilt inverse of the S run, in output space alone; for M = I, c > 0 no kernel is needed, Kv = (r − v)/c.

The same is done for the run on S, and only the *difference* is kept: θ' = θ_S + Δ, Δ ← Δ + (the twin's stride − that of S).
What freezing leaves out of the S run (its curvature over the stride) is so left out of neither, the error is of first
order in the stride and relative to the divergence, a candidate equal to the original does not diverge, and for models
linear in θ with M constant a stride is exact. Strides grow as the run goes on (``stride_at``): its rates of change fall.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor
from nt_kernel.mass import Masses
from nt_kernel.metric.layer_metric import push_through
from stability.prediction.blocks import CandidateBlock, SharedBlock
from stability.prediction.states import Data, Divergence, ParameterState, RunOutputs, View, own_of, with_row

STRIDE = 16  # the most steps at once
GROWTH = 0.25  # a stride is at most this share of the steps taken so far


def stride_at(step: int, most: int = STRIDE) -> int:
    """The stride that begins after ``step`` steps: a quarter of them, at least 1, at most ``most``.

    >>> [stride_at(t) for t in (0, 1, 7, 8, 12, 40, 100)]
    [1, 1, 1, 2, 3, 10, 16]
    """
    return max(1, min(most, int(GROWTH * step)))


class StridedState(ParameterState):
    """What every candidate's parameters are beside those of the run on S, {name: [R, …]}."""

    def __init__(self, data: Data, params: Mapping[str, Tensor], c: float, steps: int):
        super().__init__(data, {name: torch.zeros_like(p) for name, p in params.items()}, c, steps, 0.0)

    def look(self, rows: slice, model: nn.Module, fixed, mass: Masses, run: RunOutputs):
        """As of :class:`ParameterState`, at θ_S + Δ."""
        own = {name: model.get_parameter(name).detach() + delta[rows] for name, delta in self.params.items()}
        return self.look_at(own, rows, model, fixed, mass, run)

    def advance(
        self, rows: slice, view: View, e: Divergence, stack, z_factors: Mapping[str, Factor], z: Tensor
    ) -> None:
        """One stride, ``view.stride`` steps."""
        data, k = self.data, self.data.k[rows]
        runs = torch.arange(len(k), device=k.device)
        y = stack.outputs[:, :-1]
        own, targets = (
            own_of(view.metric, k, z, y[runs, k][:, None]),
            with_row(data.targets, runs, k, data.z_targets[rows, 0]),
        )
        blocks = {name: shared.candidates(z_factors[name], own) for name, shared in view.blocks.items()}
        moves = [lambda r, block=block: _moved(block, runs, r) for block in blocks.values()]
        total = summed_gradients(y, lambda y: view.gradient(y, targets), moves, view.rate, view.stride)
        for block in blocks.values():
            pulled = self.pulled(stack, tuple(block.shared.factor.shapes), block, view.metric, y, total)
            for parameter, g in pulled.items():
                self.params[parameter][rows].sub_(g.sub_(view.summed[parameter]), alpha=view.rate)


def summed_gradients(y: Tensor, gradient: Callable[[Tensor], Tensor], moves: list, rate: float, stride: int) -> Tensor:
    """Σ_{j<g} r_j with r_j = ∇ℓ(y_j), y_{j+1} = y_j − rate·Σ_α K_αT_αr_j; ``moves``: r ↦ K_αT_αr, one per block.

    >>> halve = lambda r: 0.5 * r
    >>> summed_gradients(torch.tensor([4.0]), lambda y: y, [halve], rate=1.0, stride=3)  # 4 + 2 + 1
    tensor([7.])
    """
    r = gradient(y)
    total = r.clone()
    for _ in range(stride - 1):
        y = y - rate * sum(move(r) for move in moves)
        r = gradient(y)
        total += r
    return total


def run_stride(
    blocks: Mapping[str, SharedBlock],
    y: Tensor,
    gradient: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    rate: float,
    stride: int,
    mass,
) -> dict[str, Tensor]:
    """Σ_j D⁻¹J_αᵀv_{α,j} of the run on S itself over a stride, by parameter, with everything frozen where it begins."""

    def moved(block: SharedBlock, r: Tensor) -> Tensor:
        v = block.dual_of_run(r)
        if block.c > 0 and block.inner.factor is None:
            return (r - v) / block.c
        return block.inner.unrows(block.inner.gram @ block.inner.rows(v))

    moves = [lambda r, block=block: moved(block, r) for block in blocks.values()]
    total = summed_gradients(y, lambda y: gradient(y, targets), moves, rate, stride)
    direction: dict[str, Tensor] = {}
    for block in blocks.values():
        direction |= push_through(block.factor, block.dual_of_run(total), mass)
    return direction


def _moved(block: CandidateBlock, runs: Tensor, r: Tensor) -> Tensor:
    """K'_αT_αr on the rows of S' with the rebuilt inverse, r [R, n, p] with z at k."""
    k = block.own.k
    v, v_z = block.dual(r, r[runs, k][:, None])
    if block.rebuilt is not None and block.own.L_z is None:
        return (r - joined(v, v_z, runs, k)) / block.shared.c
    S, at_z, _ = block.push(v, v_z)
    return joined(S, at_z, runs, k)


def joined(v: Tensor, v_z: Tensor, runs: Tensor, k: Tensor) -> Tensor:
    """Rows of S [R, n, p] and of z [R, 1, p] as rows of S', z in the place of k."""
    v = v.clone()
    v[runs, k] = v_z[:, 0]
    return v
