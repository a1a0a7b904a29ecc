"""The generalized neural tangent kernel H = (1/n) J G⁻¹Jᵀ = (1/n) Σ_α J_α G_α⁻¹J_αᵀ, layer by layer, between point sets."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nt_kernel.errors import unknown_name
from nt_kernel.kernels.generalized import GeneralizedTask, kernel_layers
from nt_kernel.kernels.memory import announce, parse_bytes
from nt_kernel.kernels.peak import settle
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import check_scale
from nt_kernel.metric.output_metric import OutputMetric, resolve_output_metric
from nt_kernel.spectra.certified import ConditionNumber, certified_lambda_min, condition_number
from nt_kernel.spectra.ritz import RitzPairs
from nt_kernel.spectra.spectrum import effective_rank, rounding_radius, safe_lambda_min, symmetric_eigenvalues


@dataclass(frozen=True)
class GeneralizedNTK:
    """H and its layers at one parameter point, between A rows and B columns of points.

    Rows and columns of the matrices run over (sample i, output c) at i·C + c.
    """

    layers: dict[str, Tensor]  # H_α = (1/n) J_α(A) G_α⁻¹ J_α(B)ᵀ, [A·C, B·C]
    outputs: Tensor  # y [n, C] at the points that the metric is built on
    error: float  # the radius around H (around its eigenvalues, where it has some) that rounding can reach
    matrix: Tensor  # H = Σ_α H_α, [A·C, B·C], float64; with one block the block itself
    symmetric: bool = True  # rows and columns are the same points

    @property
    def kernel(self) -> Tensor:
        """H as [A, C, B, C], a view of ``matrix``."""
        C = self.outputs.shape[-1]
        return self.matrix.unflatten(1, (-1, C)).unflatten(0, (-1, C))

    def reduced(self, outputs: str) -> Tensor:
        """H of every class with itself, "diagonal" [A, B, C], or their sum over classes, "trace" [A, B]; "full" is ``kernel``.

        Raises ValueError for any other name.
        """
        reductions = {
            "full": lambda K: K,
            "diagonal": lambda K: K.diagonal(dim1=1, dim2=3),
            "trace": lambda K: K.diagonal(dim1=1, dim2=3).sum(-1),
        }
        if outputs not in reductions:
            raise ValueError(unknown_name("outputs", outputs, reductions))
        return reductions[outputs](self.kernel)

    def eigenvalues(self) -> Tensor:
        """Spectrum of H, ascending, [A·C]. Raises ValueError between different point sets, as all below does."""
        return self._spectrum.clone()

    @cached_property
    def _spectrum(self) -> Tensor:
        self._check_symmetric()
        return symmetric_eigenvalues(self.matrix)

    @cached_property
    def xi(self) -> float:
        """ξ at this point: a lower bound of λ_min(H) that holds in floating point; 0.0 where it is not certified > 0.

        A proof for the matrix as stored (``nt_kernel.spectra.certified``), less the model of how far it is from H, ``error``.
        """
        smallest = self._spectrum[0].item()
        if safe_lambda_min(smallest, self.error) > 0:  # else no proof is needed to say 0
            smallest = min(smallest, certified_lambda_min((self.matrix + self.matrix.mT) / 2).item())
        return safe_lambda_min(smallest, self.error)

    @cached_property
    def condition_number(self) -> ConditionNumber:
        """λ_max/λ_min of H: an estimate and two bounds, rigorous up to ``error`` (``nt_kernel.spectra.certified``)."""
        self._check_symmetric()
        return condition_number((self.matrix + self.matrix.mT) / 2, radius=self.error)

    def effective_rank(self, kind: str = "entropy") -> float:
        """How many eigenvalues carry H: "entropy", "participation" or "intrinsic" (``nt_kernel.spectra.spectrum``).

        Eigenvalues within ``error`` of 0 count as 0.
        """
        values = self._spectrum
        return effective_rank(torch.where(values.abs() <= self.error, 0.0, values), kind).item()

    def extremal(self, k: int = 1, which: str = "largest", method: str = "auto") -> RitzPairs:
        """The k largest or smallest eigenvalues with intervals that hold eigenvalues (``nt_kernel.spectra.extremal``)."""
        from nt_kernel.spectra.extremal import extremal_eigenvalues

        self._check_symmetric()
        return extremal_eigenvalues((self.matrix + self.matrix.mT) / 2, k, which, method)

    def _check_symmetric(self) -> None:
        if not self.symmetric:
            rows, columns = self.matrix.shape
            raise ValueError(
                f"this kernel [{rows}, {columns}] is between two point sets and has no eigenvalues; leave x2 out for the "
                "kernel of one (torch.linalg.svdvals(ntk.matrix) gives singular values)"
            )


def generalized_ntk(
    model: nn.Module,
    x,
    x1=None,
    x2=None,
    *,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    chunk_size: int | None = None,
    memory_limit: "int | str | None" = None,
    output: Callable | None = None,
) -> GeneralizedNTK:
    """H = (1/n) J G⁻¹Jᵀ with G = D + c·JᵀMJ built on the n points x (Pehle & Slotine, arXiv 2603.03610, eq. P4–P8).

    Each block is computed in kernel form: with K = J D⁻¹Jᵀ, R = K − c·K L_yᵀ(I + c·L_y K L_yᵀ)⁻¹L_y K on the points of
    the metric, and between points A and B, where S stands for those of the metric,

        J_A G⁻¹J_Bᵀ = K_AB − c·K_AS L_yᵀ (I + c·L_y K_SS L_yᵀ)⁻¹ L_y K_SB;

    no m × m matrix is formed. All in float64.

    Parameters
    ----------
    x: the points S that build the metric; x1: the rows A (default x); x2: the columns B (default the rows).
    mass: D, a number, one per layer, or a dict by layer or parameter name.
    output_metric: M, a name, a callable, or what ``huber`` and its siblings return (``nt_kernel.metric.output_metric``).
    scale: c = 1/n ("mean"), 1 ("sum"), 0 ("none": H = (1/n) J D⁻¹Jᵀ, at mass 1 the ordinary NTK over n), or
        "mean-jacobian" (G = D + J̄ᵀM̄ J̄ with batch means, ``nt_kernel.metric.mean_jacobian``).
    blocks: "layer" (G block diagonal over layers) or "network" (one block).
    chunk_size, memory_limit: as for :func:`nt_kernel.kernels.empirical.predict_peak`: samples observed at a time; the
        predicted peak is written to standard error before the run, and kept. What has N·C rows and columns stays: every
        layer's Gram matrices between the point sets, its kernel, and one Cholesky factor at a time. Not for "mean-jacobian".

    Raises ValueError for what the options or the model do not allow (NaN or inf in x, too), NumericalError where the
    arithmetic fails.

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> x = torch.tensor([[3.0]], dtype=torch.float64)
    >>> ntk = generalized_ntk(model, x)
    >>> round(ntk.matrix.item(), 12), round(ntk.xi, 12)  # a²/(1 + a²) = 9/10
    (0.9, 0.9)
    >>> generalized_ntk(model, x, 2 * x, x[:0].new_tensor([[1.0]])).kernel.squeeze()  # 6·1/(1 + 9)
    tensor(0.6000, dtype=torch.float64)
    """
    metric = resolve_output_metric(output_metric)
    check_scale(scale)
    plain = chunk_size is None and memory_limit is None
    options = {"mass": mass, "metric": metric, "scale": scale, "blocks": blocks}
    task = GeneralizedTask.of(model, x, x1, x2, output=output, whole=plain, **options)
    if not plain:
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        peak = settle(task.forecast, chunk_size, limit)
        announce("generalized_ntk", peak, limit)
        task = task.chunked(peak.chunk_size)
    y, layers, size = kernel_layers(task)
    first, *more = layers.values()
    total = first.clone() if more else first
    for layer in more:
        total += layer
    radius = rounding_radius(max(total.shape), max(size, total.norm().item()))
    return GeneralizedNTK(layers, y, radius, total, task.symmetric)
