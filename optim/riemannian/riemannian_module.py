"""Riemannian modules and their composition (Pehle & Slotine, arXiv 2603.03610, definitions 2–4).

A Riemannian module is an input manifold M, a parameter manifold Θ with metric, an output manifold N with metric, and a
smooth map f: M × Θ → N, neural or not. *Sequential* composition asks that the manifolds match and that the upstream output
metric is the pullback of the downstream one; *parallel* composition is the product. What a composed module knows of itself to
first order is one verb, ``linearise``: outputs, and a function that passes rows L of cotangents backwards,

    𝒦_α = L·∂f_α/∂θ_α,   L ← L·∂f_α/∂z_{α−1}

(the recursion of the paper's layerwise metric). With L = L_y, M = L_yᵀL_y, it gives the metric factors; with the single row
∇_y h it is backpropagation.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nt_kernel.metric.output_factor import OutputMetric, lift_by_pinv
from optim.riemannian.manifold import Manifold, Metric, PulledBack, product
from optim.riemannian.matching_rule import check_matching
from optim.riemannian.metric_recursion import Rows, output_rows, pull_back_rows

PullBack = Callable[[Tensor], tuple[Rows, Tensor | None]]  # L [N, q, dim N] → its rows on the parameters, on the inputs


class RiemannianModule:
    """(inputs M, parameters Θ, outputs N, map f: M × Θ → N).

    Parameters
    ----------
    inputs, outputs: :class:`~optim.riemannian.manifold.Manifold`. An input manifold states no metric. An output
        manifold states one, or none, and then takes the pullback of what is composed behind it.
    parameters: {name: Manifold}, every one with a metric; their product is Θ. {} for a module without parameters.
    map: (z [N, *inputs.shape], {name: point}) → [N, *outputs.shape]; samples must not interact, z must not be written to.
    name: of the module; its parameters are called ``name.parameter`` in compositions, where names must differ.

    The paper's example 1, a linear layer: ∂f/∂z = W and L·∂f/∂W = L ⊗ a.

    >>> layer = RiemannianModule(
    ...     Manifold((3,)), {"W": Manifold((2, 3), 1.0)}, Manifold((2,)), lambda z, p: z @ p["W"].T, "layer"
    ... )
    >>> a, W, L = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 4, 2)
    >>> y, pull_back = layer.linearise(a, {"layer.W": W})
    >>> rows, L_in = pull_back(L)
    >>> torch.allclose(rows["layer.W"], (L[..., :, None] * a[:, None, None, :]).flatten(2)), torch.allclose(L_in, L @ W)
    (True, True)

    Example 2, a pointwise nonlinearity: L ← L·diag(φ'(z)), no parameters.

    >>> tanh = RiemannianModule(Manifold((2,)), {}, Manifold((2,)), lambda z, p: z.tanh())
    >>> z = torch.randn(5, 2)
    >>> rows, L_in = tanh.linearise(z, {})[1](L)
    >>> rows, torch.allclose(L_in, L * (1 - z.tanh() ** 2)[:, None, :], atol=1e-6)
    ({}, True)
    >>> (y, _), (same, _) = layer.sequential(tanh).linearise(a, {"layer.W": W}), tanh.linearise(a @ W.T, {})
    >>> torch.equal(y, same)
    True
    """

    def __init__(
        self, inputs: Manifold, parameters: Mapping[str, Manifold], outputs: Manifold, map: Callable, name: str = ""
    ):
        if inputs.field is not None:
            raise ValueError(
                "an input manifold states no metric: the module pulls back that of its outputs; write Manifold(shape)"
            )
        if not callable(map):
            raise TypeError(f"map must be a function (z, parameters) -> outputs, got {type(map).__name__}")
        for local, manifold in parameters.items():
            if manifold.field is None or isinstance(manifold.field, PulledBack):
                raise ValueError(f"parameter {local!r} needs a metric of its own, as in Manifold(shape, 1.0)")
        prefix = f"{name}." if name else ""
        self.name, self.inputs, self.outputs, self.map = name, inputs, outputs, map
        self._local = {prefix + local: local for local in parameters}
        self.parameters: dict[str, Manifold] = {prefix + local: m for local, m in parameters.items()}

    @classmethod
    def from_torch(cls, model: nn.Module, x, **options) -> "RiemannianModule":
        """A network as a module, an ``nn.Sequential`` layer by layer; see :func:`optim.riemannian.torch_module.from_torch`."""
        from optim.riemannian.torch_module import from_torch

        return from_torch(model, x, **options)

    def as_torch(self, point: Mapping[str, Tensor]) -> nn.Module:
        """An ``nn.Module`` whose layers are the parameter manifolds; see :func:`optim.riemannian.torch_module.as_torch`."""
        from optim.riemannian.torch_module import as_torch

        return as_torch(self, point)

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """{metric block: its parameters}: a block is what stands before the last dot, as a layer in ``nt_kernel``."""
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            found.setdefault(name.rpartition(".")[0] or ".", []).append(name)
        return {block: tuple(names) for block, names in found.items()}

    def __call__(self, x: Tensor, point: Mapping[str, Tensor]) -> Tensor:
        """f(x; θ) [N, *outputs.shape] for N inputs and θ by full name."""
        return self.linearise(x, point)[0]

    def linearise(self, x: Tensor, point: Mapping[str, Tensor]) -> tuple[Tensor, PullBack]:
        """f(x; θ), and L [N, q, dim N] → ({parameter: L·∂f/∂θ [N, q, m]}, L·∂f/∂x [N, q, dim M]).

        The second is None where x is not a floating-point tensor (tokens). Nothing larger than its results is formed, beside
        what the map itself needs. Raises ValueError for shapes that do not fit and for samples that interact.
        """
        self.check(x, point)
        local = {self._local[name]: point[name] for name in self.parameters}
        y = self.map(x, local)
        if not isinstance(y, Tensor) or tuple(y.shape) != (len(x), *self.outputs.shape):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"the map of module {self.name!r} gave {got} for {len(x)} samples, expected {(len(x), *self.outputs.shape)}"
            )

        def pull_back(L: Tensor) -> tuple[Rows, Tensor | None]:
            fixed = {own: p.detach() for own, p in local.items()}
            alone, rows, L_in = pull_back_rows(self.map, x, fixed, L)
            both = y.detach().reshape(alone.shape)
            gap = (alone - both).norm().item()
            if gap > torch.finfo(y.dtype).eps ** 0.5 * (1 + both.norm().item()):
                raise ValueError(
                    f"the samples of module {self.name!r} interact: alone they give outputs that differ by {gap:.2g}, and "
                    "they have no Jacobian of their own"
                )
            return {name: rows[self._local[name]] for name in self.parameters}, L_in

        return y, pull_back

    def check(self, x: Tensor, point: Mapping[str, Tensor]) -> None:
        """Raise ValueError where x [N, *inputs.shape] or θ does not fit this module."""
        if x.dim() == 0 or tuple(x.shape[1:]) != self.inputs.shape:
            raise ValueError(
                f"module {self.name!r} takes x of shape (N, {', '.join(map(str, self.inputs.shape))}), got {tuple(x.shape)}"
            )
        missing = [name for name in self.parameters if name not in point]
        if missing:
            raise ValueError(f"the point lacks {', '.join(missing)}; its parameters are {', '.join(self.parameters)}")
        for name, manifold in self.parameters.items():
            if tuple(point[name].shape) != manifold.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(point[name].shape)}, its manifold {manifold.shape}"
                )

    def sequential(
        self, other: "RiemannianModule", at: tuple[Tensor, Mapping[str, Tensor]] | None = None
    ) -> "RiemannianModule":
        """This module, then ``other`` (definition 3): z ↦ g(f(z; θ), φ).

        The matching rule: ``other`` takes the points that this module puts out, and the metric of this module's outputs is
        the pullback of that of the other's. Where this module states none it is set; ``PulledBack(other)`` (from
        :meth:`pull_back`) is it; any other is compared with the pullback at the points and parameters ``at`` = (z, φ), or
        at 8 points drawn in the charts.

        Raises ValueError naming the shapes, or the relative gap ‖M − JᵀM'J‖_F/‖JᵀM'J‖_F, where they do not match, and
        for names of parameters that both have.

        >>> double = RiemannianModule(Manifold((1,)), {}, Manifold((1,), 1.0), lambda z, p: 2 * z)
        >>> RiemannianModule(Manifold((1,)), {}, Manifold((1,), 1.0), lambda z, p: z).sequential(double)
        Traceback (most recent call last):
        ...
        ValueError: the stated output metric is not the pullback of the metric downstream: relative gap 0.75 ...
        """
        if not isinstance(other, RiemannianModule):
            raise TypeError(f"expected a RiemannianModule, got {type(other).__name__}")
        if not other.inputs.accepts(self.outputs):
            raise ValueError(
                f"the manifolds do not match: module {self.name!r} has outputs {_describe(self.outputs)}, module "
                f"{other.name!r} inputs {_describe(other.inputs)}"
            )
        check_matching(self, other, at)
        return SequentialModule((*_stages(self), *_stages(other)))

    def parallel(self, other: "RiemannianModule") -> "RiemannianModule":
        """This module beside ``other`` (definition 4): (x, x') ↦ (f(x; θ), g(x'; φ)) on product manifolds.

        Points of a product are flat vectors, one factor after the other (:func:`optim.riemannian.manifold.product`).

        Raises ValueError for names of parameters that both have, and where one output manifold has a metric and the other
        none.
        """
        if not isinstance(other, RiemannianModule):
            raise TypeError(f"expected a RiemannianModule, got {type(other).__name__}")
        return ParallelModule((*_branches(self), *_branches(other)), product(self.outputs, other.outputs))

    def pull_back(self, other: "RiemannianModule") -> "RiemannianModule":
        """This module with the pullback of the output metric of ``other`` as metric of its outputs."""
        if not other.inputs.accepts(self.outputs):
            raise ValueError(
                f"the manifolds do not match: outputs {_describe(self.outputs)}, inputs {_describe(other.inputs)}"
            )
        return self.with_metric(PulledBack(other))

    def pulled_back(self, point: Mapping[str, Tensor]) -> OutputMetric:
        """The metric that this module's outputs induce on its inputs at θ: L(z) = L_y(f(z; θ))·∂f/∂z."""

        def factor(z: Tensor) -> Tensor:
            y, pull_back = self.linearise(z.reshape(len(z), *self.inputs.shape), point)
            return pull_back(output_rows(self.outputs, y))[1]

        return OutputMetric(f"pullback by {self.name!r}", factor, lift_by_pinv)

    def with_metric(self, metric: Metric) -> "RiemannianModule":
        """The same module with another metric on its outputs (in the coordinates of their chart)."""
        return RiemannianModule(
            self.inputs,
            {local: self.parameters[full] for full, local in self._local.items()},
            _with_metric(self.outputs, metric),
            self.map,
            self.name,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_describe(self.inputs)} -> {_describe(self.outputs)}, {list(self.parameters)})"


