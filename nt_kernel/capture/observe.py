"""One pass over a model: outputs, features and output sensitivities of its weights, Jacobians of everything else.

``observe`` is a pure function of parameters and inputs: by ``torch.func`` under ``vmap`` over stacked twins, by autograd's own
engine where nothing is stacked. What it captures is fixed beforehand in a :class:`Plan` (``nt_kernel.capture.plan`` makes it).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor, nn

from nt_kernel.capture.chain import chain_sensitivities, linear_chain, slope
from nt_kernel.capture.contraction import Contraction
from nt_kernel.capture.sensitivities import Functional, PullBack, Tape, sensitivities
from nt_kernel.capture.site import Observation, Plan, StalePlan
from nt_kernel.capture.structures import Call, Structure
from nt_kernel.capture.transparent import uncompiled
from nt_kernel.capture.watch import Watch, transform_level
from nt_kernel.errors import NumericalError

_OBSERVING: ContextVar[bool] = ContextVar("nt_kernel_observing", default=False)


def observing() -> bool:
    """True while a model runs for the sake of its factors: hooks that record training passes look here and stay out."""
    return _OBSERVING.get()


@contextmanager
def _observation() -> Iterator[None]:
    token = _OBSERVING.set(True)
    try:
        with uncompiled():
            yield
    finally:
        _OBSERVING.reset(token)


def as_inputs(x) -> tuple:
    """The positional inputs of the model: a tensor alone, or a tuple of them."""
    return x if isinstance(x, tuple) else (x,)


def batch_size(x) -> int:
    """N, the first dimension of every tensor among the inputs.

    >>> batch_size((torch.zeros(3, 2), torch.zeros(3)))
    3
    """
    sizes = {t.shape[0] if t.dim() else None for t in as_inputs(x) if isinstance(t, Tensor)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"x must hold tensors with one common first dimension N >= 1 (samples), got {sorted(map(str, sizes))}"
        )
    return sizes.pop()


def select_samples(x, which) -> tuple:
    """The inputs at some samples (a slice or an index list); what is not a tensor stays."""
    return tuple(t[which] if isinstance(t, Tensor) else t for t in as_inputs(x))


def run_model(
    model: nn.Module,
    state: dict[str, Tensor],
    x,
    output: Callable | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """The model's outputs as [N, C], run functionally on ``state`` (parameters and buffers by name)."""
    N = batch_size(x)
    return flatten_outputs(call_model(model, state, x, watch), N, output)


def call_model(model: nn.Module, state: dict[str, Tensor], x, watch: Watch | None = None):
    """What the model returns, run functionally and observed."""
    with _observation(), watch or Watch():
        # Not tie_weights=True: a module registered under two names would get its tensors back in the wrong places.
        return torch.func.functional_call(model, _every_slot(model, state), as_inputs(x), tie_weights=False)


