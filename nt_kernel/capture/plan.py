"""Which parameter is seen by structure and which explicitly; checked once per model against autograd.

The structure is read off the calls a first forward pass makes (``nt_kernel.capture.structures``), the place of the samples in
their arrays off a second pass on another number of samples. The safety net is a random vector: Σ Jᵀv over the captured
calls must be autograd's gradient of ⟨v, f(x)⟩ for every parameter. A parameter that fails (a use without structure beside
one with) falls back to the explicit Jacobian; one that fails even so makes the model one whose samples interact or whose
forward is random, and it is refused by name. The check is made at the parameters and at a point nearby, because a gate
that starts at zero hides whatever stands behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nt_kernel.capture.elementwise import elementwise_sums, repeats_over_samples
from nt_kernel.capture.explicit import ExplicitPart
from nt_kernel.capture.linear_output import LinearOutputPart
from nt_kernel.capture.observe import as_inputs, batch_size, check_finite, is_chain, observe, run_model, select_samples
from nt_kernel.capture.probe import (
    Record,
    layout_of,
    refuse_interaction,
    refuse_modules,
    refuse_parameters,
    refuse_random,
    split_state,
)
from nt_kernel.capture.site import Observation, Plan, Site
from nt_kernel.capture.structures import Names, is_convolution, structure_of
from nt_kernel.capture.trail import Trail
from nt_kernel.capture.unused import UnusedPart

_PLANS: WeakKeyDictionary = WeakKeyDictionary()
MOST_PLANS = 16  # of one model: the oldest goes


def make_plan(model: nn.Module, x, output=None, anew: bool = False) -> Plan:
    """The checked plan of ``model`` for inputs like ``x``; made once per model, mode and shape, then remembered.

    Raises ValueError for a model in training mode with dropout or BatchNorm, without trainable parameters, with a forward
    that torch.func cannot differentiate (a checkpointed block), or whose per-sample Jacobian is not what autograd says
    (samples that interact, a random forward), naming the culprit; for x that is not finite, or parameters that give
    outputs that are not.
    """
    key = _signature(model, x, output)
    plans = _PLANS.setdefault(model, {})
    if anew or key not in plans:
        refuse_modules(model)
        plan = _checked(model, _guess(model, x, output), x)
        if plan.volatile:
            return plan
        plans.pop(key, None)
        plans[key] = replace(plan, output=None)  # which may hold the model itself
        while len(plans) > MOST_PLANS:
            del plans[next(iter(plans))]
    return replace(plans[key], output=output)


def trainable_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """{layer: full names of the trainable parameters it owns}; a tied parameter belongs to its first owner.

    >>> trainable_layers(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)))
    {'0': ('0.weight', '0.bias'), '2': ('2.weight',)}
    """
    layers: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0] or ".", []).append(name)
    return {layer: tuple(names) for layer, names in layers.items()}


def fast_formats(plan: Plan, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, kernels of two-dimensional convolutions in channels-last format.

    On CPU the passes of narrow convolutions are up to four times as fast so. Only where no gradient is taken of them: torch
    2.13 corrupts memory in the gradient of the kernel of some narrow float32 convolutions in that format.
    """
    kernels = {s.weight for s in plan.sites if is_convolution(s.structure) and s.options[-1] == 1}
    return {
        n: p.contiguous(memory_format=torch.channels_last) if n in kernels and p.dim() == 4 else p
        for n, p in params.items()
    }


def parts_of(plan: Plan, observation: Observation, shapes: Mapping[str, torch.Size]) -> dict[str, list]:
    """The Jacobian parts of each layer, from one observation."""
    lead = observation.outputs.dim() - 2
    owner = {name: layer for layer, names in plan.layers.items() for name in names}
    parts: dict[str, list] = {layer: [] for layer in plan.layers}
    for (weight, bias), sites in _by_tensors(plan.sites).items():
        parts[owner[weight or bias]] += _parts_of_group(weight, bias, sites, observation, lead)
    for name in plan.unused:
        parts[owner[name]].append(UnusedPart(observation.outputs, name, tuple(shapes[name])))
    for name, jacobian in observation.jacobians.items():
        parts[owner[name]].append(ExplicitPart(jacobian, name, tuple(shapes[name])))
    return parts


def _by_tensors(sites: Sequence[Site]) -> dict[tuple, list[Site]]:
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        groups.setdefault((site.weight, site.bias), []).append(site)
    return groups


def _parts_of_group(weight, bias, sites: list[Site], seen: Observation, lead: int) -> list:
    N, first = seen.outputs.shape[-2], sites[0]
    if first.is_output:
        features = first.layout.samples_first(seen.features[first.index], N, lead)
        return [LinearOutputPart(features, seen.outputs.shape[-1], weight, bias)]
    if first.contracted:
        parts = []
        for side, name, shape in (("weight", weight, first.weight_shape), ("bias", bias, first.bias_shape)):
            if name:
                J = reduce(torch.add, (seen.sums[site.index][side] for site in sites))
                parts.append(ExplicitPart(J, name, shape, first.structure.kind))
        return parts
    pieces = []
    for site in sites:
        features = site.layout.samples_first(seen.features[site.index], N, lead)
        deltas = site.layout.samples_first(seen.deltas[site.index], N, lead + 1).movedim(lead, lead + 1)
        pieces.append((site.structure.inputs(features, lead, site), site.structure.deltas(deltas, lead, site)))
    return first.structure.parts(pieces, Names(weight, bias, first.weight_shape), first.options)


