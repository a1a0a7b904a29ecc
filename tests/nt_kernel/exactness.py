"""How far factors and kernels are from a dense torch.func reference in float64, relative to the reference's norm."""

from copy import deepcopy

import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from nt_kernel import generalized_ntk, layer_factors
from tests.nt_kernel.architectures import Architecture
from tests.reference import F64, identity_matrix, layers_of, trainable

TOLERANCE = 1e-12
# A bias ahead of a normalisation has no effect; of such a layer only rounding is left, measured against the network.
FLOOR = 1e-3
SCALES = {"mean": lambda n: 1 / n, "sum": lambda n: 1.0, "none": lambda n: 0.0}


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """‖found − expected‖/max(‖expected‖, floor); 0 where both vanish."""
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    gap, size = (found.double() - expected).norm().item(), max(expected.norm().item(), floor)
    return gap / size if size > 0 else (0.0 if gap == 0 else float("inf"))


def in_float64(model: torch.nn.Module, x):
    """The same network and points with the same values, in float64 (a copy only where that is another precision)."""
    if all(p.dtype != torch.float32 for p in model.parameters()):
        return model, x
    double = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return deepcopy(model).double(), tuple(map(double, x)) if isinstance(x, tuple) else double(x)


def masses(a: Architecture) -> dict[str, float]:
    """{parameter: μ}; the kernels are given the masses by layer, as they stand in ``a``."""
    layers = layers_of(a.model)
    return {n: a.mass[layer] if isinstance(a.mass, dict) else a.mass for layer in layers for n in layers[layer]}


def run(model: torch.nn.Module, params: dict[str, Tensor], x, output=None) -> Tensor:
    """Outputs [N, C] at ``params``; every slot of every module is filled once.

    ``functional_call`` left to tie weights itself puts a module that is registered twice back with the wrong tensors.
    """
    by_id = {id(p): params[n] for n, p in model.named_parameters() if n in params}
    slots = {f"{name}.{own}".lstrip("."): p for name, m in model.named_modules() for own, p in m._parameters.items()}
    state = {slot: by_id.get(id(p), p.detach()) for slot, p in slots.items() if p is not None}
    x = x if isinstance(x, tuple) else (x,)
    y = functional_call(model, state, x, tie_weights=False)
    return (output(y) if output else y).reshape(len(x[0]), -1)


def layer_jacobians(model: torch.nn.Module, x, output=None) -> dict[str, Tensor]:
    """{layer: J [N, C, P]} by ``torch.func.jacrev`` over the whole batch."""
    J = jacrev(lambda params: run(model, params, x, output))(trainable(model))
    return {
        layer: torch.cat([J[n].flatten(2) if J[n].dim() > 2 else J[n][..., None] for n in names], -1)
        for layer, names in layers_of(model).items()
    }


def dense_kernel(J: Tensor, D: Tensor, M: Tensor, c: float) -> Tensor:
    """J(D + c·JᵀMJ)⁻¹Jᵀ for J [NC, P] and M [NC, NC], by singular values, which loses no digits to the condition of G.

    With A = J D^(−1/2), M = LLᵀ and LᵀA = UΣVᵀ, the inverse is V(1 + cΣ²)⁻¹Vᵀ on the rows of V and 1 off them.
    """
    values, vectors = torch.linalg.eigh(M)
    A = J / D.sqrt()
    _, s, V = torch.linalg.svd((vectors * values.clamp_min(0).sqrt()).T @ A, full_matrices=False)
    W = A @ V.T
    rest = A - W @ V
    return (W / (1 + c * s**2)) @ W.T + rest @ rest.T


