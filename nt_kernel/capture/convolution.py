"""Convolutions as linear layers on patches: z_{i,s} = W·P_{i,s}, with P [..., N, T, c·k…] the patches under the kernel.

Padding modes other than zeros need no word here: torch pads the input before it calls the convolution. A grouped
convolution has one small weight per group; its per-sample Jacobian Σ_s δ_s ⊗ P_s is formed."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from nt_kernel.capture.linear import LinearPart
from nt_kernel.products.forms import outer_sums

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def bind_convolution(call, dims: int, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A call of ``F.conv{dims}d`` (``call`` is :class:`nt_kernel.capture.structures.Call`); None for an unbatched input."""
    if input.dim() != dims + 2:
        return None
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    kernel = tuple(weight.shape[2:])
    return call(lambda: input, weight, bias, (kernel, stride, _padding(padding, kernel, dilation), dilation, groups))


def _each(value, dims: int) -> tuple[int, ...]:
    value = tuple(value) if isinstance(value, tuple | list) else (value,)
    return value * dims if len(value) == 1 else value


def _padding(padding, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # the odd one of an even kernel goes behind
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _each(padding, len(kernel)))


def patches(x: Tensor, kernel, stride, padding, dilation) -> Tensor:
    """x [..., c, *space] → what lies under the kernel at every position, [..., *positions, c, *kernel] (a view if unpadded).

    >>> patches(torch.arange(4.0)[None], (2,), (1,), ((0, 0),), (2,))[:, 0]
    tensor([[0., 2.],
            [1., 3.]])
    """
    dims = len(kernel)
    if any(side for pair in padding for side in pair):
        x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    for k in range(dims):
        reach = dilation[k] * (kernel[k] - 1) + 1
        x = x.unfold(x.dim() - dims, reach, stride[k])[..., :: dilation[k]]  # the window goes last
    channels = x.dim() - 2 * dims - 1
    return x.movedim(channels, -1 - dims)


def patch_inputs(x: Tensor, lead: int, site) -> Tensor:
    """Patches [..., N, T, G, d] of one call, for G groups."""
    kernel, stride, padding, dilation, groups = site.options
    if len(kernel) == 2:  # torch's own gather is twice as fast
        flat = F.pad(x.flatten(0, lead), [side for pair in reversed(padding) for side in pair])
        P = F.unfold(flat, kernel, dilation, 0, stride).mT
    else:
        P = patches(x, kernel, stride, padding, dilation)
    return P.reshape(*x.shape[: lead + 1], -1, groups, x.shape[-1 - len(kernel)] // groups * prod(kernel))


def patch_deltas(delta: Tensor, lead: int, site) -> Tensor:
    """Sensitivities [..., N, C, T, G, o] of one call."""
    groups = site.options[-1]
    delta = delta.movedim(-1 - len(site.options[0]), -1)  # channels last
    return delta.reshape(*delta.shape[: lead + 2], -1, groups, delta.shape[-1] // groups)


def patch_sums(P: Tensor, delta: Tensor, site) -> tuple[Tensor, Tensor]:
    """Σ_s δ_s ⊗ P_s [..., N, C, G·o·d] and Σ_s δ_s [..., N, C, G·o]."""
    if site.options[-1] == 1:
        J = outer_sums(delta[..., 0, :], P[..., 0, :]).flatten(-2)
    else:  # [..., N, C, G, o, T] @ [..., N, 1, G, T, d]
        J = (delta.movedim(-3, -1) @ P.movedim(-2, -3)[..., None, :, :, :]).flatten(-3)
    return J, delta.sum(-3).flatten(-2)


def convolution_parts(pieces: list[tuple[Tensor, Tensor]], names, options: tuple) -> list:
    """One :class:`LinearPart` over all positions of all calls of an ungrouped convolution."""
    P, delta = (torch.cat([piece[..., 0, :] for piece in side], -2) for side in zip(*pieces, strict=True))
    return [LinearPart(P, delta, names.weight, names.bias, names.shape, kind="convolution")]