def _signature(model: nn.Module, x, output) -> tuple:
    inputs = tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else repr(t) for t in as_inputs(x))
    refuse_parameters(model)
    state = tuple((n, p.requires_grad, tuple(p.shape)) for n, p in model.named_parameters())
    modules = tuple((type(m), m.training, bool(m._backward_hooks or m._backward_pre_hooks)) for m in model.modules())
    return inputs, state, modules, _identity(output)


def _identity(output) -> object:
    """What tells one ``output`` from another: of a function that encloses nothing, its code."""
    if getattr(output, "__code__", None) is not None and output.__closure__ is None:
        return output.__code__, output.__defaults__
    return None if output is None else id(output)


def _guess(model: nn.Module, x, output) -> Plan:
    layers = trainable_layers(model)
    if not layers:
        raise ValueError("the model has no trainable parameters (all have requires_grad=False)")
    N = batch_size(x)
    here = Record(model, x, output)
    check_finite(x, here.y)
    types = {p.dtype for p in model.parameters() if p.requires_grad} | {here.y.dtype}
    if len(types) > 1:
        raise ValueError(
            f"the trainable parameters and the output have several dtypes, {', '.join(sorted(map(str, types)))}; layer "
            "factors need one: write model.to(dtype), and no autocast"
        )
    refuse_random(here, Record(model, x, output))
    other = Record(model, select_samples(x, slice(0, 1) if N > 1 else [0, 0]), output)
    if N == 1:
        refuse_interaction(other, here, 0)
    else:
        refuse_interaction(here, other, 0)
        refuse_interaction(here, Record(model, select_samples(x, slice(N - 1, N)), output), N - 1)
    final = here.watch.final(here.out)
    sites, hidden = [], here.watch.hidden | other.watch.hidden
    if [c[:1] + c[2:4] for c in here.calls] == [c[:1] + c[2:4] for c in other.calls]:
        for index, (mine, theirs) in enumerate(zip(here.calls, other.calls, strict=True)):
            site = _site(index, mine, theirs, N, last=output is None and index == final)
            if site is not None:
                sites.append(site)
            else:
                hidden |= {name for name in mine[2:4] if name}
    sites = _separated(sites, layers)
    touched = hidden | {name for call in here.watch.path + other.watch.path for name in call[1:3]}
    unused = tuple(name for own in layers.values() for name in own if name not in touched)
    plan = Plan(layers, tuple(sites), (), unused, output, tuple(here.watch.path), final, here.watch.volatile)
    return _with_explicit(plan, [*_mixed(sites), *hidden], N)


def _site(index: int, mine: tuple, theirs: tuple, N: int, last: bool) -> Site | None:
    structure, call, weight, bias, out = mine
    layout = layout_of(out, theirs[4], N)
    if layout is None:
        return None
    last = last and out.dim() == 2 and structure is structure_of(F.linear)
    shape = tuple(call.weight.shape) if isinstance(call.weight, Tensor) else tuple(call.bias.shape)
    if structure.contract is elementwise_sums and not repeats_over_samples(shape, out.shape, layout.axis):
        return None
    bias_shape = tuple(call.bias.shape) if isinstance(call.bias, Tensor) else ()
    return Site(index, structure, weight, bias, shape, bias_shape, tuple(out.shape), layout, call.options, last)


def _separated(sites: list[Site], layers: dict[str, tuple[str, ...]]) -> list[Site]:
    """Weight and bias as sites of their own where they are not always used together, or belong to two layers."""
    owner = {name: layer for layer, names in layers.items() for name in names}
    pairs = {(s.weight, s.bias) for s in sites}
    partners = {n: [p for p in pairs if n in p] for pair in pairs for n in pair if n is not None}
    separated = []
    for site in sites:
        names = [n for n in (site.weight, site.bias) if n is not None]
        if len({owner[n] for n in names}) == 1 and all(len(partners[n]) == 1 for n in names):
            separated.append(site)
        else:
            kept = ((site.weight, None), (None, site.bias))
            separated += [replace(site, weight=w, bias=b) for w, b in kept if w or b]
    return separated


def _mixed(sites: list[Site]) -> list[str]:
    """Parameters that are used in two ways, whose cross terms no structure has."""
    uses: dict[str, set] = {}
    for site in sites:
        for name in (site.weight, site.bias):
            if name is not None:
                uses.setdefault(name, set()).add((site.structure.kind, site.structure.parts, site.options[-1:]))
    return [name for name, ways in uses.items() if len(ways) > 1]


