"""One pass over a model: outputs, features and output sensitivities of its weights, Jacobians of everything else.

``observe`` is a pure function of parameters and inputs (``torch.func`` throughout), so that it runs under ``vmap`` over
stacked twins. What it captures is fixed beforehand in a :class:`Plan` (``nt_kernel.capture.plan`` makes it).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.structures import Call, Structure
from nt_kernel.capture.transparent import uncompiled
from nt_kernel.capture.watch import Watch
from nt_kernel.errors import NumericalError

_OBSERVING: ContextVar[bool] = ContextVar("nt_kernel_observing", default=False)


@dataclass(frozen=True)
class Layout:
    """Where the samples are in a call's arrays: dimension ``axis``, alone or folded with T positions.

    ``fold`` is "" ([…, N, …]), "samples" (N·T, sample by sample) or "positions" (T·N, position by position).
    """

    axis: int
    fold: str = ""

    def samples_first(self, t: Tensor, N: int, lead: int) -> Tensor:
        """[lead…, as called] → [lead…, N, …].

        >>> Layout(0, "positions").samples_first(torch.tensor([0, 1, 0, 1]), 2, 0)
        tensor([[0, 0],
                [1, 1]])
        """
        axis = lead + self.axis
        if self.fold:
            sizes = (N, -1) if self.fold == "samples" else (-1, N)
            t = t.unflatten(axis, sizes)
            axis += self.fold == "positions"
        return t.movedim(axis, lead)


@dataclass(frozen=True)
class Site:
    """One captured call: the ``index``-th call of a registered function on trained parameters.

    ``weight`` and ``bias`` are the full names of the tensors it explains (None: not trained, or explained otherwise);
    ``shape`` is that of the call's output.
    """

    index: int
    structure: Structure
    weight: str | None
    bias: str | None
    weight_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layout: Layout
    options: tuple
    is_output: bool = False  # its output is the model's: δ is the identity and need not be computed
    contracted: bool = False  # its per-sample Jacobian is formed at once, δ is not kept


@dataclass(frozen=True)
class Plan:
    """How each trainable parameter is seen: by the calls that use it, by its per-sample Jacobian (``explicit``), not at all.

    ``layers`` maps every layer to its parameters, in ``named_parameters()`` order.
    """

    layers: dict[str, tuple[str, ...]]
    sites: tuple[Site, ...] = ()
    explicit: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    output: Callable | None = None
    calls: tuple[tuple, ...] = ()  # what the forward pass did when the plan was made (``Watch.path``)
    final: int | None = None  # the call whose untouched result the model returned
    volatile: bool = False  # the forward selects or sorts by its data: where the samples are is checked on every use


class StalePlan(ValueError):
    """The forward pass did something else than when its plan was made."""


@dataclass(frozen=True)
class Observation:
    """Outputs [N, C]; by call the features and sensitivities [C, …] as called, or where these are contracted the
    Jacobians of "weight" and "bias" [N, C, P]; by parameter the explicit Jacobian [N, C, P]."""

    outputs: Tensor
    features: dict[int, Tensor]
    deltas: dict[int, Tensor]
    sums: dict[int, dict[str, Tensor]]
    jacobians: dict[str, Tensor]


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

    A zero added to the output z of each captured call makes ∂y/∂z a vector-Jacobian product that needs no parameter
    gradient; one product per output serves all samples, because samples do not interact.
    """
    N = batch_size(x)
    state = {**params, **buffers}
    like = next(iter(params.values()))
    names = {id(value): name for name, value in params.items()}
    sites = {site.index: site for site in plan.sites}

    def perturbed(shift: dict[int, Tensor]):
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
            return out + shift[index].to(out.dtype) if index in shift else out

        watch = Watch(names, see)
        out = call_model(model, state, x, watch)
        newly_hidden = watch.hidden - set(plan.explicit)  # an unused one among them
        another_end = any(site.is_output for site in plan.sites) and watch.final(out) != plan.final
        if len(watch.path) < len(plan.calls) or newly_hidden or another_end:
            raise StalePlan(_another_path(plan, len(watch.path), next(iter(newly_hidden), None)))
        return flatten_outputs(out, N, plan.output), features

    shift = {i: like.new_zeros(()).expand(site.shape) for i, site in sites.items() if not site.is_output}
    deltas, sums = {}, {}
    if shift:
        y, pull_back, features = torch.func.vjp(perturbed, shift, has_aux=True)
        size = sum(zero.numel() for zero in shift.values())
        deltas, sums = _sensitivities(pull_back, y, Contraction(plan.sites, features, N), size)
        features = {i: f for i, f in features.items() if i not in sums}
    else:
        y, features = perturbed(shift)
    return Observation(y, features, deltas, sums, _explicit_jacobians(model, plan, state, x))


