"""K training runs as one stacked system: S, its twins, the null twin, all seen to first order at every instant.

Run 0 trains on S, runs 1…R on S^(k→z'), then (optionally) the null twin: S again from θ₀ moved by one ulp. *Probe* runs
follow run 0's parameters and hold the replacements z', where κ of the S run is wanted too; they do not train.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import run_model
from nt_kernel.capture.probe import split_state
from nt_kernel.factors import Factor, stacked_layer_factors
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import inner_system, model_mass, resolve_blocks, scale_factor
from nt_kernel.metric.output_metric import resolve_output_metric
from nt_kernel.spectra.spectrum import largest_block_eigenvalues, rounding_radius
from optim.steps.direction import inner_systems, woodbury_direction
from optim.steps.step_limit import checked_rate
from stability.loss_step import rate_bound, rate_name, weighed_kernel
from stability.losses import Loss, resolve_loss
from stability.replacement import Replacement, rows_on_S, stack_twins


@dataclass(frozen=True)
class Snapshot:
    """The stacked system at one instant. R twins, n samples, p outputs, V = 1 + R viewed runs (S and the twins)."""

    outputs: Tensor  # y of S and twins on S, [V, n, p]
    residuals: Tensor  # r = ∇_y ℓ of S and twins on their own rows, the removed x_k last, [V, n + 1, p]
    probe_residuals: Tensor  # r of the S run at the replacements z', [R, p]
    train_loss: Tensor  # mean ℓ of S and twins on their own data, [V]
    root: Tensor | None  # Λ of the S run on S, ∇²ℓ = ΛᵀΛ, [n, q, p]; None where ∇²ℓ = σI
    null_outputs: Tensor | None  # y of the null twin on S, [n, p]
    H: Tensor  # kernel of the S run, [np, np]
    H_error: float  # rounding radius around its eigenvalues
    twin_blocks: Tensor  # R'_ii, R' = J'G'⁻¹J'ᵀ, on the twins' n + 1 rows, [R, n + 1, p, p]
    twin_columns: Tensor  # R' at x_k and at x'_k, and R'r' with r' on S (x'_k left out), [R, (n+1)p, 2p + 1]
    jacobian_norms: Tensor  # ‖J_i‖₂ of S and twins on their rows, [V, n + 1] (row n of run 0 is not used)
    probe_norms: Tensor  # ‖J_i‖₂ of the S run at the replacements z', [R]
    rate: float  # a bound on λ_max(ΛHΛᵀ) of S and of every twin with its own metric, small enough for the step
    velocity: dict[str, Tensor]  # θ̇ = −G⁻¹∇h of all runs and probes, {name: [K, …]}


class TwinSystem:
    """Stacked runs with one loss and the metric G = D + c·JᵀMJ of each on its own data.

    ``params`` is the state; :meth:`snapshot` looks, :meth:`advance` moves. Nothing of ``model`` is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        targets: Tensor,
        replacements: Sequence[Replacement],
        *,
        loss: "Loss | str" = "squared",
        held_out: Tensor | None,
        mass: Mass,
        output_metric,
        scale: str,
        blocks: str,
        null_twin: bool,
    ):
        self.model, self.blocks, self.loss = model, blocks, resolve_loss(loss)
        self.n, self.R, self.p = len(x), len(replacements), targets.shape[1]
        self.V, self.has_null = 1 + self.R, null_twin
        self.trained = self.V + null_twin
        self.c = scale_factor(scale, self.n)
        self.metric = resolve_output_metric(output_metric)
        if not self.metric.pointwise:
            raise ValueError(
                f"output_metric {self.metric.name!r} belongs to the samples it was made for (their targets or draws), and "
                "twins put another sample in place of one of them; take a metric that is a function of the outputs alone"
            )
        self.held_out = held_out
        self.rows = rows_on_S(self.n, replacements, x.device)
        self.replaced = torch.tensor([z.index for z in replacements], device=x.device)

        twin_x, twin_t = stack_twins(x, targets, replacements)
        own_x, own_t = torch.cat([x, twin_x[0, self.replaced[0]][None]]), torch.cat([targets, targets[:1]])
        probes_x = _pad_rows(torch.stack([z.x for z in replacements]), self.n + 1)
        self.probe_targets = torch.stack([z.target for z in replacements])
        null = [own_x[None]] if null_twin else []
        self.x = torch.cat([own_x[None], twin_x, *null, probes_x])  # [K, n + 1, …]
        self.targets = torch.cat([own_t[None], twin_t])  # [V, n + 1, p]
        self.S_targets = targets

        start, self.fixed = split_state(model)
        self.parameters = sum(p.numel() for p in start.values())  # of one network
        self.params = {name: p.expand(len(self.x), *p.shape).clone() for name, p in start.items()}
        if null_twin:
            for p in self.params.values():
                p[self.V] = torch.nextafter(p[self.V], torch.full_like(p[self.V], torch.inf))
        y, factors = stacked_layer_factors(model, self.params, self.x)
        if y.shape[-1] != self.p:
            raise ValueError(
                f"the model gives {y.shape[-1]} outputs, targets have {self.p}; expected targets [n, {y.shape[-1]}]"
            )
        self.mass = model_mass(factors, mass)
        self.block_count = len(resolve_blocks(factors, blocks))
        self.sigma = self.loss.sigma(self.p)  # None: the curvature of the loss is not constant
        self.loss.value(y[0], self.targets[0])  # one of the user's own says here what is wrong with its shape

    def snapshot(self, lr: float | None, where: str = "") -> Snapshot:
        """Everything the bounds need at the present parameters.

        Raises StepTooLargeError for an Euler step that S or a twin does not bear (``lr=None``: flow, nothing to bear).
        """
        n, p, V = self.n, self.p, self.V
        y, factors = stacked_layer_factors(self.model, self.params, self.x)
        blocks = self._trained(resolve_blocks(factors, self.blocks), n + 1)
        residuals = self.loss.gradient(y[:V], self.targets)
        probe = self._probe_columns(residuals[1:])
        inners, H, twin_blocks, twin_columns, size = {}, None, 0, 0, 0.0
        for name, factor in blocks.items():
            inner, gram = inner_system(factor, n, self.mass, self.c, self.metric, y[: self.trained], where)
            own, twins, twin_gram = inner.runs(slice(0, 1)), inner.runs(slice(1, V)), gram[1:V]
            H = own.add_to(H, own.self_kernel()[0])
            twin_blocks = twin_blocks + twins.diagonal_blocks(twin_gram)
            twin_columns = twin_columns + twins.apply(twin_gram, probe)
            size += own.error_scale(n)
            inners[name] = inner
        H = H / n
        norms = sum(f.block_gram(1.0) for f in factors.values())
        norms = torch.cat([norms[:V], norms[self.trained :]])
        norms = largest_block_eigenvalues(norms).clamp_min(0).sqrt()
        return Snapshot(
            outputs=torch.cat([y[:1, :n], self.on_S(y[1:V])]),
            residuals=residuals,
            probe_residuals=self.loss.gradient(y[self.trained :].flatten(0, 1)[: self.R], self.probe_targets),
            train_loss=self.loss.value(y[:V, :n], self.targets[:, :n]).mean(-1),
            root=None if self.sigma is not None else self.loss.factor(y[0, :n], self.S_targets),
            null_outputs=y[V, :n] if self.has_null else None,
            H=H,
            H_error=rounding_radius(n * p, max(size, H.norm().item()), H.dtype),
            twin_blocks=twin_blocks,
            twin_columns=twin_columns,
            jacobian_norms=norms[:V],
            probe_norms=norms[V:].flatten()[: self.R],
            rate=self._check_step(lr, y[: self.trained, :n], H, inners, where),
            velocity=self._velocity(self._trained(blocks, n), inners, y),
        )

    def on_S(self, values: Tensor) -> Tensor:
        """Twin values on their n + 1 rows [R, n + 1, …] read on the samples of S [R, n, …]."""
        index = self.rows.reshape(*self.rows.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index)

    def metric_gap(self) -> Tensor:
        """max_α ‖G'^{−½}(G − G')G'^{−½}‖₂ at the present parameters of each twin, [R]: how far S and S' disagree on G.

        **Derived**: G − G' = c(J_kᵀM_kJ_k − J_k'ᵀM_k'J_k') has rank 2p, so its eigenvalues relative to G' are those of
        c·diag(I, −I)·L R'_BB Lᵀ, B = {k, k'}, M = LᵀL.
        """
        n, p, gap = self.n, self.p, self.x.new_zeros(self.R)
        y, factors = stacked_layer_factors(self.model, self.params, self.x)
        pair = torch.stack([torch.full_like(self.replaced, n), self.replaced], -1)  # rows of x_k and x'_k, [R, 2]
        index = (pair[..., None] * p + torch.arange(p, device=pair.device)).flatten(1)  # rows of R', [R, 2p]
        L = self.metric.factor(y[1 : self.V].gather(1, pair[..., None].expand(-1, -1, p)))  # [R, 2, q, p]
        probe = self._probe_columns(torch.zeros_like(y[1 : self.V]))[..., : 2 * p]
        for factor in self._trained(resolve_blocks(factors, self.blocks), n + 1).values():
            inner, gram = inner_system(factor, n, self.mass, self.c, self.metric, y[: self.trained])
            columns = inner.runs(slice(1, self.V)).apply(gram[1 : self.V], probe)
            R = columns.gather(1, index[..., None].expand(-1, -1, 2 * p))  # R'_BB, [R, 2p, 2p]
            if L is not None:
                factor_B = torch.stack([torch.block_diag(*blocks) for blocks in L])  # [R, 2q, 2p]
                R = factor_B @ R @ factor_B.mT
            sign = torch.ones(R.shape[-1], dtype=R.dtype, device=R.device)
            sign[len(sign) // 2 :] = -1
            gap = torch.maximum(gap, torch.linalg.eigvals(self.c * sign[:, None] * R).abs().amax(-1))
        return gap

    def held_out_outputs(self) -> Tensor | None:
        """Outputs of S and twins on the held-out points, [V, Q, p]."""
        if self.held_out is None:
            return None
        viewed = {name: p[: self.V] for name, p in self.params.items()}
        forward = lambda values: run_model(self.model, {**values, **self.fixed}, self.held_out)  # noqa: E731
        return torch.func.vmap(forward)(viewed)

    def advance(self, velocity: dict[str, Tensor], dt: float) -> None:
        """Euler: θ ← θ + dt·velocity."""
        self.params = {name: torch.add(p, velocity[name], alpha=dt) for name, p in self.params.items()}

    def velocity(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """θ̇ = −G⁻¹∇h at given stacked parameters (for the flow)."""
        y, factors = stacked_layer_factors(self.model, params, self.x)
        blocks = self._trained(resolve_blocks(factors, self.blocks), self.n)
        inners = inner_systems(blocks, y[: self.trained, : self.n], self.mass, self.c, self.metric)
        return self._velocity(blocks, inners, y)

    def _trained(self, blocks, rows: int) -> dict[str, Factor]:
        return {name: f.runs(slice(0, self.trained)).rows(rows) for name, f in blocks.items()}

    def _probe_columns(self, twin_residuals: Tensor) -> Tensor:
        """Unit columns at x_k (row n) and x'_k (row k), and r' on S, as right-hand sides [R, (n+1)p, 2p + 1]."""
        n, p, R = self.n, self.p, self.R
        runs = torch.arange(R, device=self.x.device)
        probe = self.x.new_zeros(R, n + 1, p, 2 * p + 1)
        eye = torch.eye(p, dtype=self.x.dtype, device=self.x.device)
        probe[:, n, :, :p] = eye
        probe[runs, self.replaced, :, p : 2 * p] = eye
        probe[..., -1] = twin_residuals
        probe[runs, self.replaced, :, -1] = 0  # x'_k is not a sample of S
        return probe.flatten(1, 2)

    def _velocity(self, blocks, inners, y: Tensor) -> dict[str, Tensor]:
        own = torch.cat([self.targets, self.targets[:1]]) if self.has_null else self.targets
        r = self.loss.gradient(y[: self.trained], own)[:, : self.n] / self.n
        direction = woodbury_direction(blocks, inners, r, self.mass)
        probes = len(self.x) - self.trained
        return {
            name: -torch.cat([d, d[:1].expand(probes, *d.shape[1:])]) if probes else -d for name, d in direction.items()
        }

    def _check_step(self, lr: float | None, own: Tensor, H: Tensor, inners, where: str) -> float:
        bound = rate_bound(self.loss, self.metric, self.block_count, self.n, self.c, own)
        if lr is None:
            return bound

        def kernels() -> Tensor:  # each twin's own: its metric, its inputs
            twins = None
            for inner in inners.values():
                inner = inner.runs(slice(1, self.V))
                twins = inner.add_to(twins, inner.self_kernel())
            every = torch.cat([H[None], twins / self.n])
            return weighed_kernel(self.loss, every, own[: self.V], self.targets[:, : self.n])

        return checked_rate(lr, bound, kernels, where.rstrip(": "), rate=rate_name(self.loss))


def _pad_rows(rows: Tensor, height: int) -> Tensor:
    """[R, …] as stacks [⌈R/height⌉, height, …], the last row repeated to fill."""
    missing = -len(rows) % height
    rows = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
    return rows.unflatten(0, (-1, height))