def _with_explicit(plan: Plan, names: Sequence[str], N: int) -> Plan:
    """The plan with ``names``, and all that no call explains, seen explicitly."""
    sites = []
    for site in plan.sites:
        weight, bias = (None if n in names else n for n in (site.weight, site.bias))
        if weight or bias:
            sites.append(replace(site, weight=weight, bias=bias))
    # Where a tensor is used several times the last call's δ is the identity, but the others' are not.
    shared = {s.index for group in _by_tensors(sites).values() if len(group) > 1 for s in group}
    sites = [replace(s, is_output=False) if s.index in shared else s for s in sites]
    groups = list(_by_tensors(sites).values())
    contracted = {s.index for group in groups if _contracts(group, N) for s in group}
    while more := {s.index for g in groups if contracted & {s.index for s in g} for s in g} - contracted:
        contracted |= more  # a call is contracted for all that it explains, and a tensor in all its calls
    sites = [replace(s, contracted=s.index in contracted) for s in sites]
    unused = tuple(n for n in plan.unused if n not in names)
    seen = {n for site in sites for n in (site.weight, site.bias)}.union(unused)
    explicit = tuple(n for own in plan.layers.values() for n in own if n not in seen)
    return replace(plan, sites=tuple(sites), explicit=explicit, unused=unused)


def _contracts(group: Sequence[Site], N: int) -> bool:
    """True where the per-sample Jacobian is smaller than the δ of all positions, or there is no other way."""
    first = group[0]
    if first.structure.parts is None or (is_convolution(first.structure) and first.options[-1] > 1):
        return True
    if first.is_output or first.structure.contract is None:
        return False
    features = first.weight_shape[1 if first.options == ("transposed",) else 0]
    positions = sum(prod(site.shape) for site in group) // (N * features)
    return positions > prod(first.weight_shape) // features


def _checked(model: nn.Module, plan: Plan, x) -> Plan:
    params, fixed = split_state(model)
    plan = _checked_at(model, plan, params, fixed, x)
    draw = torch.Generator().manual_seed(1)
    nearby = {name: _jittered(p, draw) for name, p in params.items()}
    if bool(run_model(model, {**nearby, **fixed}, x, plan.output).isfinite().all()):
        plan = _checked_at(model, plan, nearby, fixed, x)
    return replace(plan, chain=is_chain(model, plan, params, fixed, x))


def _jittered(p: Tensor, draw: torch.Generator) -> Tensor:
    size = p.square().mean().sqrt()
    noise = torch.randn(p.shape, generator=draw, dtype=p.dtype).to(p.device)
    return p + 0.1 * torch.where(size > 0, size, 1) * noise


def _checked_at(model: nn.Module, plan: Plan, params: dict[str, Tensor], fixed: dict[str, Tensor], x) -> Plan:
    v, expected = _autograd(model, plan, params, fixed, x)
    wrong = _disagreement(model, plan, params, fixed, x, v, expected)
    if wrong:
        plan = _with_explicit(plan, wrong, len(v))
        wrong = _disagreement(model, plan, params, fixed, x, v, expected)
    if wrong:
        raise ValueError(
            f"the per-sample Jacobian of {', '.join(map(repr, wrong))} disagrees with autograd on the batch: the samples "
            "of this model interact (a normalisation over the batch?) or its forward is random; neither has an NTK"
        )
    return plan


def _autograd(model: nn.Module, plan: Plan, params, fixed, x) -> tuple[Tensor, dict[str, Tensor]]:
    """A random v [N, C] and autograd's Jᵀv for every parameter."""
    with Trail(model) as trail:
        try:
            y, pull_back = torch.func.vjp(lambda values: run_model(model, {**values, **fixed}, x, plan.output), params)
            draw = torch.Generator().manual_seed(0)
            v = torch.randn(y.shape, generator=draw, dtype=y.dtype).to(y.device)
            return v, pull_back(v)[0]
        except RuntimeError as error:
            raise ValueError(
                f"layer {trail.culprit!r} cannot be differentiated by torch.func, which layer factors rest on: "
                f"{str(error).splitlines()[0]}{_advice(str(error))}"
            ) from error


def _advice(error: str) -> str:
    if "saved tensor hooks" in error or "setup_context" in error:
        return " (if this is activation checkpointing, switch it off: it saves memory in training only)"
    return ""


def _disagreement(model, plan: Plan, params, fixed, x, v: Tensor, expected: dict[str, Tensor]) -> list[str]:
    shapes = {n: p.shape for n, p in params.items()}
    with Trail(model) as trail:
        try:
            seen = observe(model, plan, params, fixed, x)
        except RuntimeError as error:
            raise ValueError(
                f"torch.func cannot batch layer {trail.culprit!r}, which the per-sample Jacobians of "
                f"{', '.join(map(repr, plan.explicit)) or 'all parameters'} need: {str(error).splitlines()[0]}"
            ) from error
    parts = parts_of(plan, seen, shapes)
    found: dict[str, Tensor] = {}
    for part in (part for layer in parts.values() for part in layer):
        found.update(part.vjp(v))
    eps = torch.finfo(v.dtype).eps
    floor = 1000 * eps * max(g.norm().item() for g in expected.values())  # what cancels is known to rounding only
    return [n for n, g in expected.items() if not (found[n] - g).norm().item() <= eps**0.5 * g.norm().item() + floor]