def _every_slot(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` (every tensor under its first name) under the name of every slot of every module, each module once."""
    first: dict[int, Tensor] = {}
    slots: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, held in own.items():
                if held is None:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                value = first.setdefault(id(held), state[full]) if full in state else first.get(id(held))
                if value is not None:
                    slots[full] = value
    return slots


def flatten_outputs(y, N: int, output: Callable | None = None) -> Tensor:
    """[N] counts as [N, 1], [N, …] is flattened to [N, C]; anything but a tensor needs ``output``, which selects one."""
    if output is not None:
        y = output(y)
    if not isinstance(y, Tensor):
        raise TypeError(f"the model returned {type(y).__name__}, not a tensor; pass output=callable that selects one")
    if y.dim() == 0 or y.shape[0] != N:
        raise ValueError(
            f"the model returned shape {tuple(y.shape)} for {N} samples; the first dimension must be the samples"
        )
    if not y.is_floating_point() or y.numel() == 0:
        raise ValueError(
            f"the model returned {y.dtype} of shape {tuple(y.shape)}; factors need real floating-point outputs, at least one "
            "for each sample"
        )
    return y.reshape(N, -1)


def check_finite(x, y: Tensor) -> None:
    """Raise where the outputs y [N, C] are NaN or infinite: ValueError when x is to blame, else NumericalError."""
    if bool(y.isfinite().all()):
        return
    for t in as_inputs(x):
        if isinstance(t, Tensor) and not bool(t.isfinite().all()):
            rows = (~t.isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"x must be finite; it holds NaN or inf in {len(rows)} of {len(t)} samples, first in sample {rows[0]}"
            )
    sample = int((~y.isfinite()).any(1).nonzero()[0])
    raise NumericalError(
        f"the model's output is not finite at sample {sample} (did training diverge?)", where="forward"
    )


def observe(model: nn.Module, plan: Plan, params: dict[str, Tensor], buffers: dict[str, Tensor], x) -> Observation:
    """See the model to first order at ``params``; pure, and safe under ``torch.func.vmap``.

    What is differentiated by is the output z of each captured call: a vector-Jacobian product that needs no parameter
    gradient; one product per output serves all samples, because samples do not interact.
    """
    state = {**params, **buffers}
    like = next(iter(params.values()))
    by_autograd = transform_level() is None and not any(map(_followed, (*state.values(), *as_inputs(x))))
    if by_autograd:
        y, features, deltas, sums = _by_autograd(model, plan, params, state, x, like)
    else:
        y, features, deltas, sums = _by_transform(model, plan, params, state, x, like)
    features = {i: f for i, f in features.items() if i not in sums}
    return Observation(y, features, deltas, sums, _explicit_jacobians(model, plan, state, x))


def _followed(t) -> bool:
    """True where the graph that autograd would record is the caller's own, or cannot be recorded."""
    return isinstance(t, Tensor) and (t.requires_grad or t.is_inference())


def is_chain(model: nn.Module, plan: Plan, params: dict[str, Tensor], buffers: dict[str, Tensor], x) -> bool:
    """True where the model is a perceptron, whose sensitivities the chain rule gives (``nt_kernel.capture.chain``)."""
    inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in as_inputs(x))
    state, tape = {**params, **buffers}, Tape(plan.sites, next(iter(params.values())))
    if transform_level() is not None or any(map(_followed, (*state.values(), *inputs))):
        return False
    with _recording():
        _, recorded = _forward(model, plan, params, state, inputs, tape.through)
        return linear_chain(plan.sites, recorded, tape.edges)


def _by_autograd(model: nn.Module, plan: Plan, params, state, x, like: Tensor) -> tuple:
    with _recording():
        for cut in (True, False) if plan.chain else (False,):  # again, should it not be a chain any more
            tape = Tape(plan.sites, like)
            y, recorded = _forward(model, plan, params, state, x, tape.through, cut)
            if not cut or linear_chain(plan.sites, recorded, tape.edges):
                break
        features = {i: f.detach() for i, f in recorded.items()}
        if cut:
            inner, after = plan.sites[:-1], plan.sites[1:]
            slopes = [slope(recorded[b.index], tape.edges[s.index]) for s, b in zip(inner, after, strict=True)]
            found = chain_sensitivities([state[b.weight] for b in after], slopes)
            deltas = {site.index: delta.transpose(0, 1) for site, delta in zip(inner, found, strict=True)}
            return y.detach(), features, deltas, {}
        del recorded
        tape.y = y
        found = _sensitivities_of(tape, y.detach(), plan, features)
    return y.detach(), features, *found


@contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
        yield


def _by_transform(model: nn.Module, plan: Plan, params, state, x, like: Tensor) -> tuple:
    def perturbed(shift: dict[int, Tensor]):
        through = lambda i, out: out + shift[i].to(out.dtype) if i in shift else out  # noqa: E731
        return _forward(model, plan, params, state, x, through)

    shift = {s.index: like.new_zeros(()).expand(s.shape) for s in plan.sites if not s.is_output}
    if not shift:
        return *perturbed(shift), {}, {}
    y, pull_back, features = torch.func.vjp(perturbed, shift, has_aux=True)
    return y, features, *_sensitivities_of(Functional(pull_back), y, plan, features)


def _sensitivities_of(pull_back: PullBack, y: Tensor, plan: Plan, features: dict[int, Tensor]) -> tuple[dict, dict]:
    shapes = {site.index: site.shape for site in plan.sites if not site.is_output}
    if not shapes:
        return {}, {}
    contraction = Contraction(plan.sites, features, len(y))
    return sensitivities(pull_back, y, contraction, sum(map(prod, shapes.values())))


def _forward(
    model: nn.Module, plan: Plan, params, state, x, through: Callable[[int, Tensor], Tensor], cut: bool = False
) -> tuple:
    """Outputs [N, C] and features by call, of a pass that is found to be the plan's; ``through(index, out)`` is what the
    model goes on with after a captured call."""
    like = next(iter(params.values()))
    sites = {site.index: site for site in plan.sites}
    features: dict[int, Tensor] = {}

    def see(index: int, structure: Structure, call: Call, weight, bias, out: Tensor) -> Tensor:
        site = sites.get(index)
        known = index < len(plan.calls) and plan.calls[index] == (structure, weight, bias, call.options)
        if not known or (site is not None and site.shape != tuple(out.shape)):
            raise StalePlan(_another_path(plan, index, weight or bias))
        if site is None:
            return out
        seen = call.features()
        features[index] = seen.to(like.dtype) if seen.is_floating_point() else seen
        return through(index, out)

    watch = Watch({id(value): name for name, value in params.items()}, see, cut)
    out = call_model(model, state, x, watch)
    newly_hidden = watch.hidden - set(plan.explicit)  # an unused one among them
    another_end = any(site.is_output for site in plan.sites) and watch.final(out) != plan.final
    if len(watch.path) < len(plan.calls) or newly_hidden or another_end:
        raise StalePlan(_another_path(plan, len(watch.path), next(iter(newly_hidden), None)))
    return flatten_outputs(out, batch_size(x), plan.output), features


# Like torch.func: what is saved for the backward passes is saved for all of them.
_NO_HOOKS = "layer factors cannot follow saved tensor hooks (activation checkpointing?)"


def _another_path(plan: Plan, index: int, name: str | None) -> str:
    was = (plan.calls[index][1] or plan.calls[index][2]) if index < len(plan.calls) else None
    return (
        f"the model's forward took another path than a moment ago: where {was!r} was used, now {name!r} is; a forward that "
        "changes from call to call has no fixed layer factors"
    )


def _explicit_jacobians(model: nn.Module, plan: Plan, state: dict[str, Tensor], x) -> dict[str, Tensor]:
    if not plan.explicit:
        return {}
    chosen = {name: state[name] for name in plan.explicit}
    fixed = {name: value for name, value in state.items() if name not in chosen}

    def one_sample(values: dict[str, Tensor], *xi) -> Tensor:
        alone = tuple(t[None] if isinstance(t, Tensor) else t for t in xi)
        return run_model(model, {**fixed, **values}, alone, plan.output)[0]

    args = as_inputs(x)
    dims = tuple(0 if isinstance(t, Tensor) else None for t in args)
    # Reverse mode: some fused kernels (attention on CPU) have no forward derivative.
    jacobians = torch.func.vmap(torch.func.jacrev(one_sample), in_dims=(None, *dims))(chosen, *args)
    # A real parameter in complex arithmetic gets a complex Jacobian of a real output, its imaginary part zero.
    jacobians = {name: J.real if J.is_complex() else J for name, J in jacobians.items()}
    return {name: J.flatten(2) if J.dim() > 2 else J[..., None] for name, J in jacobians.items()}
