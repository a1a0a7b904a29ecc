"""``Woodbury``: the layerwise Riemannian optimizer of Pehle & Slotine (arXiv 2603.03610, algorithm 1) for the usual loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.plan import trainable_layers
from nt_kernel.factors import Factor, layer_factors
from nt_kernel.mass import Masses
from nt_kernel.metric.inner import Solve
from nt_kernel.metric.layer_metric import StepSystem, check_scale, check_solver, resolve_blocks
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from optim.model_optimizer import ModelOptimizer
from optim.options.damping import Damping, LevenbergMarquardt, Trial, damping_at, penalty_increase, predicted_decrease
from optim.options.diagnostics import StepDiagnostics, inner_figures
from optim.options.group_mass import GroupMass, current_masses, damped
from optim.options.groups import update_of
from optim.options.second_moment import SecondMomentMass
from optim.options.trust_region import parameters_at, trust_region
from optim.steps.direction import gradient_direction, step_systems
from optim.steps.step_check import checked_step
from optim.steps.step_limit import auto_lr
from optim.steps.update import decayed_gradient, moved


@dataclass(frozen=True)
class _View:
    """The samples of a step seen to first order: outputs y and their gradients r [B, C], a factor for each metric block."""

    y: Tensor
    r: Tensor
    blocks: Mapping[str, Factor]


@dataclass(frozen=True)
class _Move:
    """What a step would do: new values and momentum buffers by parameter name, and the inner systems behind them."""

    values: dict[str, Tensor]
    buffers: dict[str, Tensor | None]
    systems: dict[str, StepSystem]


class Woodbury(ModelOptimizer):
    r"""θ ← θ − lr·G⁻¹∇h with G_α = D_α + c·J_αᵀM J_α per layer, by Woodbury's identity; no m × m matrix is formed.

    ``step`` applies G⁻¹ to whatever stands in ``p.grad``. The samples of the metric are those of the forward passes whose
    output received a gradient since the last ``step`` or ``zero_grad``: evaluation passes do not count, micro-batches
    count together. With r = ∂h/∂y of those passes, p.grad = s·Jᵀr + remainder, s ≠ 1 after clipping or unscaling; the first
    term takes the push-through form D⁻¹Jᵀ[r − c·L_yᵀS⁻¹L_y K r], and the remainder (Riemannian weight decay, a penalty on θ),
    where there is one, the general Woodbury form. The inner matrix is [B·q, B·q], B the samples of the step.

    Parameters
    ----------
    model: the network (samples must not interact). lr: step size, or "auto" for 1/N (N metric blocks, scale "mean").
    mass: D, a number, one per layer, a dict by layer or parameter name, or a :class:`~optim.SecondMomentMass`.
    output_metric: M, "identity", "squared", "cross_entropy", or a callable y → [N, C, C].
    scale: c = 1/B ("mean"), 1 ("sum"), 0 ("none": G = D, gradient descent), or "mean-jacobian": G = D + J̄ᵀM̄ J̄ with the
        batch means of the J_i and M_i, whose inner matrix is [C, C]. blocks: "layer" or "network".
    solver: of the inner systems, "cholesky", "cg" (preconditioned conjugate gradients to 1e-4 in float32, 1e-12 in
        float64), or "auto", the cheaper one (``nt_kernel.metric.cost_model``). ``solves`` tells how it went.
    check_step: refuse a step with lr·λ_max(L_y H L_yᵀ) ≥ 2, N blocks. At scale "mean" λ_max ≤ N, so lr < 2/N costs nothing;
        beyond that the kernel of every step, [B·C, B·C], is formed and, where its norm does not settle it, its
        eigenvalues. It presumes h = (1/B)Σℓ with ∇²_yℓ ⪯ M (½‖y − a‖² with M = I, cross-entropy with any M here). A loss
        of curvature σ, such as ``MSELoss()`` with σ = 2/C, steps like lr·σ: write ``check_step=False`` and mind the limit.
        Momentum, weight decay and rates by group change the limit (``optim.steps.step_limit``).
    momentum, dampening, nesterov, weight_decay, decay: :class:`optim.steps.update.Update`; G⁻¹g enters the momentum buffer.
    damping: λ > 0 that multiplies D; a function of the number of steps taken; or a trust region,
        :class:`~optim.LevenbergMarquardt`, which decides by the loss (``step(closure)``) instead of ``check_step``.
    groups: [{"layers": ["0", "blocks.*"], "lr": …}, …], ``fnmatch`` patterns of layer names with hyperparameters of their
        own (lr, mass, momentum, dampening, nesterov, weight_decay, decay, damping); the other layers take those above.
    diagnostics: keep :class:`~optim.options.diagnostics.StepDiagnostics` of every block in ``diagnostics``, at the price of
        forming and diagonalising its inner matrix at every step; nothing without.

    All hyperparameters by group are entries of ``param_groups``, read at every step and kept by ``state_dict``. Of the last
    step: ``lambda_max``, the bound on λ_max that allowed it, and ``lr_limit``, the lr of the fastest group that it allows;
    ``solves`` {block: :class:`nt_kernel.metric.inner.Solve`}, solver, iterations and residual; ``trials``, the moves of
    a trust region, ``last_ratio`` the ratio of the last of them; ``damping_now``, the λ of the (default group's) last step, of
    the next one in a trust region.

    Raises ValueError/TypeError for bad hyperparameters, ``StepTooLargeError`` (a ValueError) naming 2/λ_max,
    ``NumericalError`` when the inner system fails; a step that raises has changed nothing.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> opt = Woodbury(model, lr=1.0)
    >>> opt.zero_grad()
    >>> loss = 0.5 * (model(torch.tensor([[2.0]])) - 2.0).square().mean()
    >>> loss.backward()
    >>> opt.step()
    >>> model.weight.item()  # 2·2/(1 + 2²)
    0.800000...
    """

    _carried = (
        *("model", "mass", "scale", "blocks", "solver", "check_step"),
        *("damping", "lr_is_auto", "_metric_given", "_diagnose"),
    )

    def __init__(
        self,
        model: nn.Module,
        lr: float | str = 0.1,
        *,
        mass: GroupMass = 1.0,
        output_metric: "str | OutputMetric | Callable" = "identity",
        scale: str = "mean",
        blocks: str = "layer",
        solver: str = "auto",
        check_step: bool = True,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decay: str = "decoupled",
        damping: Damping = 1.0,
        groups: Sequence[Mapping] | None = None,
        diagnostics: bool = False,
    ):
        check_scale(scale)
        check_solver(solver)
        resolve_blocks({}, blocks)
        for name, switch in (("check_step", check_step), ("diagnostics", diagnostics)):
            if not isinstance(switch, bool):
                raise TypeError(f"{name} must be True or False, got {switch!r}")
        self.scale, self.blocks, self.solver, self.check_step, self.damping = scale, blocks, solver, check_step, damping
        self._metric_given, self._diagnose, self.lr_is_auto = output_metric, diagnostics, lr == "auto"
        self.output_metric = resolve_output_metric(output_metric)
        defaults = {"lr": lr, "mass": mass, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay, "decay": decay, "damping": damping_at(damping, 0)}
        self._check_damping([defaults, *(group for group in groups or () if isinstance(group, Mapping))])
        if callable(damping):
            defaults["steps"] = 0
        if isinstance(damping, LevenbergMarquardt):
            defaults["growth"] = 2.0
        super().__init__(model, defaults, groups)

    def _check_damping(self, groups: Sequence[Mapping]) -> None:
        """What does not go with a schedule or a trust region; the first of ``groups`` is the default."""
        trust, first = isinstance(self.damping, LevenbergMarquardt), groups[0]
        for group in groups[1:]:
            if "damping" in group and (trust or callable(self.damping)):
                raise ValueError(
                    f"a group has a damping of its own, {group['damping']!r}, which needs a number for the others, "
                    f"got {self.damping!r}"
                )
        for group in groups:
            if (
                trust
                and group.get("weight_decay", first["weight_decay"])
                and group.get("decay", first["decay"]) != "riemannian"
            ):
                raise ValueError(
                    "damping=LevenbergMarquardt(…) needs one objective that every move decreases, which decoupled weight "
                    'decay does not have; write decay="riemannian"'
                )

    def _auto_lr(self) -> float:
        return auto_lr(len(trainable_layers(self.model)) if self.blocks == "layer" else 1, self.scale)

    def _start(self) -> None:
        super()._start()
        self.output_metric = resolve_output_metric(self._metric_given)
        self.lambda_max: float | None = None
        self.lr_limit: float | None = None
        self.solves: dict[str, Solve] = {}
        self.diagnostics: dict[str, StepDiagnostics] = {}
        self.trials: tuple[Trial, ...] = ()

    def _progress(self) -> dict:
        first, follows = self.param_groups[0], callable(self.damping) or isinstance(self.damping, LevenbergMarquardt)
        return {key: first[key] for key in ("steps", "growth", "damping") if follows and key in first}

    @property
    def damping_now(self) -> float:
        """λ of the first group: of the last step, of the next one in a trust region."""
        return self.param_groups[0]["damping"]

    @property
    def last_ratio(self) -> float | None:
        """The decrease of h over the predicted one, of the last move of a trust region."""
        return self.trials[-1].ratio if self.trials else None

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; ``closure`` re-evaluates the loss as for any torch optimizer, in a trust region after every move too."""
        if closure is None and isinstance(self.damping, LevenbergMarquardt):
            raise ValueError(
                "damping=LevenbergMarquardt(…) compares losses: write opt.step(closure), where closure() clears the "
                "gradients, computes the loss, calls backward and returns the loss"
            )
        loss = None if closure is None else _evaluate(closure)
        params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if all(p.grad is None for p in params.values()):
            return loss
        groups = self._group_of(params)
        device = next(iter(params.values())).device.type
        with torch.autocast(device, enabled=False):
            view, moments = self._view(), self._moments(params, groups)
            masses = self._masses(params, moments)
        if isinstance(self.damping, LevenbergMarquardt):
            self._trust_region(closure, loss, view, params, groups, masses, moments)
        else:
            dampings = [self._damping_of(group) for group in self.param_groups]
            with torch.autocast(device, enabled=False):
                move = self._move(view, params, groups, masses, dampings)
                self._commit(view, params, move, moments)
            for group, damping in zip(self.param_groups, dampings, strict=True):
                group["damping"] = damping
                if callable(self.damping):
                    group["steps"] += 1
        self._passes.clear()
        return loss

    def _damping_of(self, group: Mapping) -> float:
        return damping_at(self.damping, group["steps"]) if callable(self.damping) else damping_at(group["damping"], 0)

    def _view(self) -> _View:
        x, r = self._passes.samples()
        y, factors = layer_factors(self.model, x)
        return _View(y, r.to(y.dtype), resolve_blocks(factors, self.blocks))

    def _moments(self, params: Mapping[str, Tensor], groups: Mapping[str, dict]) -> dict[str, tuple[Tensor, int]]:
        """{name: (v, t)} with the gradients as they stand, for the groups whose mass is a :class:`SecondMomentMass`."""
        found = {}
        for name, p in params.items():
            mass, held = groups[name]["mass"], self.state.get(p, {})
            if isinstance(mass, SecondMomentMass):
                v, t = held.get("exp_avg_sq"), held.get("step", 0)
                if p.grad is not None:
                    found[name] = mass.advance(v, t, p.grad)
                elif v is not None:
                    found[name] = v.to(p), t
        return found

    def _masses(self, params: Mapping[str, Tensor], moments: Mapping[str, tuple[Tensor, int]]) -> list[Masses]:
        """D of every group, undamped."""
        everything = dict(self.model.named_parameters())  # frozen ones too: a mass may speak of them
        return [current_masses(g["mass"], self._layers_of(g), everything, moments) for g in self.param_groups]

    def _move(
        self, view: _View, params, groups, masses: Sequence[Masses], dampings: Sequence[float], fresh=False
    ) -> _Move:
        """What the step does at these dampings; ``fresh``: without the momentum of the steps before."""
        D = {n: damped(m, t) for own, t in zip(masses, dampings, strict=True) for n, m in own.items()}
        updates = {name: update_of(group) for name, group in groups.items()}
        systems = step_systems(view.blocks, view.y, D, self.scale, self.output_metric, self.solver)
        if self.check_step and not isinstance(self.damping, LevenbergMarquardt):
            args = view.blocks, systems, view.y, self.scale, self.output_metric, updates, D
            self.lambda_max, self.lr_limit = checked_step(*args) or (None, None)
        shrinking = {n for n, u in updates.items() if u.decay == "riemannian" and u.weight_decay}
        gradient = {n: None if p.grad is None else decayed_gradient(p.grad, p, updates[n]) for n, p in params.items()}
        exact = {name for name, factor in view.blocks.items() if shrinking & factor.shapes.keys()}
        direction = gradient_direction(view.blocks, systems, view.r, gradient, D, exact=exact)
        values, buffers = {}, {}
        for name, p in params.items():
            if p.grad is not None:
                held = None if fresh else self.state.get(p, {}).get("momentum_buffer")
                held = None if held is None else held.to(p)
                values[name], buffers[name] = moved(p, direction[name].to(p.dtype), held, updates[name])
        return _Move(values, buffers, systems)

    def _commit(self, view: _View, params: Mapping[str, Tensor], move: _Move, moments: Mapping[str, tuple]) -> None:
        self.solves = {name: system.last for name, system in move.systems.items()}
        if self._diagnose:
            self.diagnostics = {name: self._figures(view, params, move, name) for name in view.blocks}
        for name, value in move.values.items():
            p = params[name]
            p.copy_(value)
            if move.buffers[name] is not None:
                self.state[p]["momentum_buffer"] = move.buffers[name]
            if name in moments:
                self.state[p]["exp_avg_sq"], self.state[p]["step"] = moments[name]

    def _trust_region(self, closure: Callable, loss, view: _View, params, groups, masses, moments) -> None:
        device, first = view.y.device.type, self.param_groups[0]
        L, factors = self.output_metric.factor(view.y), view.blocks.values()
        g = {name: p.grad for name, p in params.items() if p.grad is not None}

        def propose(damping: float, first_move: bool) -> tuple[_Move, dict[str, Tensor], float, float]:
            with torch.autocast(device, enabled=False):
                move = self._move(
                    view, params, groups, masses, [damping] * len(self.param_groups), fresh=not first_move
                )
                delta = {name: value - params[name] for name, value in move.values.items()}
                foretold = predicted_decrease(factors, L, g, delta, len(view.y))
                decays = {n: groups[n]["weight_decay"] for n in delta if groups[n]["decay"] == "riemannian"}
                return move, move.values, foretold, -penalty_increase(params, delta, decays)

        def evaluate(values: Mapping[str, Tensor]):
            with parameters_at(self.model, values):
                return _evaluate(closure)

        move, damping, growth, self.trials = trust_region(
            self.damping, first["damping"], first["growth"], propose, evaluate, loss
        )
        if move is not None:
            with torch.autocast(device, enabled=False):
                self._commit(view, params, move, moments)
        for group in self.param_groups:
            group["damping"], group["growth"] = damping, growth

    def _figures(self, view: _View, params: Mapping[str, Tensor], move: _Move, block: str) -> StepDiagnostics:
        system, names = move.systems[block], view.blocks[block].shapes
        figures = inner_figures(system, self.output_metric, view.y, view.r, system.dual(view.r))
        gradients = [params[n].grad for n in names if params[n].grad is not None]
        moves = [move.values[n] - params[n] for n in names if n in move.values]
        return StepDiagnostics(_norm(gradients), _norm(moves), *figures)


def _evaluate(closure: Callable) -> Tensor | float:
    with torch.enable_grad():
        return closure()


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5
