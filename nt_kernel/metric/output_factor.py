"""What an output metric is, M = L_yᵀL_y by its factor, and factors of what a user's callable returns.

A metric is a function from the outputs y [..., N, C] to its factor L_y [..., N, q, C], one block per sample; M itself is
never needed and may be singular. ``lift`` splits an output gradient into r = L_yᵀρ + r⊥, which is what keeps the
push-through form accurate at small mass (``nt_kernel.metric.layer_metric``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError


@dataclass(frozen=True)
class OutputMetric:
    """``factor(y)`` gives L_y [..., N, q, C] or None for the identity; ``lift(y, L_y, r)`` gives (ρ, r⊥).

    The identity is ``None`` because leaving a multiplication out is exact. ``pointwise`` says that the block of a sample
    depends on the outputs of that sample alone, not on its place among the others (as it does where targets or draws
    are kept by row): only such a metric can be moved to other points.
    """

    name: str
    factor: Callable[[Tensor], Tensor | None]
    lift: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
    pointwise: bool = True


def from_factor(factor: Callable[[Tensor], Tensor], name: str | None = None) -> OutputMetric:
    """The metric M = LᵀL of a function ``y [N, C] -> L [N, q, C]``, any q ≥ 1 (rank and q are free).

    Outputs of stacked networks [..., N, C] are given to ``factor`` network by network. ``name`` is for messages.

    Raises TypeError where ``factor`` is not callable or returns no tensor, ValueError for another shape, NumericalError
    with the sample where L holds NaN or inf.

    >>> total = from_factor(lambda y: torch.ones(len(y), 1, y.shape[-1]))  # M = 11ᵀ
    >>> total.factor(torch.zeros(4, 3)).shape
    torch.Size([4, 1, 3])
    """
    if not callable(factor):
        raise TypeError(f"from_factor needs a callable y [N, C] -> L [N, q, C], got {type(factor).__name__}")
    return OutputMetric(name or name_of(factor), lambda y: checked_factor(_each_network(factor, y), y), lift_by_pinv)


def from_callable(metric: Callable[[Tensor], Tensor]) -> OutputMetric:
    """The metric of a function ``y [N, C] -> M [N, C, C]`` or ``-> L [N, q, C]``; q = C is read as M.

    A factor of C rows has the shape of M: say which it is with :func:`from_factor`.

    >>> diagonal = from_callable(lambda y: torch.diag_embed(y.exp()))
    >>> diagonal.factor(torch.zeros(2, 3))[0]
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """

    def factor(y: Tensor) -> Tensor:
        returned = _each_network(metric, y)
        square = returned.shape[-2] == returned.shape[-1]
        return psd_factor(returned, y) if square else checked_factor(returned, y)

    return OutputMetric(name_of(metric), factor, lift_by_pinv)


def name_of(function: Callable) -> str:
    """What a callable is called in messages."""
    return getattr(function, "__name__", type(function).__name__)


def _each_network(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Blocks [..., N, q, C] from a function of one network's outputs [N, C], called network by network."""
    if y.dim() == 2:
        returned = function(y)
        _check_shape(returned, y)
        return returned
    blocks = [_each_network(function, one) for one in y]
    if len(shapes := {tuple(block.shape) for block in blocks}) > 1:
        raise ValueError(
            f"the output metric returned different shapes for stacked networks, {sorted(shapes)}; expected one q for all: "
            "fill factors up with rows of zeros"
        )
    return torch.stack(blocks)


def _sample(which: int, y: Tensor) -> str:
    """Sample number ``which`` of the flattened ones in words: "sample 1", or "sample 1 of run 2" of stacked networks."""
    *run, sample = (int(i) for i in torch.unravel_index(torch.tensor(which), y.shape[:-1]))
    return f"sample {sample}" + (f" of run {', '.join(map(str, run))}" if run else "")


def _check_shape(returned: Tensor, y: Tensor) -> None:
    """TypeError or ValueError for anything but [..., N, C, C] or [..., N, q, C], whichever it is meant to be."""
    N, C = y.shape[-2:]
    batch = "".join(f"{size}, " for size in y.shape[:-2])
    expected = f"M ({batch}{N}, {C}, {C}) = [N, C, C] or a factor L ({batch}{N}, q, {C}) = [N, q, C]"
    if not isinstance(returned, Tensor):
        hint = "; call it first, as in huber(targets)" if isinstance(returned, OutputMetric) else ""
        raise TypeError(
            f"the output metric must return a tensor, expected {expected}, got {type(returned).__name__}{hint}"
        )
    shape = tuple(returned.shape)
    if len(shape) != y.dim() + 1 or shape[:-2] != tuple(y.shape[:-1]) or shape[-1] != C or shape[-2] == 0:
        raise ValueError(f"the output metric returned shape {shape}, expected {expected}")


