"""One pass over a model: outputs, inputs and output sensitivities of its linear layers, Jacobians of everything else.

``observe`` is a pure function of parameters and inputs (``torch.func`` throughout), so that it runs under ``vmap`` over
stacked twins. What it captures of which layer is fixed beforehand in a :class:`Plan` (``nt_kernel.plan`` makes it).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nt_kernel.errors import NumericalError

_OBSERVING: ContextVar[bool] = ContextVar("nt_kernel_observing", default=False)


@dataclass(frozen=True)
class LinearSite:
    """A linear layer with structure: which of its tensors are trained, and the shape of one sample's pre-activation."""

    weight: str | None
    bias: str | None
    shape: tuple[int, ...]  # (…, o)
    is_output: bool = False  # its output is the model's: δ is the identity and need not be computed


@dataclass(frozen=True)
class Plan:
    """How each trainable parameter is seen: ``linear`` by structure, ``explicit`` by its per-sample Jacobian.

    ``layers`` maps every layer to its parameters, in ``named_parameters()`` order.
    """

    layers: dict[str, tuple[str, ...]]
    linear: dict[str, LinearSite] = field(default_factory=dict)
    explicit: tuple[str, ...] = ()
    output: Callable | None = None


@dataclass(frozen=True)
class Observation:
    """Outputs [N, C]; by layer the inputs [N, …, d] and sensitivities [N, C, …, o]; by parameter the Jacobian [N, C, P]."""

    outputs: Tensor
    inputs: dict[str, Tensor]
    deltas: dict[str, Tensor]
    jacobians: dict[str, Tensor]


def observing() -> bool:
    """True while a model runs for the sake of its factors: hooks that record training passes look here and stay out."""
    return _OBSERVING.get()


@contextmanager
def _observation() -> Iterator[None]:
    token = _OBSERVING.set(True)
    try:
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


def run_model(model: nn.Module, state: dict[str, Tensor], x, output: Callable | None = None) -> Tensor:
    """The model's outputs as [N, C], run functionally on ``state`` (parameters and buffers by name)."""
    N = as_inputs(x)[0].shape[0]
    with _observation():
        y = torch.func.functional_call(model, state, as_inputs(x))
    return flatten_outputs(y, N, output)


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
    return y.reshape(N, -1)


def check_finite(x, y: Tensor) -> None:
    """Raise where the outputs y [N, C] are NaN or infinite: ValueError when x is to blame, else NumericalError."""
    if bool(y.isfinite().all()):
        return
    for t in as_inputs(x):
        if isinstance(t, Tensor) and not bool(t.isfinite().all()):
            rows = (~t.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"x must be finite; it holds NaN or inf in {len(rows)} of {len(t)} samples, first in sample {rows[0]}"
            )
    sample = int((~y.isfinite()).any(1).nonzero()[0])
    raise NumericalError(
        f"the model's output is not finite at sample {sample} (did training diverge?)", where="forward"
    )


def observe(model: nn.Module, plan: Plan, params: dict[str, Tensor], buffers: dict[str, Tensor], x) -> Observation:
    """See the model to first order at ``params``; pure, and safe under ``torch.func.vmap``.

    A zero added to each captured pre-activation z makes ∂y/∂z a vector-Jacobian product that needs no parameter
    gradient; one product per output serves all samples, because samples do not interact.
    """
    N = as_inputs(x)[0].shape[0]
    state = {**params, **buffers}
    like = next(iter(params.values()))

    def perturbed(shift: dict[str, Tensor]):
        inputs: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for layer in plan.linear:
                hook = _capture_hook(layer, inputs, shift.get(layer))
                handle = submodule(model, layer).register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            return run_model(model, state, x, plan.output), inputs

    shift = {n: like.new_zeros(N, *site.shape) for n, site in plan.linear.items() if not site.is_output}
    deltas: dict[str, Tensor] = {}
    if shift:
        y, pull_back, inputs = torch.func.vjp(perturbed, shift, has_aux=True)
        unit = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, None, :].expand(-1, N, -1)  # [C, N, C]
        (pulled,) = torch.func.vmap(pull_back)(unit)  # [C, N, …, o]
        deltas = {layer: delta.movedim(0, 1) for layer, delta in pulled.items()}
    else:
        y, inputs = perturbed(shift)
    return Observation(y, inputs, deltas, _explicit_jacobians(model, plan, state, x))


def submodule(model: nn.Module, layer: str) -> nn.Module:
    """The module behind a layer name ("." is the root)."""
    return model.get_submodule("" if layer == "." else layer)


def _capture_hook(layer: str, inputs: dict[str, Tensor], shift: Tensor | None):
    def hook(module, args, kwargs, out):
        inputs[layer] = args[0] if args else kwargs["input"]
        return out if shift is None else out + shift

    return hook


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
    return {name: J.flatten(2) if J.dim() > 2 else J[..., None] for name, J in jacobians.items()}