def factor_errors(a: Architecture) -> dict[str, float]:
    """The largest relative error over the layers of J, the Gram matrices, J u, Jᵀv (single and batched), block Grams."""
    y, factors = layer_factors(a.model, a.x, output=a.output)
    _, others = layer_factors(a.model, a.other, output=a.output)
    exact, x = in_float64(a.plain or a.model, a.x)
    _, other = in_float64(a.plain or a.model, a.other)
    Js, Js2 = layer_jacobians(exact, x, a.output), layer_jacobians(exact, other, a.output)
    names, params, mass = layers_of(exact), trainable(exact), masses(a)
    if list(factors) != list(names):
        raise ValueError(f"layers {list(factors)}, expected {list(names)}")
    gen = torch.Generator().manual_seed(0)
    (N, C), R = y.shape, 3
    v = torch.randn(R, N, C, dtype=F64, generator=gen)
    floor = FLOOR * sum(J.norm().item() for J in Js.values())
    floor2 = FLOOR * sum(J.norm().item() for J in Js2.values())
    found = {"outputs": [relative(y, run(exact, params, x, a.output))]}

    def note(what: str, *args):
        found.setdefault(what, []).append(relative(*args))

    for layer, f in factors.items():
        J, J2 = Js[layer], Js2[layer]
        D = torch.cat([torch.full((params[n].numel(),), mass[n], dtype=F64) for n in names[layer]])
        u = {n: torch.randn(R, *params[n].shape, dtype=F64, generator=gen) for n in names[layer]}
        flat = torch.cat([t.reshape(R, -1) for t in u.values()], -1)
        u = {n: t.to(y.dtype) for n, t in u.items()}
        note("J", f.dense(), J, floor)
        note("gram", f.gram(mass=mass), torch.einsum("ncp,mdp->ncmd", J / D, J), floor**2)
        note("gram", f.gram(), torch.einsum("ncp,mdp->ncmd", J, J), floor**2)
        note("cross gram", f.gram(others[layer], mass), torch.einsum("ncp,mdp->ncmd", J / D, J2), floor * floor2)
        note("cross gram", others[layer].gram(f, mass), torch.einsum("mdp,ncp->mdnc", J2 / D, J), floor * floor2)
        note("block gram", f.block_gram(mass), torch.einsum("ncp,ndp->ncd", J / D, J), floor**2)
        Ju = torch.einsum("ncp,rp->rnc", J, flat)
        note("J u", f.jvp(u), Ju, floor)
        note("J u", f.jvp({n: t[0] for n, t in u.items()}), Ju[0], floor)
        pulled = torch.einsum("ncp,rnc->rp", J, v)
        batched, single = f.vjp(v.to(y.dtype)), f.vjp(v[0].to(y.dtype))
        note("Jᵀ v", torch.cat([batched[n].reshape(R, -1) for n in names[layer]], -1), pulled, floor)
        note("Jᵀ v", torch.cat([single[n].flatten() for n in names[layer]]), pulled[0], floor)
    return {what: max(errors) for what, errors in found.items()}


def positive_metric(y: Tensor) -> Tensor:
    """A user's output metric, definite and different for every sample, [N, C, C]."""
    t = torch.tanh(y)
    return identity_matrix(y) + t[..., :, None] * t[..., None, :]


def kernel_errors(a: Architecture, metrics=("identity", positive_metric)) -> dict[str, float]:
    """The relative error of H = (1/n) J G⁻¹Jᵀ under every scale, both ways to cut it into blocks, and the metrics."""
    exact, x = in_float64(a.plain or a.model, a.x)
    Js, params, names = layer_jacobians(exact, x, a.output), trainable(exact), layers_of(exact)
    y = run(exact, params, x, a.output)
    mass = masses(a)
    errors: dict[str, float] = {}
    for scale, c in SCALES.items():
        for blocks in ("layer", "network"):
            parts = names if blocks == "layer" else {"network": [n for own in names.values() for n in own]}
            for metric in metrics:
                M = torch.block_diag(*(identity_matrix(y) if metric == "identity" else metric(y)))
                total = 0
                for block, own in parts.items():
                    J = Js[block] if blocks == "layer" else torch.cat(list(Js.values()), -1)
                    D = torch.cat([torch.full((params[n].numel(),), mass[n], dtype=F64) for n in own])
                    total = total + dense_kernel(J.flatten(0, 1), D, M, c(len(y))) / len(y)
                options = {"mass": a.mass, "output_metric": metric, "scale": scale, "blocks": blocks}
                H = generalized_ntk(a.model, a.x, **options, output=a.output).matrix
                key = f"H {scale} {blocks}"
                errors[key] = max(errors.get(key, 0.0), relative(H, total))
    return errors
