"""Which layer is seen by structure and which explicitly; checked once per model against autograd.

The structure of a layer is a guess from its type. The safety net is a random vector: Σ Jᵀv over the captured layers
must be autograd's gradient of ⟨v, f(x)⟩ for every parameter. A parameter that fails (used twice, tied, read by a
function behind the module's back) falls back to the explicit Jacobian; one that fails even so makes the model one whose
samples interact or whose forward is random, and it is refused by name. The check is made at the parameters and at a
point nearby, because a gate that starts at zero hides whatever stands behind it.
"""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nt_kernel.capture import LinearSite, Plan, as_inputs, batch_size, check_finite, observe, run_model, submodule
from nt_kernel.explicit import ExplicitPart
from nt_kernel.linear import LinearPart
from nt_kernel.linear_output import LinearOutputPart

_PLANS: WeakKeyDictionary = WeakKeyDictionary()


def make_plan(model: nn.Module, x, output=None) -> Plan:
    """The checked plan of ``model`` for inputs like ``x``; made once per model, mode and shape, then remembered.

    Raises ValueError for a model in training mode with dropout or BatchNorm, without trainable parameters, or whose
    per-sample Jacobian is not what autograd says (samples that interact, a random forward), naming the culprit; for x
    that is not finite, or parameters that give outputs that are not.
    """
    key = _signature(model, x, output)
    plans = _PLANS.setdefault(model, {})
    if key not in plans:
        _refuse_random_modules(model)
        plans[key] = _checked(model, _guess(model, x, output), x)
    return plans[key]


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


