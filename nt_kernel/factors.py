"""Layer factors: the Jacobian J_α = ∂y/∂θ_α of each layer as a structured linear operator with five verbs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor, nn

from nt_kernel.capture.embedding import EmbeddingPart
from nt_kernel.capture.explicit import ExplicitPart
from nt_kernel.capture.linear import LinearPart
from nt_kernel.capture.linear_output import LinearOutputPart
from nt_kernel.capture.observe import batch_size, observe
from nt_kernel.capture.plan import fast_formats, make_plan, parts_of
from nt_kernel.capture.probe import split_state
from nt_kernel.capture.site import Observation, Plan, StalePlan
from nt_kernel.capture.unused import UnusedPart
from nt_kernel.mass import Mass, Masses, resolve_mass
from nt_kernel.products.tiles import Form, blocks_of, gram_of

Part = LinearPart | LinearOutputPart | EmbeddingPart | ExplicitPart | UnusedPart


@dataclass(frozen=True)
class Factor:
    """J_α of one layer (or of a whole network, as the sum over its parts), [N·C, P] as an operator.

    Arrays may carry leading batch dimensions (stacked twins), written ``...``; N samples, C outputs, P parameters.
    """

    name: str
    parts: tuple[Part, ...]
    shapes: Mapping[str, torch.Size]  # parameter shapes, in named_parameters() order

    @property
    def kinds(self) -> dict[str, str]:
        """How each parameter is seen: "linear", "convolution", "normalisation", "embedding", "elementwise", "explicit" or
        "unused", or by a function of the user's own."""
        by_name = {name: part.kind for part in self.parts for name in part.names}
        return {name: by_name[name] for name in self.shapes}

    def to(self, dtype: torch.dtype) -> "Factor":
        """The same factor in another floating-point type."""
        return Factor(self.name, tuple(part.to(dtype) for part in self.parts), self.shapes)

    def runs(self, which: slice) -> "Factor":
        """Of a stacked factor, the runs ``which`` (a slice of the leading dimension)."""
        return Factor(self.name, tuple(part.runs(which) for part in self.parts), self.shapes)

    def rows(self, n: int) -> "Factor":
        """The factor on its first n samples."""
        return Factor(self.name, tuple(part.rows(n) for part in self.parts), self.shapes)

    def forms(self, mass: Mass = 1.0) -> list[Form]:
        """J D^(−1/2) as the forms that Gram products are made of (``nt_kernel.products.forms``)."""
        mass = self.resolved_mass(mass)
        return [form for part in self.parts for form in part.forms(mass)]

    def gram(self, other: "Factor | None" = None, mass: Mass = 1.0) -> Tensor:
        """J D⁻¹J'ᵀ, [..., N, C, N', C]; ``other`` is the same layer seen on other points (default: the same).

        ``mass`` (μ, the entries of D): a number, or a dict by parameter or layer name (``nt_kernel.mass``).
        """
        if other is None or other is self:
            return gram_of(self.forms(mass))
        mine, theirs = matching(self, other)
        return gram_of(mine.forms(mass), theirs.forms(mass))

    def decouples(self, mass: Mass = 1.0) -> bool:
        """True where J D⁻¹Jᵀ = A ⊗ I_C (an output layer): :meth:`sample_gram` then says it all."""
        (part, *more) = self.parts
        return not more and isinstance(part, LinearOutputPart) and part.decouples(self.resolved_mass(mass))

    def sample_gram(self, other: "Factor | None" = None, mass: Mass = 1.0) -> Tensor:
        """A [..., N, N'] of a factor that decouples."""
        (form,), (second,) = self.forms(mass), (other or self).forms(mass)
        return form.sample_gram(second)

    def explicit(self) -> "Factor":
        """The same factor with every Jacobian formed."""
        parts = []
        for part in self.parts:
            for name, J in part.dense().items():
                parts.append(ExplicitPart(J, name, tuple(self.shapes[name]), part.kind))
        return Factor(self.name, tuple(sorted(parts, key=lambda part: part.name)), self.shapes)

    def block_gram(self, mass: Mass = 1.0) -> Tensor:
        """The diagonal blocks J_i D⁻¹J_iᵀ, [..., N, C, C]."""
        return blocks_of(self.forms(mass))

    def block_norms(self) -> Tensor:
        """Spectral norms ‖J_i‖₂ of the per-sample Jacobians of this layer, [..., N]."""
        return torch.linalg.eigvalsh(self.block_gram())[..., -1].clamp_min(0).sqrt()

    def jvp(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """J u, [..., N, C], for u by full parameter name; a leading batch [R, …] is allowed, a missing name is zero.

        Raises ValueError for a name that is not this layer's or a tensor of the wrong shape.
        """
        for name, u in tangent.items():
            if name not in self.shapes:
                raise ValueError(f"layer {self.name!r} has no parameter {name!r}; it has {', '.join(self.shapes)}")
            shape = tuple(self.shapes[name])
            if tuple(u.shape[u.dim() - len(shape) :]) != shape:
                raise ValueError(
                    f"tangent of {name!r} has shape {tuple(u.shape)}, expected [..., {', '.join(map(str, shape))}]"
                )
        return _total(part.jvp(tangent) for part in self.parts)

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v by full parameter name, for v [..., N, C]; a leading batch [R, …] is allowed."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found.update(part.vjp(v))
        return {name: found[name] for name in self.shapes}

    def dense(self) -> Tensor:
        """J as [..., N, C, P], columns in ``named_parameters()`` order. For tests: this is what the rest avoids."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found.update(part.dense())
        return torch.cat([found[name] for name in self.shapes], -1)

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(prod(shape) for shape in self.shapes.values())

    def resolved_mass(self, mass: Mass) -> Masses:
        """{parameter: μ} of this layer, checked (``nt_kernel.mass``)."""
        if isinstance(mass, dict) and mass.keys() >= self.shapes.keys():  # for the whole model or more
            mass = {name: mass[name] for name in self.shapes}
        return resolve_mass(mass, {self.name: tuple(self.shapes)}, self.shapes)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)  # sum() would start by adding 0, a copy of the first Gram matrix


def matching(a: Factor, b: Factor) -> tuple[Factor, Factor]:
    """The same layer on two point sets in the same parts, by explicit Jacobians where their plans differ."""
    alike = [(type(part), part.names) for part in a.parts] == [(type(part), part.names) for part in b.parts]
    return (a, b) if alike else (a.explicit(), b.explicit())


def layer_factors(
    model: nn.Module, x, *, params: Mapping[str, Tensor] | None = None, output: Callable | None = None
) -> tuple[Tensor, dict[str, Factor]]:
    """Outputs and Jacobian factors of every layer, in one pass; pure.

    Parameters
    ----------
    model: any ``nn.Module`` whose samples do not interact; x: [N, …] or a tuple of such inputs.
    params: where to look, {name: tensor} for every trainable parameter; default, the model's own values.
    output: selects the tensor to differentiate where the model returns a tuple or dict.

    Returns
    -------
    outputs [N, C] ([N] counts as C = 1, [N, …] is flattened) and ``{layer name: Factor}``. A layer is a module that owns
    trainable parameters, named by its qualified name ("." for the root).

    Raises ValueError for a model without per-sample Jacobians (dropout or BatchNorm in training mode, interacting
    samples), naming the layer, and for ``params`` that are not the model's.

    >>> model = nn.Linear(2, 1)
    >>> outputs, factors = layer_factors(model, torch.tensor([[3.0, 4.0]]))
    >>> factors["."].gram().item(), factors["."].kinds  # ‖a‖² + 1, the bias counted
    (26.0, {'weight': 'linear', 'bias': 'linear'})
    """
    batch_size(x)
    own, fixed = split_state(model)
    params = own if params is None else named_like(own, params)
    plan = make_plan(model, x, output)
    try:
        observation = observe(model, plan, fast_formats(plan, params), fixed, x)
    except StalePlan:
        plan = make_plan(model, x, output, anew=True)
        observation = observe(model, plan, fast_formats(plan, params), fixed, x)
    return observation.outputs, factors_of(plan, observation, {n: p.shape for n, p in params.items()})


def named_like(own: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``params`` in the order of ``own``, detached; ValueError where names or shapes differ.

    >>> named_like({"w": torch.zeros(2)}, {"w": torch.zeros(3)})
    Traceback (most recent call last):
    ValueError: params['w'] has shape (3,), the model's has (2,)
    """
    if missing := own.keys() ^ params.keys():
        raise ValueError(
            f"params must hold exactly the trainable parameters of the model by name; differing: {', '.join(sorted(missing))}"
        )
    for name, p in own.items():
        if params[name].shape != p.shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(params[name].shape)}, the model's has {tuple(p.shape)}"
            )
    return {name: params[name].detach() for name in own}