class SequentialModule(RiemannianModule):
    """Modules one after the other; the output metric of each but the last is the pullback of the next one's."""

    def __init__(self, stages: Sequence[RiemannianModule]):
        last = stages[-1]
        kept = [last]
        for stage in reversed(stages[:-1]):
            kept.insert(0, stage.pull_back(kept[0]))
        self.stages = tuple(kept)
        self.name = " ; ".join(stage.name or "·" for stage in kept)
        self.inputs, self.outputs = stages[0].inputs, last.outputs
        self.parameters = _union(stages)

    def linearise(self, x: Tensor, point: Mapping[str, Tensor]) -> tuple[Tensor, PullBack]:
        self.check(x, point)
        passed = []
        for stage in self.stages:
            x, pull_back = stage.linearise(x, point)
            passed.append(pull_back)

        def back(L: Tensor) -> tuple[Rows, Tensor | None]:
            rows: Rows = {}
            for pull_back in reversed(passed):
                own, L = pull_back(L)
                rows |= own
            return {name: rows[name] for name in self.parameters}, L

        return x, back

    def with_metric(self, metric: Metric) -> RiemannianModule:
        return SequentialModule((*self.stages[:-1], self.stages[-1].with_metric(metric)))


class ParallelModule(RiemannianModule):
    """Modules side by side; the Jacobians are block diagonal, so every branch takes its own columns of L."""

    def __init__(self, branches: Sequence[RiemannianModule], outputs: Manifold):
        self.branches = tuple(branches)
        self.name = " ∥ ".join(branch.name or "·" for branch in branches)
        self.inputs = product(*(branch.inputs for branch in branches))
        self.outputs = outputs
        self.parameters = _union(branches)

    def linearise(self, x: Tensor, point: Mapping[str, Tensor]) -> tuple[Tensor, PullBack]:
        self.check(x, point)
        pieces = x.split([branch.inputs.size for branch in self.branches], 1)
        passed = [
            branch.linearise(piece.reshape(len(x), *branch.inputs.shape), point)
            for branch, piece in zip(self.branches, pieces, strict=True)
        ]

        def back(L: Tensor) -> tuple[Rows, Tensor | None]:
            columns = L.split([branch.outputs.size for branch in self.branches], -1)
            found = [pull_back(own) for (_, pull_back), own in zip(passed, columns, strict=True)]
            rows = {name: r for own, _ in found for name, r in own.items()}
            on_inputs = [L_in for _, L_in in found]
            return rows, None if any(L_in is None for L_in in on_inputs) else torch.cat(on_inputs, -1)

        return torch.cat([y.reshape(len(x), -1) for y, _ in passed], 1), back

    def with_metric(self, metric: Metric) -> RiemannianModule:
        return ParallelModule(self.branches, _with_metric(self.outputs, metric))


def _union(modules: Sequence[RiemannianModule]) -> dict[str, Manifold]:
    found: dict[str, Manifold] = {}
    for module in modules:
        twice = sorted(found.keys() & module.parameters.keys())
        if twice:
            raise ValueError(f"two modules have parameters called {', '.join(twice)}: give the modules different names")
        found |= module.parameters
    return found


def _stages(module: RiemannianModule) -> tuple[RiemannianModule, ...]:
    return module.stages if isinstance(module, SequentialModule) else (module,)


def _branches(module: RiemannianModule) -> tuple[RiemannianModule, ...]:
    return module.branches if isinstance(module, ParallelModule) else (module,)


def _with_metric(manifold: Manifold, metric: Metric) -> Manifold:
    return Manifold(manifold.shape, metric, manifold.chart, manifold.parts)


def _describe(manifold: Manifold) -> str:
    parts = [str(part.shape) for part in manifold.parts]
    return " × ".join(parts) if parts else str(manifold.shape)
