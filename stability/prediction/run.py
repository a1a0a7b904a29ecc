"""A run on S with its twins predicted beside it, step by step: ``TwinPredictor`` follows any loop of full-batch steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import run_model
from nt_kernel.capture.probe import split_state
from nt_kernel.errors import NumericalError, unknown_name
from nt_kernel.factors import layer_factors
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import model_mass, push_through, resolve_blocks, scale_factor
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from optim.steps.direction import step_systems, woodbury_direction
from optim.steps.step_limit import check_lr, checked_rate
from stability.loss_step import auto_step, rate_bound, rate_name, weighed_kernel
from stability.losses import Loss, PerSample, resolve_loss
from stability.prediction.blocks import SharedBlock
from stability.prediction.budget import MEMORY_LIMIT, candidates_at_once
from stability.prediction.states import Data, Divergence, OutputState, ParameterState, RunOutputs, View
from stability.prediction.strided import STRIDE, StridedState, run_stride, stride_at
from stability.replacement import Replacement, data_for
from stability.step_matrix import StepMatrix

METHODS = ("kernel-path", "strided-path", "parameter-path", "cg")
CG_TOLERANCE, CG_STEPS = 1e-12, 200  # of method "cg"
STRAYED = 1e-3  # a step that far from −lr·G⁻¹∇h, relative, is another optimizer's


@dataclass(frozen=True)
class Prediction:
    """What was predicted of R twins; n samples, p outputs, Q held-out points.

    ``pairs``: one dict per candidate, in the names of ``TwinResult.pairs``: "replaced" (k); suprema over the run of the
    divergence ``predicted_sup`` (largest |e_i| over S), ``predicted_l2``, ``predicted_replaced`` (i = k), ``predicted_others``
    (i ≠ k), ``predicted_heldout``; the same at the end, ``final_sup`` and so on.
    """

    pairs: list[dict]
    outputs: Tensor  # of the twins on the inputs of S at the end, [R, n, p]
    own_outputs: Tensor  # at their own z, [R, p]
    held_out_outputs: Tensor | None  # [R, Q, p]
    run_outputs: Tensor  # of the run on S, on S, [n, p]
    run_own_outputs: Tensor  # at the z of each candidate, [R, p]
    run_held_out_outputs: Tensor | None  # [Q, p]
    method: str

    def column(self, name: str) -> Tensor:
        """One entry of every pair, [R], float64."""
        return torch.tensor([pair[name] for pair in self.pairs], dtype=torch.float64)


class TwinPredictor:
    """The same beside a training loop of one's own: call :meth:`advance` before every step of ``model``.

    The run has to take full-batch steps θ ← θ − lr·G⁻¹∇h with the options given here (``optim.Woodbury`` does).

    >>> from optim import Woodbury
    >>> model = nn.Linear(2, 1).double()
    >>> x, a = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    >>> z = Replacement(0, torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    >>> predictor, opt = TwinPredictor(model, x, a, [z]), Woodbury(model, lr=0.1)
    >>> for _ in range(20):
    ...     _ = predictor.advance(lr=0.1)
    ...     opt.zero_grad()
    ...     (0.5 * (model(x) - a).square().sum(1).mean()).backward()
    ...     _ = opt.step()
    >>> len(predictor.result().pairs)
    1
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        targets: Tensor,
        candidates: Sequence[Replacement],
        *,
        mass: Mass = 1.0,
        output_metric: "str | OutputMetric | Callable" = "identity",
        scale: str = "mean",
        blocks: str = "layer",
        loss: "str | Loss | PerSample" = "squared",
        held_out: Tensor | None = None,
        method: str = "parameter-path",
        cg_steps: int = 2,
        stride: int = STRIDE,
        steps: int | None = None,
        memory_limit: int | None = None,
    ):
        self.loss = resolve_loss(loss)
        targets, candidates = data_for(self.loss, model, x, targets, candidates, held_out)
        _check(model, x, method, cg_steps, stride, steps)
        self.model, self.method, self.blocks = model, method, blocks
        self.c = scale_factor(scale, len(x))
        self.scale, self.metric = scale, resolve_output_metric(output_metric)
        if not self.metric.pointwise:
            raise ValueError(
                f"output_metric {self.metric.name!r} belongs to the samples it was made for (their targets or draws), and "
                "twins put another sample in place of one of them; take a metric that is a function of the outputs alone"
            )
        with torch.no_grad():
            y, factors = layer_factors(model, x)
        if y.shape[-1] != targets.shape[1]:
            raise ValueError(
                f"the model gives {y.shape[-1]} outputs, targets have {targets.shape[1]}; "
                f"expected targets [n, {y.shape[-1]}]"
            )
        self.loss.value(y, targets)  # one of one's own says here what is wrong with its shape
        self.mass = model_mass(factors, mass)
        self.block_count = len(resolve_blocks(factors, blocks))
        self.data, self._order = _sorted_data(x, targets, candidates, held_out)
        params, _ = split_state(model)
        self.state = _state(method, self.data, y, params, self.c, cg_steps)
        self._stride, self._steps, self._until, self._rate = (stride if method == "strided-path" else 1), steps, 0, 0.0
        Q = 0 if held_out is None else len(held_out)
        self._group = candidates_at_once(
            resolve_blocks(factors, blocks), self.mass, (len(x), len(candidates), Q, y.shape[-1]), y,
            copies={"kernel-path": 0, "strided-path": 2}.get(method, 1),
            limit=MEMORY_LIMIT if memory_limit is None else memory_limit,
        )  # fmt: skip
        self._largest: dict[str, Tensor] = {}
        self._left, self._expected = {}, {}
        self._step, self._blocks = 0, {}

    def auto_lr(self) -> float:
        """1/(κN) for N metric blocks, ∇²ℓ ⪯ κM (:func:`stability.loss_step.auto_step`)."""
        return auto_step(self.loss, self.metric, self.block_count, self.scale, self.data.targets)

    @property
    def kernel(self) -> Tensor:
        """H of the S run where :meth:`advance` last looked, [np, np]."""
        return kernel_of(self._blocks, len(self.data.x))

    def closed_loop(self, lr: float) -> StepMatrix:
        """A = I − lr·H∇²ℓ of the S run there."""
        sigma = self.loss.sigma(self.data.targets.shape[1])
        root = None if sigma is not None else self.loss.factor(self._y, self.data.targets)
        return StepMatrix(self.kernel, lr, sigma=sigma, root=root)

    @torch.no_grad()
    def advance(self, lr: float) -> dict[str, Tensor]:
        """Look at the run where it is, and take every twin one step of size ``lr`` further; call it before the run's own.

        Returns the direction G⁻¹∇h of the S run by parameter name. Raises ValueError where the last step was not along it.
        """
        check_lr(lr)
        params, fixed = split_state(self.model)
        self._check_path(params)
        if self._step < self._until:
            return self._follow(params, float(lr))
        self._blocks = {}  # those of the last step go before new ones are made
        view = self._view(float(lr))
        for rows, z in self._groups():
            y_z, z_factors = layer_factors(self.model, self.data.z_x[z])
            own = self.data.z[rows] - z.start
            e, seen = self._look(rows, fixed, RunOutputs(view.y, y_z[own], view.y_Q))
            self.state.advance(rows, view, e, seen, resolve_blocks(z_factors, self.blocks), own)
        self._blocks, self._y = view.blocks, view.y
        self._until, self._rate = self._step + view.stride, float(lr)
        return self._expect(params, view.direction, float(lr))

    def _follow(self, params: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
        """The direction of the run on S within a stride, in which the candidates have been taken along already."""
        if lr != self._rate:
            raise ValueError(
                f"a stride up to step {self._until} was taken at lr = {self._rate:g}, got lr = {lr:g} at step {self._step}; "
                'change lr between strides (predictor.next_look), or write method="parameter-path"'
            )
        y, factors = layer_factors(self.model, self.data.x)
        blocks = resolve_blocks(factors, self.blocks)
        systems = step_systems(blocks, y, self.mass, self.scale, self.metric)
        return self._expect(
            params, woodbury_direction(blocks, systems, self.loss.gradient(y, self.data.targets), self.mass), lr
        )

    def _expect(self, params: Mapping[str, Tensor], pulled: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
        """G⁻¹∇h = (1/n)D⁻¹Jᵀv, and where the run is to go by it."""
        direction = {name: g / len(self.data.x) for name, g in pulled.items()}
        self._left = {name: p.clone() for name, p in params.items()}
        self._expected = {name: p - lr * direction[name] for name, p in params.items()}
        self._step += 1
        return direction

    @torch.no_grad()
    def look(self) -> tuple[Divergence, RunOutputs]:
        """y' − y of all candidates where the run is now, in their order, and the run's own outputs y, z for z."""
        params, fixed = split_state(self.model)
        self._check_path(params)
        if self._step < self._until:
            raise ValueError(
                f"step {self._step} lies within a stride, whose candidates are at step {self._until} already; look there, or "
                "give TwinPredictor(steps=…) where the run ends"
            )
        data, state, back = self.data, {**params, **fixed}, torch.argsort(self._order)
        y, y_z = run_model(self.model, state, data.x), run_model(self.model, state, data.z_x)[data.z]
        y_Q = None if data.held_out is None else run_model(self.model, state, data.held_out)
        seen = [self._look(rows, fixed, RunOutputs(y, y_z[rows], y_Q))[0] for rows, _ in self._groups()]
        Q = None if y_Q is None else torch.cat([e.held_out for e in seen])[back]
        e = Divergence(torch.cat([e.S for e in seen])[back], torch.cat([e.z for e in seen])[back], Q)
        return e, RunOutputs(y, y_z[back], y_Q)

    def result(self) -> Prediction:
        """The predictions up to where the run is now."""
        e, run = self.look()
        back = torch.argsort(self._order)
        k = self.data.k[back]
        columns = {f"predicted_{name}": value[back] for name, value in self._largest.items()}
        columns |= {f"final_{name}": value for name, value in divergence_norms(e, k).items()}
        columns = {name: value.double().cpu().tolist() for name, value in columns.items()}
        pairs = [
            {"candidate": j, "replaced": index} | {name: values[j] for name, values in columns.items()}
            for j, index in enumerate(k.tolist())
        ]
        held_out = None if e.held_out is None else run.held_out + e.held_out
        return Prediction(pairs, run.S + e.S, run.z + e.z[:, 0], held_out, run.S, run.z, run.held_out, self.method)

    def _groups(self) -> Iterator[tuple[slice, slice]]:
        """Candidates that go together, and the rows of ``z_x`` they need."""
        for start in range(0, len(self.data.k), self._group):
            rows = slice(start, min(start + self._group, len(self.data.k)))
            own = self.data.z[rows]
            yield rows, slice(int(own[0]), int(own[-1]) + 1)

    def _look(self, rows: slice, fixed, run: RunOutputs):
        """The divergence of the candidates ``rows``, taken into the suprema, and what their next step needs."""
        e, seen = self.state.look(rows, self.model, fixed, self.mass, run)
        for name, value in divergence_norms(e, self.data.k[rows]).items():
            if not bool(torch.isfinite(value).all()):
                raise NumericalError("the predicted divergence is not finite", where=f"step {self._step}")
            largest = self._largest.setdefault(name, value.new_zeros(len(self.data.k)))
            largest[rows] = torch.maximum(largest[rows], value)
        return e, seen

    def _view(self, lr: float) -> View:
        data, where = self.data, f"step {self._step}: "
        y, factors = layer_factors(self.model, data.x)
        y_Q, seen = (None, {}) if data.held_out is None else layer_factors(self.model, data.held_out)
        held_out = resolve_blocks(seen, self.blocks) if seen else {}
        blocks = {
            name: SharedBlock(f, held_out.get(name), len(y), self.mass, self.c, self.metric, y, where)
            for name, f in resolve_blocks(factors, self.blocks).items()
        }
        self._check_step(lr, y, blocks, where)
        r = self.loss.gradient(y, data.targets)
        duals = {name: block.dual_of_run(r) for name, block in blocks.items()}
        direction: dict[str, Tensor] = {}
        for name, block in blocks.items():
            direction |= push_through(block.factor, duals[name], self.mass)
        g, rate = self._next_stride(), lr / len(y)
        summed = (
            run_stride(blocks, y, self.loss.gradient, data.targets, rate, g, self.mass)
            if self.method == "strided-path"
            else None
        )
        return View(self.metric, self.loss.gradient, rate, y, y_Q, blocks, duals, direction, g, summed)

    def _next_stride(self) -> int:
        g = stride_at(self._step, self._stride)
        return g if self._steps is None else max(1, min(g, self._steps - self._step))

    @property
    def next_look(self) -> int:
        """The step at which the candidates and the run are together again: always the next, but for "strided-path"."""
        return max(self._until, self._step)

    def _check_step(self, lr: float, y: Tensor, blocks: Mapping[str, SharedBlock], where: str) -> None:
        bound = rate_bound(self.loss, self.metric, self.block_count, len(y), self.c, y)

        def kernel() -> Tensor:
            return weighed_kernel(self.loss, kernel_of(blocks, len(y)), y, self.data.targets)

        checked_rate(lr, bound, kernel, where.rstrip(": "), rate=rate_name(self.loss))

    def _check_path(self, params: Mapping[str, Tensor]) -> None:
        """The predictions hold for the run that was announced: θ_{t+1} = θ_t − lr·G⁻¹∇h."""
        if not self._expected:
            return
        gap = sum((params[name] - to).square().sum() for name, to in self._expected.items()).sqrt()
        size = sum((self._left[name] - to).square().sum() for name, to in self._expected.items()).sqrt()
        rounding = sum(p.square().sum() for p in params.values()).sqrt() * torch.finfo(gap.dtype).eps
        if not bool(gap <= STRAYED * size + rounding):
            raise ValueError(
                f"the step after advance() number {self._step} was not −lr·G⁻¹∇h: off by {(gap / size).item():.2g} of its "
                "length; twins are predicted along full-batch metric steps with the options of TwinPredictor only"
            )


def kernel_of(blocks: Mapping[str, SharedBlock], n: int) -> Tensor:
    """H of the S run on S, [np, np]."""
    return sum(b.inner.expand(b.inner.self_kernel()) for b in blocks.values()) / n


def divergence_norms(e: Divergence, k: Tensor) -> dict[str, Tensor]:
    """|e_i| at the points of S: "sup", "l2", "replaced" (i = k), "others" (i ≠ k; 0 for n = 1), and "heldout", each [R]."""
    norms = e.S.norm(dim=-1)  # [R, n]
    own = torch.zeros_like(norms, dtype=torch.bool)
    own[torch.arange(len(k), device=k.device), k] = True
    found = {
        "sup": norms.amax(-1),
        "l2": e.S.flatten(1).norm(dim=-1),
        "replaced": norms[own],
        "others": norms.masked_fill(own, 0).amax(-1),
    }
    return found if e.held_out is None else found | {"heldout": e.held_out.norm(dim=-1).amax(-1)}


def _sorted_data(x: Tensor, targets: Tensor, candidates: Sequence[Replacement], held_out) -> tuple[Data, Tensor]:
    """The data with equal z together, and the place each sorted candidate came from."""
    every = torch.stack([z.x for z in candidates])
    z_x, z = torch.unique(every, dim=0, return_inverse=True)
    order = torch.argsort(z, stable=True)
    k = torch.tensor([c.index for c in candidates], device=x.device)
    z_targets = torch.stack([c.target for c in candidates])[:, None]
    return Data(x, targets, k[order], z[order], z_x, z_targets[order], held_out), order


def _state(method: str, data: Data, y: Tensor, params: Mapping[str, Tensor], c: float, cg_steps: int):
    """What is carried along for the candidates."""
    if method == "kernel-path":
        return OutputState(data, y)
    if method == "strided-path":
        return StridedState(data, params, c, cg_steps)
    return ParameterState(data, params, c, *((CG_STEPS, CG_TOLERANCE) if method == "cg" else (cg_steps, 0.0)))


def _check(model, x, method, cg_steps, stride, steps) -> None:
    if method not in METHODS:
        raise ValueError(unknown_name("method", method, METHODS))
    if isinstance(cg_steps, bool) or not isinstance(cg_steps, int) or cg_steps < 0:
        raise ValueError(f"cg_steps must be an int >= 0, got {cg_steps!r}")
    for name, value in (("stride", stride), *([] if steps is None else [("steps", steps)])):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    parameter = next(iter(model.parameters()), None)
    if parameter is not None and (parameter.dtype, parameter.device) != (x.dtype, x.device):
        raise TypeError(
            f"the model is {parameter.dtype} on {parameter.device}, x is {x.dtype} on {x.device}; move one to the other"
        )
