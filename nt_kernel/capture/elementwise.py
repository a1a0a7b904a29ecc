"""Parameters that are added, multiplied or repeated entry by entry: positions, class tokens, gains of a residual branch.

z = x + θ, z = x·θ or z = θ expanded, with θ broadcast against z: ∂y_c/∂θ is δ, times x for a product, summed over the
dimensions along which θ was repeated."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def bind_elementwise(call: Callable, times: bool, input, other, **rest):
    """x + θ or x·θ (``call``: :class:`nt_kernel.capture.structures.Call`); None where one operand is a number or x complex."""
    if rest or not isinstance(input, Tensor) or not isinstance(other, Tensor) or input.is_complex():
        return None
    shape = torch.broadcast_shapes(input.shape, other.shape)
    return call(lambda: input.expand(shape), other, options=(times,))


def bind_expand(call: Callable, weight, *sizes, **rest):
    """θ repeated along new or single dimensions."""
    return None if rest else call(lambda: weight.expand(*sizes), weight, options=(False,))


def repeats_over_samples(weight_shape: Sequence[int], shape: Sequence[int], axis: int) -> bool:
    """True where θ is the same for all samples: dimension ``axis`` of the result is not one of its own.

    >>> repeats_over_samples((4, 3), (5, 4, 3), 0), repeats_over_samples((4, 3), (4, 3), 0)
    (True, False)
    """
    own = axis - (len(shape) - len(weight_shape))
    return own < 0 or weight_shape[own] == 1


def elementwise_sums(x: Tensor, delta: Tensor, site) -> tuple[Tensor, None]:
    """∂y/∂θ [N, C, P] of one call, x [N, …] and δ [N, C, …]."""
    (times,) = site.options
    if times:
        delta = delta * x[:, None]
    own = [1] * (len(site.shape) - len(site.weight_shape)) + list(site.weight_shape)
    if not site.layout.fold:  # the samples' dimension is gone; of a folded one the positions are left
        del own[site.layout.axis]
    repeated = [k + 2 for k, size in enumerate(own) if size == 1]
    if repeated:
        delta = delta.sum(repeated, keepdim=True)
    return (delta.flatten(2) if own else delta[..., None]), None