def factors_of(plan: Plan, observation, shapes: Mapping[str, torch.Size]) -> dict[str, Factor]:
    """Factors from an observation that was made elsewhere (under ``vmap``, say)."""
    parts = parts_of(plan, observation, shapes)
    return {
        layer: Factor(layer, tuple(parts[layer]), {n: shapes[n] for n in names}) for layer, names in plan.layers.items()
    }


def join_factors(factors: Mapping[str, Factor]) -> Factor:
    """All layers as one factor (``blocks="network"``): J = [J_1 … J_N], its Gram the sum of theirs."""
    shapes = {name: shape for f in factors.values() for name, shape in f.shapes.items()}
    return Factor("network", tuple(part for f in factors.values() for part in f.parts), shapes)


def stacked_layer_factors(
    model: nn.Module, params: Mapping[str, Tensor], x, *, output: Callable | None = None
) -> tuple[Tensor, dict[str, Factor]]:
    """The same for K networks at once: ``params`` {name: [K, …]}, x [K, N, …] (or several) → outputs [K, N, C], stacked
    factors.

    ``model`` gives the architecture (and its buffers and frozen parameters, shared by all); its own values are not used.

    >>> model = nn.Linear(2, 1)
    >>> params = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters()}
    >>> outputs, factors = stacked_layer_factors(model, params, torch.ones(2, 5, 2))
    >>> outputs.shape, factors["."].gram().shape
    (torch.Size([2, 5, 1]), torch.Size([2, 5, 1, 5, 1]))
    """
    first = x[0] if isinstance(x, Tensor) else tuple(t[0] for t in x)
    plan = make_plan(model, first, output)
    _, fixed = split_state(model)

    def one(values, points):
        seen = observe(model, plan, values, fixed, points)
        return seen.outputs, seen.features, seen.deltas, seen.sums, seen.jacobians

    try:
        observation = Observation(*torch.func.vmap(one)(dict(params), x))
    except StalePlan:
        plan = make_plan(model, first, output, anew=True)
        observation = Observation(*torch.func.vmap(one)(dict(params), x))
    return observation.outputs, factors_of(plan, observation, {n: p.shape[1:] for n, p in params.items()})