# From this many entries of all δ of one output on, a pass for each output is faster than one batched pass for all: what it
# works on stays in the cache, and no derivative is expanded by its batching rule.
ONE_BY_ONE = 2**18


class Contraction:
    """Per-sample Jacobians of weight and bias out of the δ of the contracted calls."""

    def __init__(self, sites: Sequence[Site], features: dict[int, Tensor], N: int):
        self.N, self.sites, self.wanted = N, {}, {}
        for site in sites:
            if site.contracted:
                self.sites[site.index] = site
                sides = self.wanted.setdefault(site.index, set())  # two sites where weight and bias go separate ways
                sides |= {side for side, name in (("weight", site.weight), ("bias", site.bias)) if name}
        self.inputs = {
            i: site.structure.inputs(site.layout.samples_first(features[i], N, 0), 0, site)
            for i, site in self.sites.items()
        }

    def __call__(self, deltas: dict[int, Tensor]) -> dict[int, dict[str, Tensor]]:
        """{call: {"weight": J, "bias": J}}, [N, C, P] each; takes the δ [C, …] it uses out of ``deltas``."""
        sums = {}
        for i, site in self.sites.items():
            delta = site.layout.samples_first(deltas.pop(i), self.N, 1).movedim(0, 1)
            both = site.structure.contract(self.inputs[i], site.structure.deltas(delta, 0, site), site)
            sums[i] = {side: J for side, J in zip(("weight", "bias"), both, strict=True) if side in self.wanted[i]}
        return sums


def _sensitivities(pull_back: Callable, y: Tensor, contraction: Contraction, size: int) -> tuple[dict, dict]:
    """∂y_{ic}/∂z of every call for every output, [C, …], and what the contraction makes of the others.

    ``size`` is the number of entries of all δ of one output.
    """
    N, C = y.shape
    if C == 1:
        deltas = {i: delta[None] for i, delta in pull_back(torch.ones_like(y))[0].items()}
        return deltas, contraction(deltas)
    unit = torch.eye(C, dtype=y.dtype, device=y.device)[:, None, :].expand(-1, N, -1)  # [C, N, C]
    if size < ONE_BY_ONE:
        deltas = torch.func.vmap(pull_back)(unit)[0]
        return deltas, contraction(deltas)
    kept: dict[int, list[Tensor]] = {}
    sums: list[dict[int, dict[str, Tensor]]] = []
    for one in unit:
        found = pull_back(one)[0]
        contracted = {i: found.pop(i)[None] for i in contraction.sites}
        sums.append(contraction(contracted))
        for i, delta in found.items():
            kept.setdefault(i, []).append(delta)
    joined = {
        i: {side: torch.cat([each[i].pop(side) for each in sums], 1) for side in sides}
        for i, sides in contraction.wanted.items()
    }
    return {i: _stacked(deltas) for i, deltas in kept.items()}, joined


def _stacked(deltas: list[Tensor]) -> Tensor:
    """[C, …] whose memory keeps the order of the entries, with the outputs just outside the innermost dimension.

    That is [N, positions, C, features] for a convolution in channels-last format: what its products want to read.
    """
    try:
        order = sorted(range(deltas[0].dim()), key=deltas[0].stride, reverse=True)
    except RuntimeError:  # a tensor wrapped by vmap has no strides
        return torch.stack(deltas)
    stacked = torch.stack([delta.permute(order) for delta in deltas], -2)
    back = [order.index(k) for k in range(len(order))]
    last = len(order) - 1
    return stacked.permute(last, *(k + (k == last) for k in back))


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
