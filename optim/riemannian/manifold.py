"""Manifolds with a metric and a global chart: where inputs, parameters and outputs of a Riemannian module live."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from nt_kernel.mass import ParameterMass
from nt_kernel.metric.output_factor import OutputMetric, from_factor, lift_by_pinv, psd_factor
from nt_kernel.metric.output_metric import resolve_output_metric, scaled

Metric = float | Tensor | str | OutputMetric | Callable | None


@dataclass(frozen=True, eq=False)
class Chart:
    """A global chart u = coordinates(p), p = point(u): a diffeomorphism onto ℝ^shape, as functions of one point.

    ``elementwise`` says that every entry goes its own way, so that ∂u/∂p is diagonal.

    >>> LOG.point(LOG.coordinates(torch.tensor([0.5, 2.0])))
    tensor([0.5000, 2.0000])
    """

    point: Callable[[Tensor], Tensor]
    coordinates: Callable[[Tensor], Tensor]
    elementwise: bool = False

    def jacobian(self, p: Tensor) -> Tensor:
        """∂u/∂p at one point: its diagonal, of the point's shape, for an elementwise chart, else [m, m].

        >>> LOG.jacobian(torch.tensor([0.5, 2.0]))
        tensor([2.0000, 0.5000])
        """
        if self.elementwise:
            return torch.func.vjp(self.coordinates, p)[1](torch.ones_like(p))[0]
        return torch.func.jacrev(lambda q: self.coordinates(q).reshape(-1))(p).reshape(p.numel(), -1)


LOG = Chart(torch.exp, torch.log, elementwise=True)
"""Positive reals: u = log p."""


class PulledBack(OutputMetric):
    """The pullback of the output metric of ``modules`` to their inputs, at whatever parameters they have.

    A field over inputs and parameters, so it has a factor only where the parameters are known:
    :meth:`~optim.riemannian.riemannian_module.RiemannianModule.pulled_back`.
    Of several modules, side by side, it is the product.
    """

    def __init__(self, *modules):
        def factor(y: Tensor):
            raise ValueError(
                f"the pullback by {', '.join(map(repr, modules))} depends on parameters: write module.pulled_back(point)"
            )

        super().__init__("pullback", factor, lift_by_pinv)
        object.__setattr__(self, "modules", modules)


@dataclass(frozen=True, eq=False)
class Manifold:
    """Points of one ``shape`` (m entries) with a Riemannian metric.

    Parameters
    ----------
    shape: of one point; () is a number.
    metric: in the coordinates of the chart, one of
        None (not stated: an input manifold, or an output manifold whose metric the next module determines),
        a number μ > 0 (μI) or a tensor of ``shape`` with positive entries (a diagonal): Euclidean with a constant mass,
        a tensor [m, m] (a constant matrix), or whatever ``output_metric=`` takes: a name, an ``OutputMetric``, a callable
        from N points in coordinates [N, m] to matrices M [N, m, m] or factors L [N, q, m], M = LᵀL.
    chart: a global chart; None is the identity. With :data:`LOG` and metric μ this is the manifold of positive
        reals with ds² = μ dp²/p² (:func:`positive`).
    parts: of a product manifold (:func:`product`), whose points are flat vectors.

    Raises TypeError/ValueError for a bad shape or metric (of a callable: when it is used).

    >>> Manifold((2,), 4.0).matrix(torch.ones(1, 2))
    tensor([[[4., 0.],
             [0., 4.]]])
    """

    shape: tuple[int, ...]
    metric: Metric = None
    chart: Chart | None = None
    parts: tuple["Manifold", ...] = ()
    field: OutputMetric | None = field(init=False, repr=False)  # the metric on coordinates [N, m]

    def __post_init__(self):
        if isinstance(self.shape, int) or not all(type(s) is int and s >= 1 for s in self.shape):
            raise ValueError(f"shape must be a tuple of integers >= 1, got {self.shape!r}")
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "field", _field(self.metric, self.shape))

    @property
    def size(self) -> int:
        """m, the dimension."""
        return math.prod(self.shape)

    @property
    def mass(self) -> float | Tensor | None:
        """The metric where it is one positive diagonal in the coordinates of the chart, as ``mass=`` takes it, else None.

        >>> positive((3,), 0.5).mass, Manifold((2,), torch.eye(2)).mass
        (0.5, None)
        """
        if isinstance(self.metric, Real):
            return float(self.metric)
        diagonal = isinstance(self.metric, Tensor) and tuple(self.metric.shape) == self.shape
        return self.metric if diagonal else None

    def factor(self, points: Tensor) -> Tensor | None:
        """L [N, q, m] of the metric LᵀL at N points [N, …], with respect to the points' own entries; None is the identity.

        With ds² = |L_u du|² in the chart it is L = L_u·∂u/∂p. Raises ValueError where no metric is stated.
        """
        if self.field is None:
            raise ValueError(f"this manifold of shape {self.shape} has no metric: write Manifold(shape, metric)")
        if self.chart is None:
            return self.field.factor(points.reshape(len(points), -1))
        points = points.reshape(len(points), *self.shape)
        u = torch.func.vmap(self.chart.coordinates)(points).reshape(len(points), -1)
        J = torch.func.vmap(self.chart.jacobian)(points)
        J = torch.diag_embed(J.reshape(len(points), -1)) if self.chart.elementwise else J
        L = self.field.factor(u)
        return J if L is None else L @ J

    def matrix(self, points: Tensor) -> Tensor:
        """LᵀL [N, m, m] at N points.

        >>> positive((1,)).matrix(torch.tensor([[2.0]]))  # 1/p²
        tensor([[[0.2500]]])
        """
        L = self.factor(points)
        if L is None:
            return torch.eye(self.size, dtype=points.dtype, device=points.device).expand(len(points), -1, -1)
        return L.mT @ L

    def mass_at(self, point: Tensor) -> ParameterMass:
        """The metric at one point with respect to its own entries: a number, a diagonal of ``shape``, or [m, m].

        >>> positive((2,), 2.0).mass_at(torch.tensor([1.0, 2.0]))
        tensor([2.0000, 0.5000])
        """
        elementwise = self.chart is None or self.chart.elementwise
        if self.mass is None or not elementwise:
            return self.matrix(point[None])[0]
        mass = self.mass.to(point) if isinstance(self.mass, Tensor) else self.mass
        return mass if self.chart is None else mass * self.chart.jacobian(point).square()

    def coordinates(self, point: Tensor) -> Tensor:
        """u of one point. Raises ValueError for a point that the chart does not reach.

        >>> positive((2,)).coordinates(torch.tensor([1.0, -1.0]))
        Traceback (most recent call last):
        ...
        ValueError: the point is not on the manifold: its coordinates are not finite at entry (1,)
        """
        if tuple(point.shape) != self.shape:
            raise ValueError(f"a point has shape {tuple(point.shape)}, the manifold {self.shape}")
        u = point if self.chart is None else self.chart.coordinates(point)
        bad = ~u.isfinite()
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"the point is not on the manifold: its coordinates are not finite at entry {at}")
        return u

    def point(self, u: Tensor) -> Tensor:
        """The point with coordinates u."""
        return u if self.chart is None else self.chart.point(u)

    def retract(self, point: Tensor, tangent: Tensor) -> Tensor:
        """p with coordinates u(p) + (∂u/∂p)·tangent: the exponential map where the metric is constant in the chart.

        >>> positive(()).retract(torch.tensor(2.0), torch.tensor(-200.0)) > 0  # p·exp(v/p)
        tensor(True)
        """
        if self.chart is None:
            return point + tangent
        J = self.chart.jacobian(point)
        moved = J * tangent if self.chart.elementwise else (J @ tangent.reshape(-1)).reshape(self.shape)
        return self.chart.point(self.chart.coordinates(point) + moved)

    def accepts(self, other: "Manifold") -> bool:
        """True where the points of ``other`` are points here: one shape, and, of two products, the same factors."""
        if self.shape != other.shape:
            return False
        mine, theirs = ([part.shape for part in manifold.parts] for manifold in (self, other))
        return not (mine and theirs) or mine == theirs


def positive(shape: Sequence[int], mass: float | Tensor = 1.0) -> Manifold:
    """Positive reals with ds² = μ dp²/p², flat in u = log p, where it is μ du² (log-Euclidean).

    A step along its exponential map, p ← p·exp(−lr·v/p), never leaves it.
    """
    return Manifold(tuple(shape), mass, LOG)


def product(*manifolds: Manifold) -> Manifold:
    """M_1 × … × M_k with the product metric; its points are the flattened points, one after the other.

    No metric where none of the factors has one. Raises ValueError where some have and some have not.

    >>> product(Manifold((2,), 1.0), Manifold((), 9.0)).matrix(torch.zeros(1, 3))[0].diagonal()
    tensor([1., 1., 9.])
    """
    if not manifolds:
        raise ValueError("a product of no manifolds; give at least one")
    fields = [manifold.field for manifold in manifolds]
    stated = [one is not None for one in fields]
    if any(stated) and not all(stated):
        raise ValueError(
            f"some factors of a product have a metric and some have none ({stated}); state all of them or none"
        )
    metric: Metric = None
    if all(isinstance(one, PulledBack) for one in fields):
        metric = PulledBack(*(module for one in fields for module in one.modules))
    elif all(stated):
        metric = _product_metric(manifolds)
    parts = tuple(part for manifold in manifolds for part in (manifold.parts or (manifold,)))
    return Manifold((sum(part.size for part in parts),), metric, parts=parts)


def _product_metric(parts: tuple[Manifold, ...]) -> OutputMetric:
    sizes = [part.size for part in parts]

    def factors(y: Tensor) -> list[Tensor | None]:
        return [part.factor(piece) for part, piece in zip(parts, y.split(sizes, -1), strict=True)]

    def factor(y: Tensor) -> Tensor | None:
        blocks = factors(y)
        if all(L is None for L in blocks):
            return None
        eyes = [torch.eye(m, dtype=y.dtype, device=y.device).expand(len(y), -1, -1) for m in sizes]
        blocks = [eye if L is None else L for L, eye in zip(blocks, eyes, strict=True)]
        return torch.func.vmap(torch.block_diag)(*blocks)

    def lift(y: Tensor, L: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(parts, factors(y), y.split(sizes, -1), r.split(sizes, -1), strict=True)
        split = [output_metric(part).lift(z, own, ri) for part, own, z, ri in pieces]
        return torch.cat([rho for rho, _ in split], -1), torch.cat([rest for _, rest in split], -1)

    return OutputMetric(" × ".join(part.field.name for part in parts), factor, lift)


def output_metric(manifold: Manifold) -> OutputMetric:
    """The metric with respect to the points' own entries, as ``output_metric=`` of the optimizer and of the kernels takes it.

    >>> output_metric(positive((1,))).factor(torch.tensor([[4.0]]))  # dp/p
    tensor([[[0.2500]]])
    """
    if manifold.field is None:
        raise ValueError(f"this manifold of shape {manifold.shape} has no metric: write Manifold(shape, metric)")
    if manifold.chart is None:
        return manifold.field
    return OutputMetric(f"{manifold.field.name} in a chart", manifold.factor, lift_by_pinv, manifold.field.pointwise)


def _field(metric: Metric, shape: tuple[int, ...]) -> OutputMetric | None:
    if metric is None:
        return None
    if isinstance(metric, Real):
        if isinstance(metric, bool) or not 0 < metric < math.inf:
            raise ValueError(f"the mass of a manifold must be positive and finite, got {metric!r}")
        identity = resolve_output_metric("identity")
        return identity if metric == 1 else scaled(identity, float(metric))
    if not isinstance(metric, Tensor):
        return resolve_output_metric(metric)
    m = math.prod(shape)
    if tuple(metric.shape) == shape:
        if not metric.is_floating_point() or not bool(((metric > 0) & metric.isfinite()).all()):
            raise ValueError("a diagonal metric must be a floating-point tensor of positive, finite entries")
        constant = torch.diag_embed(metric.detach().reshape(-1).sqrt())
    elif tuple(metric.shape) == (m, m):
        constant = psd_factor(metric.detach()[None], metric.new_zeros(1, m))[0]
    else:
        raise ValueError(
            f"a metric as a tensor has the shape of a point, {shape}, or is a matrix {(m, m)}; got {tuple(metric.shape)}"
        )
    return from_factor(lambda y: constant.to(y).expand(len(y), -1, -1), "constant")
