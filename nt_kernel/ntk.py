"""The generalized neural tangent kernel H = (1/n) J G⁻¹Jᵀ = (1/n) Σ_α J_α G_α⁻¹J_αᵀ, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch  # noqa: F401 (the examples use it)
from torch import Tensor, nn

from nt_kernel.capture import as_inputs, check_finite, observe
from nt_kernel.factors import Factor, factors_of
from nt_kernel.mass import Mass
from nt_kernel.metric import inner_system, model_mass, resolve_blocks, scale_factor
from nt_kernel.output_metric import OutputMetric, resolve_output_metric
from nt_kernel.plan import make_plan, split_state
from nt_kernel.spectrum import rounding_radius, safe_lambda_min, symmetric_eigenvalues


@dataclass(frozen=True)
class GeneralizedNTK:
    """H and its layers at one parameter point. Rows and columns run over (sample i, output c) at i·C + c."""

    layers: dict[str, Tensor]  # H_α = (1/n) J_α G_α⁻¹J_αᵀ, [N·C, N·C]
    outputs: Tensor  # y, [N, C]
    error: float  # radius around every computed eigenvalue of H that rounding can reach

    @cached_property
    def matrix(self) -> Tensor:
        """H = Σ_α H_α, [N·C, N·C], float64."""
        return sum(self.layers.values())

    def eigenvalues(self) -> Tensor:
        """Spectrum of H, ascending, [N·C]."""
        return self._spectrum.clone()

    @cached_property
    def _spectrum(self) -> Tensor:
        return symmetric_eigenvalues(self.matrix)

    @property
    def xi(self) -> float:
        """ξ at this point: a lower bound of λ_min(H) that holds in floating point; 0.0 where it is not certified > 0."""
        return safe_lambda_min(self._spectrum[0].item(), self.error)


def float64_factors(model: nn.Module, x, output: Callable | None = None) -> tuple[Tensor, dict[str, Factor]]:
    """Outputs and factors computed in float64, whatever the model's dtype; the model itself is not touched."""
    plan = make_plan(model, x, output)
    params, fixed = (
        {n: t.double() if t.is_floating_point() else t for n, t in part.items()} for part in split_state(model)
    )
    points = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in as_inputs(x))
    try:
        seen = observe(model, plan, params, fixed, points)
    except RuntimeError as error:
        if "dtype" not in str(error) and "same type" not in str(error):
            raise
        raise ValueError(
            "the model's forward makes tensors of a fixed dtype, so it cannot run in float64, which kernels are computed "
            f"in ({error}); create them with dtype=x.dtype"
        ) from error
    return seen.outputs, factors_of(plan, seen, {n: p.shape for n, p in params.items()})


def generalized_ntk(
    model: nn.Module,
    x,
    *,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    output: Callable | None = None,
) -> GeneralizedNTK:
    """H = (1/n) J G⁻¹Jᵀ with G = D + c·JᵀMJ built on x itself (Pehle & Slotine, arXiv 2603.03610, eq. P4–P8).

    Each block is computed in kernel form, R_α = K_α − c·K_α L_yᵀ(I + c·L_y K_α L_yᵀ)⁻¹L_y K_α with
    K_α = J_α D_α⁻¹J_αᵀ; no m × m matrix is formed.

    Parameters
    ----------
    mass: D, a number, one per layer, or a dict by layer or parameter name.
    output_metric: "identity", "squared", "cross_entropy" (Gauss–Newton of that loss), or a callable y → M [N, C, C].
    scale: c = 1/n ("mean"), 1 ("sum"), 0 ("none": H = (1/n) J D⁻¹Jᵀ, at mass 1 the ordinary NTK over n).
    blocks: "layer" (G block diagonal over layers) or "network" (one block).

    Raises ValueError for what the options or the model do not allow (NaN or inf in x, too), NumericalError where the
    arithmetic fails.

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> ntk = generalized_ntk(model, torch.tensor([[3.0]], dtype=torch.float64))
    >>> round(ntk.matrix.item(), 12), round(ntk.xi, 12)  # a²/(1 + a²) = 9/10
    (0.9, 0.9)
    """
    metric = resolve_output_metric(output_metric)
    y, factors = float64_factors(model, x, output)
    check_finite(x, y)
    n = y.shape[0]
    c = scale_factor(scale, n)
    masses = model_mass(factors, mass)
    layers, size = {}, 0.0
    for name, factor in resolve_blocks(factors, blocks).items():
        inner, _ = inner_system(factor, n, masses, c, metric, y)
        layers[name] = inner.expand(inner.self_kernel()) / n
        size += inner.error_scale(n)
    total = sum(layers.values())
    return GeneralizedNTK(layers, y, rounding_radius(len(total), max(size, total.norm().item())))


def empirical_ntk(model: nn.Module, x1, x2=None, *, output: Callable | None = None) -> Tensor:
    """The ordinary empirical NTK J(x₁)J(x₂)ᵀ, [N, C, N', C], float64, summed over layers one at a time.

    >>> empirical_ntk(nn.Linear(2, 1, bias=False), torch.ones(1, 2), torch.tensor([[1.0, 0.0]])).item()
    1.0
    """
    _, first = float64_factors(model, x1, output)
    second = first if x2 is None else float64_factors(model, x2, output)[1]
    return sum(factor.gram(second[name]) for name, factor in first.items())
