"""The empirical neural tangent kernel J(x₁)J(x₂)ᵀ of a model: whole, per class, traced, per layer, within a memory limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor
from nt_kernel.kernels.live_bytes import LiveBytes
from nt_kernel.kernels.memory import PeakMemory, announce, parse_bytes
from nt_kernel.kernels.peak import Forecast, Passage, Watched, settle
from nt_kernel.kernels.points import Points, model_points
from nt_kernel.kernels.sweep import Wanted, reduction_of, sweep
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import model_mass


def empirical_ntk(
    model: nn.Module,
    x1,
    x2=None,
    *,
    mass: Mass = 1.0,
    outputs: str = "full",
    per_layer: bool = False,
    chunk_size: int | None = None,
    memory_limit: "int | str | None" = None,
    output: Callable | None = None,
    dtype: "torch.dtype | str" = torch.float64,
) -> "Tensor | dict[str, Tensor]":
    """The empirical NTK K = J(x₁) D⁻¹ J(x₂)ᵀ, summed over layers; D = 1 (``mass=1.0``) makes it the ordinary one.

    Parameters
    ----------
    x1, x2: inputs [N, …] and [N', …], or tuples of such; ``x2=None`` is x1, at half the work.
    mass: D, a number, one per layer, or a dict by layer or parameter name (``nt_kernel.mass``).
    outputs: which entries of K_{(i,c),(j,d)} are computed; the others are not formed on the way.
        "full": all, [N, C, N', C]; "diagonal": of each class with itself, K_{(i,c),(j,c)} as [N, N', C];
        "trace": their sum Σ_c K_{(i,c),(j,c)}, [N, N'] (the sum, not the mean over classes that some libraries return).
    per_layer: a dict {layer: kernel} in place of the sum.
    chunk_size, memory_limit: see :func:`predict_peak`. Either of them has the predicted peak written to standard error
        before the run; the result is the same to rounding.
    output: selects the tensor where the model returns a tuple or dict.
    dtype: what everything is computed in: float64, whatever the model's, unless told otherwise ("model": the model's).

    Raises ValueError for options and models that make no sense (``nt_kernel.layer_factors``), x that is not finite, and
    a memory limit that cannot be kept, with the smallest peak; NumericalError where the model's outputs are not finite.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> x = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    >>> empirical_ntk(model, x, outputs="trace")  # 2·xxᵀ
    tensor([[4., 4.],
            [4., 8.]], dtype=torch.float64)
    >>> empirical_ntk(model, x, x[:1], outputs="diagonal").shape, empirical_ntk(model, x, x[:1]).shape
    (torch.Size([2, 1, 2]), torch.Size([2, 2, 1, 2]))
    """
    plain = chunk_size is None and memory_limit is None
    task = _Task.of(model, x1, x2, mass, outputs, per_layer, output, dtype, whole=plain)
    if not plain:
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        peak = settle(task.forecast, chunk_size, limit)
        announce("empirical_ntk", peak, limit)
        task = task.chunked(peak.chunk_size)
    _, kernels = sweep(task.rows, task.columns, task.wanted)
    return kernels if per_layer else kernels["network"]


def predict_peak(
    model: nn.Module,
    x1,
    x2=None,
    *,
    mass: Mass = 1.0,
    outputs: str = "full",
    per_layer: bool = False,
    chunk_size: int | None = None,
    memory_limit: "int | str | None" = None,
    output: Callable | None = None,
    dtype: "torch.dtype | str" = torch.float64,
) -> PeakMemory:
    """The peak memory :func:`empirical_ntk` would take with these arguments, by item; the kernel is not computed.

    ``chunk_size`` samples of each point set are observed at a time, and the tile they have in common is computed and
    written; blocks of columns are observed once for every block of rows, so that small blocks cost time: N²/(2·chunk) or
    N·N'/chunk observed samples in place of N + N'. ``memory_limit`` (bytes, or text such as "2 GiB") takes the fewest
    blocks whose predicted peak is within it. Without either, all samples are in one block.

    What counts is tensors that the call makes, the result included; not the process, the model and x, which were there.
    The prediction is an upper bound (``nt_kernel.kernels.peak``), for models whose passes take memory in proportion to
    the samples.

    >>> x = torch.zeros(64, 10)
    >>> whole, tiled = (predict_peak(nn.Linear(10, 5), x, chunk_size=n) for n in (64, 8))
    >>> whole.blocks, tiled.blocks, tiled.items["result"] == (64 * 5) ** 2 * 8, tiled.total < whole.total
    (1, 8, True, True)
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    task = _Task.of(model, x1, x2, mass, outputs, per_layer, output, dtype, whole=False)
    return settle(task.forecast, chunk_size, limit)


@dataclass(frozen=True)
class _Task:
    rows: Points
    columns: Points | None
    wanted: Callable[[Mapping[str, Factor]], Wanted]
    check: tuple[int, int]  # bytes that planning took, and left behind

    @classmethod
    def of(cls, model, x1, x2, mass, outputs, per_layer, output, dtype, *, whole: bool) -> "_Task":
        reduction = reduction_of(outputs)

        def wanted(factors: Mapping[str, Factor]) -> Wanted:
            layers = {name: (name,) for name in factors} if per_layer else {"network": tuple(factors)}
            return Wanted(layers, dict.fromkeys(layers, reduction), model_mass(factors, mass))

        def points() -> tuple[Points, Points | None]:
            rows = model_points(model, x1, output=output, dtype=dtype, whole=whole)
            return rows, None if x2 is None else rows.at(x2, whole=whole)

        if whole:
            return cls(*points(), wanted, (0, 0))
        with LiveBytes() as seen:
            rows, columns = points()
            check = seen.peak, seen.live
        return cls(rows, columns, wanted, check)

    def chunked(self, chunk: int) -> "_Task":
        columns = None if self.columns is None else self.columns.chunked(chunk)
        return _Task(self.rows.chunked(chunk), columns, self.wanted, self.check)

    def forecast(self, chunk: int) -> Forecast:
        """For blocks of up to ``chunk`` samples."""
        rows = Watched.of(self.rows, chunk)
        columns = None if self.columns is None else Watched.of(self.columns, chunk)
        passage = Passage(rows, columns, self.wanted(rows.few.factors))
        return Forecast((passage,), *footprint(self.check, *(s for s in (rows, columns) if s)))


def footprint(check: tuple[int, int], *sides: Watched) -> tuple[int, int]:
    """Bytes of the state's copies and of what planning left behind, and the peak of planning and probing, these included."""
    model = sides[0].points.model
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    copies: dict[int, int] = {}
    for side in sides:
        for t in (*side.points.params.values(), *side.points.fixed.values()):
            if t.untyped_storage().data_ptr() not in held:
                copies[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    peak, left = check
    left = max(left, sum(copies.values()))
    return left, max(peak, left + ceil(sum(side.watching for side in sides)))
