"""The layer metric G_α = D_α + c·J_αᵀM J_α: steps and kernels through its inner system, never as a matrix."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name
from nt_kernel.factors import Factor, join_factors
from nt_kernel.inner import InnerSystem
from nt_kernel.mass import Mass, resolve_mass
from nt_kernel.output_metric import OutputMetric, resolve_output_metric

SCALES = ("mean", "sum", "none")


def scale_factor(scale: str, n: int) -> float:
    """c of G = D + c·JᵀMJ: 1/n ("mean"), 1 ("sum"), 0 ("none": G = D, plain gradient descent at mass 1).

    >>> scale_factor("mean", 8)
    0.125
    """
    if scale not in SCALES:
        raise ValueError(unknown_name("scale", scale, SCALES))
    return {"mean": 1 / n, "sum": 1.0, "none": 0.0}[scale]


def inner_system(
    factor: Factor, n: int, mass: dict[str, float], c: float, metric: OutputMetric, y: Tensor, where: str = ""
) -> tuple[InnerSystem, Tensor]:
    """The inner system of ``factor`` on its first n points (outputs y [..., N, C]), and K on all its points.

    An output layer under the identity metric is kept as a Gram matrix over samples (``InnerSystem``, decoupled).
    """
    own = y[..., :n, :]
    if factor.decouples and (c == 0 or metric.factor(own) is None):
        gram, decoupled = factor.sample_gram(mass=mass), True
    else:
        gram, decoupled = factor.gram(mass=mass).flatten(-4, -3).flatten(-2), False
    size = n if decoupled else n * y.shape[-1]
    where = f"{where}layer {factor.name!r}"
    return InnerSystem(gram[..., :size, :size], y.shape[-1], c, metric, own, decoupled=decoupled, where=where), gram


class LayerMetric:
    """G_α of one layer, built on the points its factor was seen at.

    Parameters
    ----------
    factor: J_α (:class:`nt_kernel.Factor`); y: the outputs [..., N, C] there (for metrics that depend on them).
    mass: D_α; output_metric: M, by name or callable; scale: "mean", "sum" or "none" (c = 1/N, 1, 0).

    >>> from nt_kernel import layer_factors
    >>> y, factors = layer_factors(torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))
    >>> metric = LayerMetric(factors["."], y, mass=1.0)  # G = 1 + 2²
    >>> metric.solve({"weight": torch.tensor([[10.0]])})["weight"].item(), metric.kernel().item()
    (2.0, 0.8)
    """

    def __init__(
        self,
        factor: Factor,
        y: Tensor,
        *,
        mass: Mass = 1.0,
        output_metric: "str | OutputMetric | Callable" = "identity",
        scale: str = "mean",
    ):
        self.factor, self.n = factor, y.shape[-2]
        self.mass = factor.resolved_mass(mass)
        self.c = scale_factor(scale, self.n)
        self.inner, _ = inner_system(factor, self.n, self.mass, self.c, resolve_output_metric(output_metric), y)

    def push(self, r: Tensor) -> dict[str, Tensor]:
        """G⁻¹g for g = (1/n)Jᵀr, r [..., N, C]: (1/n)·D⁻¹Jᵀv with v = ``inner.dual(r)`` (push-through form)."""
        return push_through(self.factor, self.inner.dual(r) / self.n, self.mass)

    def solve(self, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G⁻¹g for any g by full parameter name: D⁻¹g − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹g (general Woodbury form)."""
        return solve_metric(self.factor, self.inner, g, self.mass)

    def kernel(self, A: Factor | None = None, B: Factor | None = None) -> Tensor:
        """J_A G⁻¹J_Bᵀ [..., A, C, B, C] for the same layer seen at points A and B (default: those of the metric)."""
        C = self.inner.C
        if A is None and B is None:
            R = self.inner.expand(self.inner.self_kernel())
        else:
            own, A, B = self.factor, A or self.factor, B or self.factor
            R = self.inner.expand(self.inner.reduce(self._gram(A, own), self._gram(own, B), self._gram(A, B)))
        return R.unflatten(-1, (-1, C)).unflatten(-3, (-1, C))

    def _gram(self, A: Factor, B: Factor) -> Tensor:
        if self.inner.decoupled:
            return A.sample_gram(B, self.mass)
        return A.gram(B, self.mass).flatten(-4, -3).flatten(-2)


def push_through(factor: Factor, v: Tensor, mass: dict[str, float]) -> dict[str, Tensor]:
    """D⁻¹Jᵀv by parameter name, v [..., N, C]."""
    return {name: g / mass[name] for name, g in factor.vjp(v).items()}


def solve_metric(
    factor: Factor, inner: InnerSystem, g: Mapping[str, Tensor], mass: dict[str, float]
) -> dict[str, Tensor]:
    """G⁻¹g for any g by parameter name: D⁻¹g − D⁻¹Jᵀ(c·L_yᵀS⁻¹L_y)J D⁻¹g (general Woodbury form)."""
    scaled = {name: g[name] / mass[name] for name in factor.shapes}
    pulled = push_through(factor, inner.woodbury(factor.jvp(scaled)), mass)
    return {name: scaled[name] - pulled[name] for name in scaled}


def resolve_blocks(factors: Mapping[str, Factor], blocks: str) -> dict[str, Factor]:
    """The metric blocks: one per layer, or one for all parameters (``"network"``)."""
    if blocks == "layer":
        return dict(factors)
    if blocks == "network":
        return {"network": join_factors(factors)}
    raise ValueError(f"blocks must be 'layer' or 'network', got {blocks!r}")


def model_mass(factors: Mapping[str, Factor], mass: Mass) -> dict[str, float]:
    """{parameter: μ} for a whole model, checked (:func:`nt_kernel.mass.resolve_mass`)."""
    return resolve_mass(mass, {layer: tuple(f.shapes) for layer, f in factors.items()})


def rate_limit(blocks: int, n: int, c: float, metric: OutputMetric, y: Tensor) -> float:
    """The bound λ_max(H) ≤ N/(c·n·λ_min(M)), N metric blocks; inf where c = 0 or M is singular.

    **Derived**: c·L_y R_α L_yᵀ = I − S_α⁻¹ ≺ I with S_α = I + c·L_y K_α L_yᵀ ⪰ I; so c·R_α ≺ M⁻¹ where M is invertible.

    >>> rate_limit(3, 8, 1 / 8, resolve_output_metric("identity"), torch.zeros(8, 2))
    3.0
    """
    if c == 0:
        return float("inf")
    factor = metric.factor(y)
    if factor is None:
        return blocks / (c * n)
    if factor.shape[-2] < factor.shape[-1]:
        return float("inf")
    smallest = torch.linalg.svdvals(factor)[..., -1].min().item() ** 2
    return blocks / (c * n * smallest) if smallest > torch.finfo(y.dtype).tiny else float("inf")