def split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trainable parameters, everything else the forward reads), both detached and by name."""
    params, fixed = {}, {name: b.detach() for name, b in model.named_buffers()}
    for name, p in model.named_parameters():
        (params if p.requires_grad else fixed)[name] = p.detach()
    return params, fixed


def parts_of(plan: Plan, observation, shapes: dict[str, torch.Size]) -> dict[str, list]:
    """The Jacobian parts of each layer, from one observation."""
    parts: dict[str, list] = {}
    for layer, names in plan.layers.items():
        found = []
        if layer in plan.linear:
            site = plan.linear[layer]
            found.append(_linear_part(site, observation, layer))
        found += [
            ExplicitPart(observation.jacobians[n], n, tuple(shapes[n])) for n in names if n in observation.jacobians
        ]
        parts[layer] = found
    return parts


def _linear_part(site: LinearSite, observation, layer: str) -> LinearPart | LinearOutputPart:
    inputs = observation.inputs[layer]
    if site.is_output:
        return LinearOutputPart(inputs, observation.outputs.shape[-1], site.weight, site.bias)
    deltas, tokens = observation.deltas[layer], len(site.shape) > 1
    if tokens:  # every dimension between sample and feature is a position within the sample
        lead = observation.outputs.dim() - 1
        inputs, deltas = inputs.flatten(lead, -2), deltas.flatten(lead + 1, -2)
    return LinearPart(inputs, deltas, site.weight, site.bias, tokens)


def _signature(model: nn.Module, x, output) -> tuple:
    inputs = tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else repr(t) for t in as_inputs(x))
    state = tuple((n, p.requires_grad, tuple(p.shape)) for n, p in model.named_parameters())
    return inputs, state, tuple((type(m), m.training) for m in model.modules()), output


def _refuse_random_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        random = isinstance(module, _DropoutNd) and module.p > 0
        if isinstance(module, _BatchNorm) and not module.training and module.running_mean is None:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) keeps no running statistics, so it makes samples interact "
                "in evaluation mode too and per-sample Jacobians do not exist; write track_running_stats=True"
            )
        if module.training and (random or isinstance(module, _BatchNorm)):
            what = "draws random masks" if random else "makes samples interact"
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) {what} in training mode, so per-sample Jacobians do not "
                "exist; call model.eval() first"
            )


def _guess(model: nn.Module, x, output) -> Plan:
    layers = trainable_layers(model)
    if not layers:
        raise ValueError("the model has no trainable parameters (all have requires_grad=False)")
    calls: dict[str, list] = {layer: [] for layer in layers}
    final: list = []
    N, handles = batch_size(x), []
    for layer in layers:
        module = submodule(model, layer)
        if type(module) is nn.Linear:
            record = calls[layer]
            hook = lambda m, a, k, out, r=record: r.append((out, _version(out)))  # noqa: E731
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    handles.append(model.register_forward_hook(lambda m, a, out: final.append(out)))
    try:
        run_model(model, {k: v for part in split_state(model) for k, v in part.items()}, x, output)
    except RuntimeError as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in as_inputs(x) if isinstance(t, Tensor))
        raise ValueError(f"the model cannot run on x of shape {shapes}: {str(error).splitlines()[0]}") from error
    finally:
        for handle in handles:
            handle.remove()
    linear = {}
    for layer, outs in calls.items():
        if len(outs) == 1 and outs[0][0].dim() >= 2 and outs[0][0].shape[0] == N:
            own = {n.rpartition(".")[2]: n for n in layers[layer]}
            out, version = outs[0]
            untouched = version is not None and version == _version(out)  # no in-place activation after it
            last = output is None and out is final[-1] and untouched and out.dim() == 2
            linear[layer] = LinearSite(own.get("weight"), own.get("bias"), tuple(out.shape[1:]), last)
    structured = {n for site in linear.values() for n in (site.weight, site.bias)}
    explicit = tuple(n for names in layers.values() for n in names if n not in structured)
    return Plan(layers, linear, explicit, output)


def _version(out: Tensor) -> int | None:
    """How often ``out`` was written to in place; None where torch does not count (inference mode)."""
    return None if out.is_inference() else out._version


def _checked(model: nn.Module, plan: Plan, x) -> Plan:
    params, fixed = split_state(model)
    check_finite(x, run_model(model, {**params, **fixed}, x, plan.output))
    plan = _checked_at(model, plan, params, fixed, x)
    draw = torch.Generator().manual_seed(1)
    nearby = {name: _jittered(p, draw) for name, p in params.items()}
    if bool(run_model(model, {**nearby, **fixed}, x, plan.output).isfinite().all()):
        plan = _checked_at(model, plan, nearby, fixed, x)
    return plan


def _jittered(p: Tensor, draw: torch.Generator) -> Tensor:
    size = p.square().mean().sqrt()
    noise = torch.randn(p.shape, generator=draw, dtype=p.dtype).to(p.device)
    return p + 0.1 * torch.where(size > 0, size, 1) * noise


def _checked_at(model: nn.Module, plan: Plan, params: dict[str, Tensor], fixed: dict[str, Tensor], x) -> Plan:
    y, pull_back = torch.func.vjp(lambda values: run_model(model, {**values, **fixed}, x, plan.output), params)
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(y.shape, generator=draw, dtype=y.dtype).to(y.device)
    (expected,) = pull_back(v)
    _refuse_interaction(model, {**params, **fixed}, x, y, plan.output)
    wrong = _disagreement(model, plan, params, fixed, x, v, expected)
    if wrong:
        plan = _fall_back(plan, wrong)
        wrong = _disagreement(model, plan, params, fixed, x, v, expected)
    if wrong:
        raise ValueError(
            f"the per-sample Jacobian of {', '.join(map(repr, wrong))} disagrees with autograd on the batch: the samples "
            "of this model interact (a normalisation over the batch?) or its forward is random; neither has an NTK"
        )
    return plan


def _refuse_interaction(model: nn.Module, state: dict[str, Tensor], x, y: Tensor, output) -> None:
    if len(y) < 2:
        return
    first = tuple(t[:1] if isinstance(t, Tensor) else t for t in as_inputs(x))
    gap = (run_model(model, state, first, output)[0] - y[0]).norm().item()
    if not gap <= torch.finfo(y.dtype).eps ** 0.5 * (1 + y[0].norm().item()):
        raise ValueError(
            f"sample 0 gives another output alone than in its batch (they differ by {gap:.2g}): the samples of this model "
            "interact, or its forward is random; neither has a per-sample Jacobian"
        )


def _disagreement(model, plan: Plan, params, fixed, x, v: Tensor, expected: dict[str, Tensor]) -> list[str]:
    shapes = {n: p.shape for n, p in params.items()}
    parts = parts_of(plan, observe(model, plan, params, fixed, x), shapes)
    found: dict[str, Tensor] = {}
    for part in (part for layer in parts.values() for part in layer):
        found.update(part.vjp(v))
    tolerance = torch.finfo(v.dtype).eps ** 0.5
    floor = tolerance * max(g.norm().item() for g in expected.values())
    return [n for n, g in expected.items() if not (found[n] - g).norm().item() <= tolerance * (g.norm().item() + floor)]


def _fall_back(plan: Plan, wrong: list[str]) -> Plan:
    linear = {}
    for layer, site in plan.linear.items():
        weight, bias = (None if n in wrong else n for n in (site.weight, site.bias))
        if weight or bias:
            linear[layer] = replace(site, weight=weight, bias=bias)
    explicit = [n for names in plan.layers.values() for n in names if n in wrong or n in plan.explicit]
    return replace(plan, linear=linear, explicit=tuple(explicit))
