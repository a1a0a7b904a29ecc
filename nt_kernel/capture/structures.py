"""What nt_kernel knows of torch's functions: which of their arguments is a weight, and how a Jacobian follows from it.

The capture (``nt_kernel.capture.observe``) sees every call of a registered function on a trained parameter, whoever makes it:
a module, attention's fused projection, a function that borrows another layer's weight. From the call it keeps *features*
(what multiplies the parameter) and, by a zero shift of the call's output z, the sensitivities δ = ∂y/∂z. A
:class:`Structure` turns these into parts. ``structured`` adds a function of the user's own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from nt_kernel.capture.convolution import (
    CONVOLUTIONS,
    bind_convolution,
    convolution_parts,
    patch_deltas,
    patch_inputs,
    patch_sums,
)
from nt_kernel.capture.elementwise import bind_elementwise, bind_expand, elementwise_sums
from nt_kernel.capture.embedding import EmbeddingPart
from nt_kernel.capture.linear import LinearPart
from nt_kernel.products.forms import outer_sums

Piece = tuple[Tensor, Tensor]  # inputs [..., N, …] and deltas [..., N, C, …] of one call


@dataclass(frozen=True)
class Call:
    """One call of a registered function: what is multiplied, by which tensors, and what else shapes the result."""

    features: Callable[[], Tensor]
    weight: Any
    bias: Any = None
    options: tuple = ()


@dataclass(frozen=True)
class Names:
    """The trained tensors of a call (None: not trained, or absent) and the shape of its weight."""

    weight: str | None
    bias: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """How one family of functions depends on its parameters.

    bind: the function's own arguments → :class:`Call`; None where this use has no structure.
    inputs, deltas: (array, lead, site) → one call's features and δ in the form that the others take; they come with the
        samples behind ``lead`` stack dimensions (and, for δ, the outputs behind these).
    contract: (inputs, deltas, site) → the per-sample Jacobians Σ_s of weight and bias, [..., N, C, P] each (or None).
    parts: ([(inputs, deltas) of each call], names, options) → parts that keep inputs and δ; None to contract always.
    commutes: the weight may also come first.
    """

    kind: str
    bind: Callable[..., Call | None]
    inputs: Callable[[Tensor, int, Any], Tensor]
    deltas: Callable[[Tensor, int, Any], Tensor]
    contract: Callable[[Tensor, Tensor, Any], tuple[Tensor | None, Tensor | None]] | None
    parts: Callable[[list[Piece], Names, tuple], list] | None = None
    commutes: bool = False


_REGISTRY: dict[Any, Structure] = {}


def structure_of(function: Callable) -> Structure | None:
    """The structure registered for a function, or None."""
    return _REGISTRY.get(function)


def is_convolution(structure: Structure) -> bool:
    """True for torch's own convolutions (a user's function may bear the name)."""
    return structure.parts is convolution_parts


def structured(jacobian: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Callable], Callable]:
    """Decorator: give a function ``f(x, weight)`` of your own a structured Jacobian.

    ``jacobian(x, delta)`` receives the input x [N, …] and δ = ∂y_c/∂f(x, weight), [N, C, …], and returns the per-sample
    Jacobian ∂y/∂weight, [N, C, *weight.shape]. Like every other it is checked against autograd on the first use.

    >>> @structured(lambda x, delta: delta * x[:, None])
    ... def rescale(x, weight):
    ...     return x * weight
    >>> class Rescale(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gain = torch.nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return rescale(x, self.gain)
    >>> from nt_kernel import layer_factors
    >>> layer_factors(torch.nn.Sequential(Rescale(), torch.nn.Linear(3, 1)), torch.ones(2, 3))[1]["0"].kinds
    {'0.gain': 'rescale'}
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def visible(x, weight):
            if has_torch_function((x, weight)):
                return handle_torch_function(visible, (x, weight), x, weight)
            return function(x, weight)

        def contract(x: Tensor, delta: Tensor, site) -> tuple[Tensor, None]:
            J = jacobian(x, delta)
            if J.shape[:2] != delta.shape[:2] or tuple(J.shape[2:]) != site.weight_shape:
                raise ValueError(
                    f"the jacobian given for {function.__name__!r} returned shape {tuple(J.shape)}, expected "
                    f"[N, C, *weight.shape] = {(*delta.shape[:2], *site.weight_shape)}"
                )
            J = J.to(delta.dtype)
            return (J.flatten(2) if J.dim() > 2 else J[..., None]), None

        as_is = lambda t, lead, site: t  # noqa: E731
        _REGISTRY[visible] = Structure(
            function.__name__, lambda x, weight: Call(lambda: x, weight), as_is, as_is, contract
        )
        return visible

    return decorate


def merge_positions(t: Tensor, start: int, keep: int) -> Tensor:
    """Everything between dimension ``start`` and the last ``keep`` ones as one dimension of positions (1 if none).

    >>> merge_positions(torch.zeros(4, 2, 3, 5), 1, 1).shape, merge_positions(torch.zeros(4, 5), 1, 1).shape
    (torch.Size([4, 6, 5]), torch.Size([4, 1, 5]))
    """
    end = t.dim() - keep
    return t.unsqueeze(start) if start == end else t.flatten(start, end - 1)


def _token_inputs(x: Tensor, lead: int, site) -> Tensor:
    return merge_positions(x, lead + 1, 1)


def _token_deltas(delta: Tensor, lead: int, site) -> Tensor:
    return merge_positions(delta, lead + 2, 1)


def _outer_sums(inputs: Tensor, deltas: Tensor, site) -> tuple[Tensor, Tensor]:
    J = outer_sums(deltas, inputs)
    return (J.mT if site.options == ("transposed",) else J).flatten(-2), deltas.sum(-2)


def _linear_parts(pieces: list[Piece], names: Names, options: tuple) -> list:
    inputs, deltas = join_pieces(pieces)
    return [LinearPart(inputs, deltas, names.weight, names.bias, names.shape, transposed=options == ("transposed",))]


def join_pieces(pieces: list[Piece], feature_dims: int = 1) -> Piece:
    """All calls as one: their positions one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    features, deltas = zip(*pieces, strict=True)
    return torch.cat(features, -1 - feature_dims), torch.cat(deltas, -2)


def _bind_linear(input, weight, bias=None):
    if weight.dim() != 2:
        return None
    return Call(lambda: input, weight, bias)


def _bind_matmul(input, other, **rest):
    if rest or not isinstance(other, Tensor) or other.dim() != 2 or not isinstance(input, Tensor) or input.dim() < 2:
        return None
    return Call(lambda: input, other, options=("transposed",))


def _bind_embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return Call(lambda: input, weight, options=(padding_idx,))


def _embedding_parts(pieces: list[Piece], names: Names, options: tuple) -> list:
    rows, deltas = join_pieces([(merge_positions(rows, deltas.dim() - 3, 0), deltas) for rows, deltas in pieces], 0)
    if options[0] is not None:  # the padding row has no gradient
        deltas = deltas * (rows != options[0])[..., None, :, None]
    return [EmbeddingPart(rows, deltas, names.weight, names.shape)]


def _bind_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return Call(lambda: F.layer_norm(input, normalized_shape, None, None, eps), weight, bias, (len(normalized_shape),))


def _bind_rms_norm(input, normalized_shape, weight=None, eps=None):
    return Call(lambda: F.rms_norm(input, normalized_shape, None, eps), weight, None, (len(normalized_shape),))


def _trailing(arrange: Callable) -> Callable:
    return lambda t, lead, site: arrange(t.flatten(t.dim() - site.options[0]), lead, site)


def _channels_last(arrange: Callable) -> Callable:
    return lambda t, lead, site: arrange(t.movedim(-1 - site.options[0], -1), lead, site)


def _bind_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return Call(lambda: F.group_norm(input, num_groups, None, None, eps), weight, bias, (input.dim() - 2,))


def _bind_batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        return None
    normal = lambda: F.batch_norm(input, running_mean, running_var, None, None, False, 0.0, eps)  # noqa: E731
    return Call(normal, weight, bias, (input.dim() - 2,))


def _bind_instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats or running_mean is not None:
        return None
    return Call(lambda: F.instance_norm(input, eps=eps), weight, bias, (input.dim() - 2,))


def _gain_sums(x: Tensor, deltas: Tensor, site) -> tuple[Tensor, Tensor]:
    return (deltas * x[..., None, :, :]).sum(-2), deltas.sum(-2)


def _normalisation(bind: Callable, feature_order: Callable) -> Structure:
    return Structure("normalisation", bind, feature_order(_token_inputs), feature_order(_token_deltas), _gain_sums)


def _elementwise(bind: Callable) -> Structure:
    as_is = lambda t, lead, site: t  # noqa: E731
    return Structure("elementwise", bind, as_is, as_is, elementwise_sums, commutes=bind.func is bind_elementwise)


_LINEAR = Structure("linear", _bind_linear, _token_inputs, _token_deltas, _outer_sums, _linear_parts)
_MATMUL = replace(_LINEAR, bind=_bind_matmul)
_SUM = _elementwise(functools.partial(bind_elementwise, Call, False))
_PRODUCT = _elementwise(functools.partial(bind_elementwise, Call, True))
_TRAILING = {F.layer_norm: _bind_layer_norm, F.rms_norm: _bind_rms_norm}
_CHANNEL = {F.group_norm: _bind_group_norm, F.batch_norm: _bind_batch_norm, F.instance_norm: _bind_instance_norm}

_REGISTRY[F.linear] = _LINEAR
_REGISTRY |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _MATMUL)
_REGISTRY |= dict.fromkeys((torch.add, Tensor.add, Tensor.__radd__), _SUM)
_REGISTRY |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__rmul__), _PRODUCT)
_REGISTRY[Tensor.expand] = _elementwise(functools.partial(bind_expand, Call))
_REGISTRY[F.embedding] = Structure(
    "embedding", _bind_embedding, lambda t, lead, site: t, _token_deltas, None, _embedding_parts
)
_REGISTRY |= {
    f: Structure(
        "convolution",
        functools.partial(bind_convolution, Call, dims),
        patch_inputs,
        patch_deltas,
        patch_sums,
        convolution_parts,
    )
    for f, dims in CONVOLUTIONS.items()
}
_REGISTRY |= {f: _normalisation(bind, _trailing) for f, bind in _TRAILING.items()}
_REGISTRY |= {f: _normalisation(bind, _channels_last) for f, bind in _CHANNEL.items()}
