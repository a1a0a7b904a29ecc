"""What is carried along the run for every candidate: its divergence in output space, or its parameters' in parameter space."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor
from nt_kernel.mass import Masses
from nt_kernel.metric.inner import apply_blocks
from nt_kernel.metric.output_metric import OutputMetric
from stability.losses import PerSample
from stability.prediction.blocks import CandidateBlock, Own, SharedBlock
from stability.prediction.stack import CandidateStack, cg_steps, stacked_outputs


@dataclass(frozen=True)
class Data:
    """S, its candidates (rows of ``z_x``, which holds each z once) and the held-out points."""

    x: Tensor  # [n, …]
    targets: Tensor  # [n, p]
    k: Tensor  # [R]
    z: Tensor  # row of each candidate in z_x, [R]
    z_x: Tensor  # [Z, …]
    z_targets: Tensor  # [R, 1, p]
    held_out: Tensor | None  # [Q, …]


@dataclass(frozen=True)
class View:
    """The run on S at one instant."""

    metric: OutputMetric
    gradient: PerSample  # (y, a) → ∇_y ℓ
    rate: float  # lr/n
    y: Tensor  # outputs on S, [n, p]
    y_Q: Tensor | None  # on the held-out points, [Q, p]
    blocks: Mapping[str, SharedBlock]
    duals: Mapping[str, Tensor]  # v of the S run by block, [n, p]
    direction: Mapping[str, Tensor]  # its D⁻¹Jᵀv, summing to n·G⁻¹∇h, by parameter
    stride: int = 1  # steps that "strided-path" takes at once, and the S run's D⁻¹Jᵀv summed over them
    summed: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class RunOutputs:
    """The S run's outputs on S [n, p], at the z of some candidates [R, p], on the held-out points [Q, p]."""

    S: Tensor
    z: Tensor
    held_out: Tensor | None


@dataclass(frozen=True)
class Divergence:
    """y' − y of some candidates: on S [R, n, p], at their own z [R, 1, p], on the held-out points [R, Q, p]."""

    S: Tensor
    z: Tensor
    held_out: Tensor | None


class OutputState:
    """Method "kernel-path": e ← e − (lr/n)Σ_α(K_{α,·S'}v'_α − K_{α,·S}v_α), Jacobians at the parameters of the S run.

    The S run's own first-order step is taken off and its actual step put in its place, so that what the step leaves out
    (its curvature) is common to both and a candidate equal to the original does not diverge at all.
    """

    def __init__(self, data: Data, like: Tensor):
        R, n, p = len(data.k), *data.targets.shape
        self.data = data
        Q = None if data.held_out is None else like.new_zeros(R, len(data.held_out), p)
        self.e = Divergence(like.new_zeros(R, n, p), like.new_zeros(R, 1, p), Q)

    def look(self, rows: slice, model: nn.Module, fixed, mass: Masses, run: RunOutputs) -> tuple[Divergence, Tensor]:
        """e of the candidates ``rows`` (a slice), and the run's outputs at their z, which :meth:`advance` wants back."""
        e = self.e
        return Divergence(e.S[rows], e.z[rows], None if e.held_out is None else e.held_out[rows]), run.z

    def advance(self, rows: slice, view: View, e: Divergence, y_z: Tensor, z_factors: Mapping[str, Factor], z: Tensor):
        """One step; ``e``, ``y_z`` from :meth:`look`; ``z``: row of each candidate in the points of ``z_factors``."""
        data = self.data
        own = own_of(view.metric, data.k[rows], z, y_z[:, None] + e.z)
        r = view.gradient(view.y + e.S, data.targets.expand_as(e.S))
        r_z = view.gradient(own.y_z, data.z_targets[rows])
        for name, shared in view.blocks.items():
            block = shared.candidates(z_factors[name], own)
            S, at_z, Q = block.push(*block.dual(r, r_z))
            S_run, z_run, Q_run = shared.push_run(view.duals[name], z_factors[name])
            e.S.sub_(S - S_run, alpha=view.rate)
            e.z.sub_(at_z - z_run[z][:, None], alpha=view.rate)
            if Q is not None:
                e.held_out.sub_(Q - Q_run, alpha=view.rate)


