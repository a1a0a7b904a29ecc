"""Kernels of one class at a time, K_{(i,c),(j,c)}, and their sum over classes: what two classes share is never formed.

For J_{ic} = Σ_s δ_{ics} ⊗ a_{is} the trace is one product, Σ_{s,t} (a_{is}·a_{jt})·(Σ_c δ_{ics}·δ_{jct}), in which the classes
of δ are further columns; the diagonal is C products. Masses are folded in (``nt_kernel.products.forms``).
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.positions import Positions
from nt_kernel.products.tiles import Form

# All positions of some samples against all positions of the others are held this many bytes at a time.
CHUNK_BYTES = 32 * 2**20


def diagonal_of(forms: Sequence[Form], others: Sequence[Form] | None = None) -> Tensor:
    """Σ_k (J_k J'_kᵀ)_{(i,c),(j,c)}, [N, M, C]: the kernel of every class with itself.

    >>> form = Outer(torch.tensor([[2.0]]), torch.tensor([[[3.0], [1.0]]]))  # two classes
    >>> diagonal_of([form])
    tensor([[[36.,  4.]]])
    """
    return _sum(forms, others, "cnm").movedim(0, -1)


def trace_of(forms: Sequence[Form], others: Sequence[Form] | None = None) -> Tensor:
    """Σ_k Σ_c (J_k J'_kᵀ)_{(i,c),(j,c)}, [N, M]: the sum over classes, not their mean.

    >>> trace_of([Outer(torch.tensor([[2.0]]), torch.tensor([[[3.0], [1.0]]]))])
    tensor([[40.]])
    """
    return _sum(forms, others, "nm")


def _sum(forms: Sequence[Form], others: Sequence[Form] | None, kept: str) -> Tensor:
    pairs = zip(forms, forms if others is None else others, strict=True)
    return reduce(Tensor.add_, (_PRODUCT[type(a)](a, b, kept) for a, b in pairs))


def _outer(a: Outer, b: Outer, kept: str) -> Tensor:
    return torch.einsum(f"nco,mco->{kept}", a.deltas, b.deltas).mul_(a.inputs @ b.inputs.mT)


def _flat(a: Flat, b: Flat, kept: str) -> Tensor:
    return torch.einsum(f"ncp,mcp->{kept}", a.jacobian, b.jacobian)


def _decoupled(a: Decoupled, b: Decoupled, kept: str) -> Tensor:
    gram = a.sample_gram(b)
    return gram.mul_(a.outputs) if kept == "nm" else gram.expand(a.outputs, -1, -1).clone()


def _weighted(a: Weighted, b: Weighted, kept: str) -> Tensor:
    return reduce(Tensor.add_, (_flat(left, right, kept) for left, right in a.pieces(b)))


def positions_costs(N: int, M: int, C: int, T: int, U: int, o: int, d: int, lookup: bool = False) -> dict[str, float]:
    """Multiplications of the two routes (``nt_kernel.products.positions``) when classes do not meet.

    >>> costs = positions_costs(8, 8, 10, 784, 784, 32, 144)
    >>> min(costs, key=costs.get)
    'summed'
    """
    return {
        "summed": N * M * C * o * d + (N * T + M * U) * C * o * d,
        "pairs": N * M * T * U * ((1 if lookup else d) + C * o + 1),
    }


def _positions(a: Positions, b: Positions, kept: str) -> Tensor:
    (N, C, T, o), (M, _, U, _) = a.deltas.shape, b.deltas.shape
    costs = positions_costs(N, M, C, T, U, o, a.width, bool(a.vocabulary))
    if costs["summed"] <= costs["pairs"]:
        left = Flat(a.summed())
        return _flat(left, left if a is b else Flat(b.summed()), kept)
    step = max(1, CHUNK_BYTES // (3 * T * M * U * a.deltas.element_size()))
    blocks = [slice(start, start + step) for start in range(0, N, step)]
    return torch.cat([_positions_pairs(a.rows(which), b, kept) for which in blocks], -2)


def _positions_pairs(a: Positions, b: Positions, kept: str) -> Tensor:
    if a.vocabulary:
        meetings = (a.inputs[:, :, None, None] == b.inputs).to(a.deltas.dtype)
    else:
        meetings = torch.einsum("nsd,mtd->nsmt", a.inputs, b.inputs)

    def of(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("ncso,mcto->nsmt", left, right).mul_(meetings).sum((1, 3))

    if kept == "nm":
        return of(a.deltas, b.deltas)
    return torch.stack([of(a.deltas[:, c, None], b.deltas[:, c, None]) for c in range(a.deltas.shape[1])])


_PRODUCT: dict[type, Callable[..., Tensor]] = {
    Outer: _outer,
    Flat: _flat,
    Decoupled: _decoupled,
    Weighted: _weighted,
    Positions: _positions,
}
