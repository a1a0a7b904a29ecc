"""How many operations the structured algorithm needs for a Gram matrix, and the machine's rate for such products.

A layer with inputs a_{is} and sensitivities δ_{ics} at T positions of N samples (C outputs, d inputs, o units) takes the
cheaper of two routes,

    pairs:   2 N²T²(d + C²o) (+ 2 N²C²T² to sum over positions),      T = 1:  2 (NC)² o + 2 N² d
    summed:  2 NC·T·o·d + 2 (NC)² o·d                                 (J_i = Σ_s δ_s ⊗ a_s, then J Jᵀ)

the output layer 2 N² d, everything else 2 (NC)² P. A convolution is a layer with T output positions and d = channels × window.
Products of the full NC × NC matrix are counted: a program that uses its symmetry does half of them and can exceed a
fraction of 1. Forward and backward passes are not counted, so the fraction is a lower bound of the hardware's use.
"""

import torch
from torch import Tensor, nn

from benchmarks.timing import Gemm
from benchmarks.workloads import Modern, Workload


def layer_flops(N: int, C: int, T: int, d: int, o: int) -> int:
    """The cheaper route of one layer.

    >>> layer_flops(N=2, C=3, T=1, d=5, o=7) == 2 * 6**2 * 7 + 2 * 2**2 * 5
    True
    """
    pairs = 2 * N**2 * T**2 * (d + C**2 * o) + (2 * N**2 * C**2 * T**2 if T > 1 else 0)
    return min(pairs, 2 * N * C * T * o * d + 2 * (N * C) ** 2 * o * d)


def gram_flops(model: nn.Module, x: Tensor) -> int:
    """Operations in the Gram products of a network of linear layers, convolutions and anything else.

    >>> gram_flops(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.zeros(2, 5))
    600
    """
    positions: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}  # kept alive: a freed tensor gives its identity to the next

    def watch(name: str):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            units = module.out_channels if isinstance(module, nn.Conv2d) else out.shape[-1]
            positions[name], outputs[name] = out[0].numel() // units, out

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            y = model(x)
    finally:
        for handle in handles:
            handle.remove()
    N, C = y.shape
    total = 0
    for name, module in model.named_modules():
        P = sum(p.numel() for p in module.parameters(recurse=False))
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.MultiheadAttention):
            total += layer_flops(N, C, positions[name], module.embed_dim, 3 * module.embed_dim)
        elif isinstance(module, nn.Linear) and outputs.get(name) is y:
            total += 2 * N**2 * module.in_features
        elif isinstance(module, nn.Linear | nn.Conv2d):
            # A linear inside attention is used without being called; it passes the positions of its parent.
            T = positions.get(name) or positions[name.rpartition(".")[0]]
            total += layer_flops(N, C, T, weight[0].numel(), len(weight))
        elif P:
            total += 2 * (N * C) ** 2 * P
    return total


def yardstick(workload: Workload | Modern, model: nn.Module, x: Tensor) -> Gemm:
    """Plain products [NC, o] · [o, NC] for the hidden widths o of an MLP, for o = 1024 otherwise, into a given matrix."""
    rows = len(x) * workload.outputs
    inner = workload.sizes[1:-1] if isinstance(workload, Workload) else (1024,)
    like = next(model.parameters()).detach()
    generator = torch.Generator().manual_seed(0)
    left = [torch.randn(rows, o, generator=generator, dtype=torch.float64).to(like) for o in inner]
    right = [a.clone() for a in left]
    out = like.new_empty(rows, rows)

    def run() -> None:
        for a, b in zip(left, right, strict=True):
            torch.mm(a, b.mT, out=out)

    return Gemm(run, 2.0 * rows**2 * sum(inner), gram_flops(model, x))