class ParameterState:
    """Methods "parameter-path" and "cg": the parameters θ' of every candidate, J' taken there.

    θ' ← θ' − (lr/n)D⁻¹J'ᵀv'_α. Only the inner inverse of v'_α = L'ᵀ(I + cL'K'_αL'ᵀ)⁻¹ρ' + r⊥ is that of the S run, rebuilt
    on S': v' is ``steps`` conjugate gradient steps preconditioned by it (0: that inverse alone, with the metric's M at
    the outputs of the S run).
    """

    def __init__(self, data: Data, params: Mapping[str, Tensor], c: float, steps: int, tolerance: float):
        R = len(data.k)
        self.data, self.c, self.steps, self.tolerance = data, c, steps, tolerance
        self.params = {name: p.expand(R, *p.shape).clone() for name, p in params.items()}

    def look(self, rows: slice, model: nn.Module, fixed, mass: Masses, run: RunOutputs) -> tuple[Divergence, object]:
        """e of the candidates ``rows`` (a slice), by a forward pass on S' and x_k that :meth:`advance` differentiates."""
        return self.look_at({name: p[rows] for name, p in self.params.items()}, rows, model, fixed, mass, run)

    def look_at(self, own, rows: slice, model: nn.Module, fixed, mass: Masses, run: RunOutputs):
        """The same at the parameters ``own`` {name: [rows, …]}."""
        data, k = self.data, self.data.k[rows]
        runs = torch.arange(len(k), device=k.device)
        x = torch.cat([with_row(data.x, runs, k, data.z_x[data.z[rows]]), data.x[k][:, None]], 1)  # S', then x_k
        stack = CandidateStack(model, own, fixed, x, mass)
        S, at_z = with_row(stack.outputs[:, :-1], runs, k, stack.outputs[:, -1]), stack.outputs[runs, k]
        Q = (
            None
            if data.held_out is None
            else stacked_outputs(model, own, fixed, data.held_out, shared=True) - run.held_out
        )
        return Divergence(S - run.S, (at_z - run.z)[:, None], Q), stack

    def advance(
        self, rows: slice, view: View, e: Divergence, stack, z_factors: Mapping[str, Factor], z: Tensor
    ) -> None:
        """One step (as of :class:`OutputState`)."""
        data, k = self.data, self.data.k[rows]
        runs = torch.arange(len(k), device=k.device)
        y = stack.outputs[:, :-1]
        r = view.gradient(y, with_row(data.targets, runs, k, data.z_targets[rows, 0]))
        own = own_of(view.metric, k, z, y[runs, k][:, None])
        for name, shared in view.blocks.items():
            block = shared.candidates(z_factors[name], own)
            pulled = self.pulled(stack, tuple(shared.factor.shapes), block, view.metric, y, r)
            for parameter, g in pulled.items():
                self.params[parameter][rows].sub_(g, alpha=view.rate)

    def pulled(self, stack, names, block: CandidateBlock, metric: OutputMetric, y: Tensor, r: Tensor):
        """D⁻¹J'ᵀv' of one block, v' that of the output gradients r [R, n, p] on S'."""
        k = block.own.k
        runs = torch.arange(len(k), device=k.device)

        def joined(v: Tensor, v_z: Tensor) -> Tensor:
            v = v.clone()
            v[runs, k] = v_z[:, 0]
            return v

        if self.steps == 0 or self.c == 0:
            return stack.pull(names, _padded(joined(*block.dual(r, r[runs, k][:, None]))))
        whole, L = stack.kernel(names), metric.factor(y)

        def kernel(v: Tensor):
            Kv, image = whole(_padded(v))
            return Kv[:, :-1], image

        if L is None:

            def product(u: Tensor):
                Ku, image = kernel(u)
                return u + self.c * Ku, image

            def precondition(u: Tensor) -> Tensor:
                return joined(*block.solve(u, u[runs, k][:, None]))

            return cg_steps(product, r, precondition, self.steps, self.tolerance)[1]
        rho, rest = metric.lift(y, L, r)
        K_rest, image_rest = kernel(rest)
        turn = aligned(L, block.shared.inner.factor, runs, k)

        def weighed(u: Tensor):
            Ku, image = kernel(_apply(L.mT, u))
            return u + self.c * _apply(L, Ku), image

        def rotated(u: Tensor) -> Tensor:
            u = _apply(turn.mT, u)
            return _apply(turn, joined(*block.solve(u, u[runs, k][:, None])))

        image = cg_steps(weighed, rho - self.c * _apply(L, K_rest), rotated, self.steps, self.tolerance)[1]
        return {name: g + image_rest[name] for name, g in image.items()}


def own_of(metric: OutputMetric, k: Tensor, z: Tensor, y_z: Tensor) -> Own:
    """The candidates' own part of a block, with the metric's factor at their outputs y_z [R, 1, p]."""
    L_z = metric.factor(y_z)
    return Own(k, z, y_z, None if L_z is None else L_z[:, 0])


def _apply(blocks: Tensor, v: Tensor) -> Tensor:
    """Blocks [R, n, q, p] times v [R, n, p]."""
    return apply_blocks(blocks, v.flatten(-2)[..., None])[..., 0].unflatten(-1, (v.shape[1], -1))


def aligned(L: Tensor, L_S: Tensor, runs: Tensor, k: Tensor) -> Tensor:
    """Orthogonal T [R, n, q, q] with T·L_S nearest to L, the identity at k: M has many factors, and two that are close as
    M need not be close as L."""
    U, _, V = torch.linalg.svd(L @ L_S.mT)
    turn = U @ V
    turn[runs, k] = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
    return turn


def _padded(v: Tensor) -> Tensor:
    """v [R, n, p] with a row of zeros for x_k, which is looked at but not trained on."""
    return torch.cat([v, torch.zeros_like(v[:, :1])], 1)


def with_row(rows: Tensor, runs: Tensor, k: Tensor, row: Tensor) -> Tensor:
    """[n, …] (or [R, n, …]) for every candidate, with its own row at k, [R, n, …]."""
    out = rows.expand(len(k), *rows.shape[rows.dim() - row.dim() :]).clone()
    out[runs, k] = row
    return out
