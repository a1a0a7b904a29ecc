"""A loss of the user's own, from its values alone: gradient and Hessian by torch.func, convexity checked."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from nt_kernel.errors import NumericalError
from nt_kernel.metric.output_factor import name_of, psd_factor
from stability.losses import Loss

NODES = 24  # of the Gauss–Legendre rule that averages the Hessian between two outputs


def own_loss(function: Callable[[Tensor, Tensor], Tensor], *, nodes: int = NODES) -> Loss:
    """The :class:`~stability.losses.Loss` of a convex ``function`` (y [N, p], a [N, p]) → losses [N], row by row.

    ∇ℓ, ∇²ℓ and ∇²ℓ·v by torch.func, sample by sample under vmap. The secant is ∫₀¹∇²ℓ(y + τ(y' − y))dτ by a Gauss–Legendre
    rule of ``nodes`` points: S̄(y' − y) = ∇ℓ(y') − ∇ℓ(y) to rounding for smooth losses, less well across kinks.

    Raises ValueError where the function does not return [N]. A Hessian that is not positive semidefinite is a
    NumericalError with its smallest eigenvalue and sample, wherever it is taken (the first step of a run at the latest).

    >>> quartic = own_loss(lambda y, a: ((y - a) ** 4).sum(-1))
    >>> y, a = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> quartic.gradient(y, a), quartic.hessian(y, a)
    (tensor([[4.]]), tensor([[[12.]]]))
    """

    def value(y: Tensor, a: Tensor) -> Tensor:
        rows = y.flatten(0, -2)
        found = function(rows, a.expand_as(y).flatten(0, -2))
        if not isinstance(found, Tensor) or found.shape != rows.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"a loss of one's own must return one number per sample, [{len(rows)}] (reduction='none', summed over the "
                f"outputs), got {shape}; gradient and Hessian are taken from it"
            )
        return found.reshape(y.shape[:-1])

    def one(y: Tensor, a: Tensor) -> Tensor:
        return value(y[None], a[None])[0]

    def by_sample(transform: Callable, y: Tensor, a: Tensor) -> Tensor:
        found = vmap(transform)(y.flatten(0, -2), a.expand_as(y).flatten(0, -2))
        return found.unflatten(0, y.shape[:-1])

    def gradient(y: Tensor, a: Tensor) -> Tensor:
        return by_sample(grad(one), y, a)

    def whole_hessian(y: Tensor, a: Tensor) -> Tensor:
        return by_sample(hessian(one), y, a)

    def factor(y: Tensor, a: Tensor) -> Tensor:
        try:
            return psd_factor(whole_hessian(y, a), y)
        except NumericalError as error:
            what = str(error).replace("output metric of", "∇²ℓ of")
            raise NumericalError(f"the loss {name_of(function)!r} is not convex here: {what}") from error

    def curve(y: Tensor, a: Tensor, v: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(y.shape, v.shape)
        y, a, v = (t.expand(shape) for t in (y, a, v))
        product = vmap(lambda y, a, v: jvp(lambda at: grad(one)(at, a), (y,), (v,))[1])
        return product(y.flatten(0, -2), a.flatten(0, -2), v.flatten(0, -2)).reshape(shape)

    def secant(y: Tensor, y2: Tensor, a: Tensor) -> Tensor:
        total = 0
        for node, weight in zip(*legendre(nodes), strict=True):
            total = total + weight * whole_hessian(y + node * (y2 - y), a.expand_as(y))
        return total

    return Loss(
        name_of(function), value=value, gradient=gradient, curve=curve, factor=factor, secant=secant,
        curvature=lambda p: float("inf"),
    )  # fmt: skip


def legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss–Legendre rule on [0, 1], exact for polynomials of degree 2·nodes − 1.

    >>> x, w = legendre(3)
    >>> round(sum(v * t**5 for t, v in zip(x, w)), 12)  # 1/6
    0.166666666667
    """
    import numpy

    x, w = numpy.polynomial.legendre.leggauss(nodes)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()