def _check_finite(blocks: Tensor, y: Tensor) -> None:
    bad = ~torch.isfinite(blocks).flatten(-2).all(-1)
    if bool(bad.any()):
        raise NumericalError(f"the output metric of {_sample(int(bad.flatten().nonzero()[0]), y)} holds NaN or inf")


def checked_factor(factor: Tensor, y: Tensor) -> Tensor:
    """``factor`` [..., N, q, C] in the dtype and on the device of y [..., N, C], its shape and finiteness checked.

    >>> checked_factor(torch.ones(4, 1, 3), torch.zeros(5, 3))
    Traceback (most recent call last):
    ...
    ValueError: the output metric returned shape (4, 1, 3), expected M (5, 3, 3) = [N, C, C] or a factor L (5, q, 3) ...
    """
    _check_shape(factor, y)
    factor = factor.to(y)
    _check_finite(factor, y)
    return factor


def psd_factor(matrix: Tensor, y: Tensor) -> Tensor:
    """Symmetric square root L = M^½ [..., N, C, C] of positive semidefinite blocks; the eigenvalues say by how much not.

    Raises TypeError or ValueError for anything but a tensor of that shape and symmetric to half the digits,
    NumericalError with the smallest eigenvalue and its sample (and run, of stacked networks) for a block that is not
    positive semidefinite beyond rounding, or that holds NaN or inf.

    >>> psd_factor(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2))
    tensor([[[2., 0.], [0., 0.]]])
    """
    _check_shape(matrix, y)
    if matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(f"expected square blocks M [N, C, C], got {tuple(matrix.shape)}; a factor goes to from_factor")
    eps = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0  # of the matrix as it came
    eps, matrix = max(eps, torch.finfo(y.dtype).eps), matrix.to(y)
    _check_finite(matrix, y)
    gap = (matrix - matrix.mT).abs().amax((-2, -1))
    skew = gap > eps**0.5 * matrix.abs().amax((-2, -1))
    if bool(skew.any()):
        which = int(torch.where(skew, gap, -1).flatten().argmax())
        raise ValueError(
            f"output metric of {_sample(which, y)} is not symmetric: entries differ by {gap.flatten()[which].item():.3g}; "
            "a factor L [N, C, C] of M = LᵀL goes through from_factor(callable)"
        )
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = 16 * matrix.shape[-1] * eps * values.abs().amax(-1)
    below = values[..., 0] + floor
    if bool((below < 0).any()):
        which = int(below.flatten().argmin())
        raise NumericalError(
            f"output metric of {_sample(which, y)} is not positive semidefinite: smallest eigenvalue",
            value=values[..., 0].flatten()[which].item(),
        )
    # What cannot be told from zero is zero: the root of a rounding, 1e-8, would pass for a direction of M.
    roots = torch.where(values > floor[..., None], values, 0).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT


def lift_by_pinv(y: Tensor, factor: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """r [..., N, C] = L_yᵀρ + r⊥ for any factor, ρ = (L_yᵀ)⁺r.

    >>> lift_by_pinv(torch.zeros(1, 2), torch.tensor([[[2.0, 0.0]]]), torch.tensor([[6.0, 1.0]]))
    (tensor([[3.]]), tensor([[0., 1.]]))
    """
    # Any split is exact. Dividing by a singular value σ costs ε/σ digits, leaving it to r⊥ costs ε·‖cK‖ at most with σ²
    # in front: directions below σ = ε^¼·σ_max are left, and so are those whose σ² underflows.
    eps, tiny = torch.finfo(r.dtype).eps, torch.finfo(r.dtype).tiny
    rho = (torch.linalg.pinv(factor.mT, atol=math.sqrt(tiny), rtol=eps**0.25) @ r[..., None])[..., 0]
    return rho, remainder(factor, rho, r)


def remainder(factor: Tensor, rho: Tensor, r: Tensor) -> Tensor:
    """r⊥ = r − L_yᵀρ, which makes any split exact.

    >>> remainder(torch.eye(2)[None], torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
    tensor([[0., 3.]])
    """
    return r - (factor.mT @ rho[..., None])[..., 0]
