"""``Woodbury``: the layerwise Riemannian optimizer of Pehle & Slotine (arXiv 2603.03610, algorithm 1) for the usual loop."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, flatten_outputs, observing
from nt_kernel.capture.plan import trainable_layers
from nt_kernel.factors import Factor, layer_factors
from nt_kernel.mass import Mass, resolve_mass
from nt_kernel.metric.inner import Solve, apply_blocks
from nt_kernel.metric.layer_metric import (
    StepSystem,
    check_scale,
    check_solver,
    model_mass,
    resolve_blocks,
    scale_factor,
    solve_metric,
)
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from optim.direction import step_systems, woodbury_direction
from optim.step_limit import auto_lr, check_lr, checked_rate


@dataclass
class _Pass:
    """One forward pass: its inputs, and ∂h/∂y as received by its output since the last step."""

    inputs: tuple
    gradient: Tensor | None = None


class _Recorder:
    """The model's forward hook. It does not keep its optimizer alive, and it does nothing in a copy of the model."""

    def __init__(self, optimizer: "Woodbury | None" = None):
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._record(module, args, kwargs, out)

    def __reduce__(self):
        return _Recorder, ()


class Woodbury(torch.optim.Optimizer):
    r"""θ ← θ − lr·G⁻¹∇h with G_α = D_α + c·J_αᵀM J_α per layer, by Woodbury's identity; no m × m matrix is formed.

    ``step`` applies G⁻¹ to whatever stands in ``p.grad``. The samples of the metric are those of the forward passes whose
    output received a gradient since the last ``step`` or ``zero_grad``: evaluation passes do not count, micro-batches
    count together. With r = ∂h/∂y of those passes, p.grad = Jᵀr + remainder; the first term takes the push-through form
    D⁻¹Jᵀ[r − c·L_yᵀS⁻¹L_y K r], and the remainder (clipping, weight decay, a penalty on θ), where there is one, the
    general Woodbury form. The inner matrix is [B·q, B·q], B the samples of the step.

    Parameters
    ----------
    model: the network (samples must not interact). lr: step size, or "auto" for 1/N (N metric blocks, scale "mean").
    mass: D, a number, one per layer, or a dict by layer or parameter name.
    output_metric: M, "identity", "squared", "cross_entropy", or a callable y → [N, C, C].
    scale: c = 1/B ("mean"), 1 ("sum"), 0 ("none": G = D, gradient descent), or "mean-jacobian": G = D + J̄ᵀM̄ J̄ with the
        batch means of the J_i and M_i, whose inner matrix is [C, C]. blocks: "layer" or "network".
    solver: of the inner systems, "cholesky", "cg" (preconditioned conjugate gradients to 1e-4 in float32, 1e-12 in
        float64), or "auto", the cheaper one (``nt_kernel.metric.cost_model``). ``solves`` tells how it went.
    check_step: refuse a step with lr·λ_max(L_y H L_yᵀ) ≥ 2, N blocks. At scale "mean" λ_max ≤ N, so lr < 2/N costs nothing;
        beyond that the kernel of every step, [B·C, B·C], is formed and, where its norm does not settle it, its
        eigenvalues. It presumes h = (1/B)Σℓ with ∇²_yℓ ⪯ M (½‖y − a‖² with M = I, cross-entropy with any M here). A loss
        of curvature σ, such as ``MSELoss()`` with σ = 2/C, steps like lr·σ: write ``check_step=False`` and mind the limit.

    ``lr`` is the group's entry, so LR schedulers work; ``lambda_max`` is the bound on λ_max that allowed the last step,
    ``solves`` {block: :class:`nt_kernel.metric.inner.Solve`} the last step's solver, its iterations and achieved residual.

    Raises ValueError/TypeError for bad hyperparameters, ``StepTooLargeError`` (a ValueError) naming 2/λ_max,
    ``NumericalError`` when the inner system fails.

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

    def __init__(
        self,
        model: nn.Module,
        lr: float | str = 0.1,
        *,
        mass: Mass = 1.0,
        output_metric: "str | OutputMetric | Callable" = "identity",
        scale: str = "mean",
        blocks: str = "layer",
        solver: str = "auto",
        check_step: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Woodbury takes the model, not its parameters (it needs the forward pass); got {type(model).__name__}"
            )
        layers = trainable_layers(model)
        if not layers:
            raise ValueError("the model has no trainable parameters (all have requires_grad=False)")
        check_lr(lr)
        check_scale(scale)
        check_solver(solver)
        resolve_blocks({}, blocks)
        resolve_mass(mass, layers)
        self.mass, self.scale, self.blocks, self.check_step = mass, scale, blocks, check_step
        self.solver, self.solves = solver, dict[str, Solve]()
        self.output_metric = resolve_output_metric(output_metric)
        self.lr_is_auto = lr == "auto"
        if self.lr_is_auto:
            lr = auto_lr(len(layers) if blocks == "layer" else 1, scale)
        self.lambda_max: float | None = None
        params = dict(model.named_parameters())
        super().__init__([params[n] for names in layers.values() for n in names], {"lr": lr})
        self.model = model
        self._seen: list[_Pass] = []
        self._handle = model.register_forward_hook(_Recorder(self), with_kwargs=True)
        weakref.finalize(self, self._handle.remove).atexit = False

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        if observing() or not torch.is_grad_enabled() or self._is_functional(module, out):
            return
        if kwargs:
            raise TypeError(f"Woodbury records positional inputs only; the model was called with {', '.join(kwargs)}=…")
        if not isinstance(out, Tensor):
            raise TypeError(
                f"Woodbury needs a model that returns one tensor, its outputs; it returned {type(out).__name__}"
            )
        if not out.requires_grad:
            return
        done, seen = _Pass(tuple(a.detach() if isinstance(a, Tensor) else a for a in args)), self._seen

        def keep(gradient: Tensor) -> None:
            if any(other is done for other in seen):  # a second backward through the same pass: no new samples
                done.gradient = done.gradient + gradient.detach()
            else:
                done.gradient = gradient.detach()
                seen.append(done)

        out.register_hook(keep)

    def _is_functional(self, module: nn.Module, out) -> bool:
        """True for a pass of which p.grad gets nothing: inside a torch.func transform, or on other parameters."""
        # torch has no public name for "wrapped by a transform".
        if isinstance(out, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(out):
            return True
        own = {id(p) for group in self.param_groups for p in group["params"]}
        return not any(id(p) in own for p in module.parameters())

    def close(self) -> None:
        """Stop recording the model's forward passes (the optimizer is done)."""
        self._handle.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the passes behind the gradients that go are forgotten with them."""
        self._seen.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; ``closure`` re-evaluates the loss as for any torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if all(p.grad is None for p in params.values()):
            return loss
        direction = self._direction(params)
        lr_of = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        for name, p in params.items():
            if p not in lr_of:
                raise ValueError(
                    f"parameter {name!r} became trainable after Woodbury was made; make the optimizer again"
                )
        for name, p in params.items():
            if p.grad is not None:
                p.sub_(direction[name].to(p.dtype) * lr_of[p])
        self._seen.clear()
        return loss

    def _direction(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        x, r = self._samples()
        y, factors = layer_factors(self.model, x)
        masses = model_mass(factors, self.mass)
        blocks = resolve_blocks(factors, self.blocks)
        inners = step_systems(blocks, y, masses, self.scale, self.output_metric, self.solver)
        if self.check_step:
            self._check(inners, y)
        direction = woodbury_direction(blocks, inners, r, masses)
        for name, factor in blocks.items():
            remainder = self._remainder(factor, r, params)
            if remainder is not None:
                for p, extra in solve_metric(factor, inners[name], remainder, masses).items():
                    direction[p] = direction[p] + extra
        self.solves = {name: inner.last for name, inner in inners.items()}
        return direction

    def _samples(self) -> tuple[tuple, Tensor]:
        if not self._seen:
            raise ValueError(
                "step() found gradients but no forward pass of the model that received one since the last step or "
                "zero_grad; the metric needs its samples: run model(x), loss.backward(), step() in this order"
            )
        inputs = [as_inputs(seen.inputs) for seen in self._seen]
        x = tuple(torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*inputs, strict=True))
        return x, torch.cat([flatten_outputs(seen.gradient, len(seen.gradient)) for seen in self._seen])

    def _check(self, inners: dict[str, StepSystem], y: Tensor) -> None:
        # With S = I + c·L K Lᵀ every block L R Lᵀ = (I − S⁻¹)/c ≺ I/c, singular M included; not so for "mean-jacobian".
        n = len(y)
        c = 0.0 if self.scale == "mean-jacobian" else scale_factor(self.scale, n)
        bound = len(inners) / (c * n) if c else float("inf")
        lr = max(float(group["lr"]) for group in self.param_groups)

        def weighed() -> Tensor:
            H = sum(inner.expand(inner.self_kernel()) for inner in inners.values()) / n
            L = self.output_metric.factor(y)  # at c = 0 the inner systems do without it
            return H if L is None else apply_blocks(L, apply_blocks(L, H).mT)

        self.lambda_max = checked_rate(lr, bound, weighed)

    def _remainder(self, factor: Factor, r: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """p.grad − Jᵀr for one block, or None where it is rounding."""
        remainder, size, gap = {}, 0.0, 0.0
        for name, pulled in factor.vjp(r).items():
            grad = params[name].grad
            grad = torch.zeros_like(pulled) if grad is None else grad.to(pulled.dtype)
            remainder[name] = grad - pulled
            size, gap = size + grad.square().sum(), gap + remainder[name].square().sum()
        rounding = torch.finfo(r.dtype).eps ** 0.75
        return None if bool(gap <= rounding**2 * size) else remainder
