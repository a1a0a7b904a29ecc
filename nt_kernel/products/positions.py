"""Weights used at several positions of one sample (tokens, patches, repeated calls): J_{ic} = Σ_s δ_{ics} ⊗ a_{is}.

Its Gram matrix is a double sum over positions, Σ_{s,t} (a_{is}·a_{jt})(δ_{ics}·δ_{jdt}), with three ways to take it:

    summed     form the small matrices J_{ic} and multiply them               NM·C²·od + (N + M)·CT·od
    transfer   carry δ_i over to the positions of j, then contract with δ_j   NM(T²d + CT²o + C²To)
    pairs      all products of deltas, weighted by the inputs                 NM·T²(d + C²o)

multiplications each; the cheapest is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.products.forms import Flat, outer_sums, unit_chunks

# The transfer and pairs routes are batches of small products; measured against one large product of as many operations.
SMALL_PRODUCTS = 2.0
ROUTES = ("summed", "transfer", "pairs")


def route_costs(N: int, M: int, C: int, T: int, U: int, o: int, d: int, lookup: bool = False) -> dict[str, float]:
    """Multiplications of each route for N samples with T positions against M with U.

    >>> costs = route_costs(8, 8, 10, 784, 784, 32, 144)
    >>> min(costs, key=costs.get)
    'summed'
    >>> costs = route_costs(8, 8, 10, 4, 4, 256, 2304)
    >>> min(costs, key=costs.get)
    'transfer'
    """
    compare = 1 if lookup else d
    return {
        "summed": N * M * C * C * o * d + (N * T + M * U) * C * o * d,
        "transfer": SMALL_PRODUCTS * N * M * (T * U * compare + C * T * U * o + C * C * U * o),
        "pairs": SMALL_PRODUCTS * N * M * T * U * (compare + C * C * (o + 1)),
    }


@dataclass(frozen=True)
class Positions:
    """``inputs`` a [..., N, T, d] (or, of a lookup, the row numbers [..., N, T]), ``deltas`` δ [..., N, C, T, o].

    ``vocabulary`` is the number of rows of a lookup, 0 for real inputs; ``route`` is fixed by :meth:`matched`.
    """

    inputs: Tensor
    deltas: Tensor
    vocabulary: int = 0
    route: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.deltas.shape[:-2]

    def rows(self, which: slice) -> "Positions":
        skip = (slice(None),) * (1 if self.vocabulary else 2)
        inputs = self.inputs[(..., which, *skip)]
        return Positions(inputs, self.deltas[..., which, :, :, :], self.vocabulary, self.route)

    @property
    def width(self) -> int:
        """d, the number of columns of the weight."""
        return self.vocabulary or self.inputs.shape[-1]

    def cheapest(self, other: "Positions") -> str:
        """The route with the fewest multiplications."""
        (N, C, T, o), (M, _, U, _) = self.deltas.shape[-4:], other.deltas.shape[-4:]
        costs = route_costs(N, M, C, T, U, o, self.width, bool(self.vocabulary))
        return min(ROUTES, key=costs.__getitem__)

    def matched(self, other: "Positions") -> tuple["Positions | Flat", "Positions | Flat"]:
        route = self.route or self.cheapest(other)
        if route == "summed":
            left = Flat(self.summed())
            return left, left if other is self else Flat(other.summed())
        left = Positions(self.inputs, self.deltas, self.vocabulary, route)
        right = left if other is self else Positions(other.inputs, other.deltas, other.vocabulary, route)
        return left, right

    def summed(self) -> Tensor:
        """Σ_s δ_{ics} ⊗ a_{is}, [..., N, C, o·d]."""
        return outer_sums(self.deltas, self._vectors()).flatten(-2)

    def pieces(self, other: "Positions") -> Iterator[tuple[Flat, Flat]]:
        """The two Jacobians of the route "summed", some units o at a time."""
        mine, theirs = self._vectors(), None if other is self else other._vectors()
        for which in unit_chunks(self, other, self.width):
            left = Flat(outer_sums(self.deltas[..., which], mine).flatten(-2))
            yield left, left if other is self else Flat(outer_sums(other.deltas[..., which], theirs).flatten(-2))

    def _vectors(self) -> Tensor:
        if not self.vocabulary:
            return self.inputs
        return torch.nn.functional.one_hot(self.inputs, self.vocabulary).to(self.deltas.dtype)

    def gram(self, other: "Positions") -> Tensor:
        if not self.route:
            left, right = self.matched(other)
            return left.gram(right)
        one = self._pairs if self.route == "pairs" else self._transfer
        return torch.stack([one(i, other) for i in range(self.deltas.shape[-4])], -4)  # one sample against all

    def _meetings(self, i: int, other: "Positions") -> Tensor:
        """a_{is}·a_{jt} of one sample i, [..., T, M·U]."""
        if self.vocabulary:
            return (self.inputs[..., i, :, None] == other.inputs.flatten(-2)[..., None, :]).to(self.deltas.dtype)
        return self.inputs[..., i, :, :] @ other.inputs.flatten(-3, -2).mT

    def _transfer(self, i: int, other: "Positions") -> Tensor:
        C, o = self.deltas.shape[-3], self.deltas.shape[-1]
        M, U = other.deltas.shape[-4], other.deltas.shape[-2]
        own = self.deltas[..., i, :, :, :].movedim(-3, -2).flatten(-2)  # [..., T, C·o]
        carried = self._meetings(i, other).mT @ own  # [..., M·U, C·o]
        carried = carried.unflatten(-1, (C, o)).unflatten(-3, (M, U)).movedim(-2, -3).flatten(-2)  # [..., M, C, U·o]
        return (carried @ other.deltas.flatten(-2).mT).movedim(-3, -2)  # [..., M, C, D] → [..., C, M, D]

    def _pairs(self, i: int, other: "Positions") -> Tensor:
        C, T = self.deltas.shape[-3:-1]
        M, D, U = other.deltas.shape[-4:-1]
        products = self.deltas[..., i, :, :, :].flatten(-3, -2) @ other.deltas.flatten(-4, -2).mT  # [..., CT, M D U]
        products = products.unflatten(-1, (M, D, U)).unflatten(-4, (C, T))
        meetings = self._meetings(i, other).unflatten(-1, (M, U))
        return torch.einsum("...csmdt,...smt->...cmd", products, meetings)

    def block_gram(self) -> Tensor:
        C, T, o = self.deltas.shape[-3:]
        costs = route_costs(1, 1, C, T, T, o, self.width, bool(self.vocabulary))
        if self.route in ("", "summed") and costs["summed"] <= min(costs["transfer"], costs["pairs"]):
            J = self.summed()
            return J @ J.mT
        if self.vocabulary:
            meetings = (self.inputs[..., :, None] == self.inputs[..., None, :]).to(self.deltas.dtype)
        else:
            meetings = self.inputs @ self.inputs.mT  # [..., N, T, T]
        carried = meetings[..., None, :, :] @ self.deltas  # symmetric: Σ_t (a_s·a_t) δ_{ct}
        return carried.flatten(-2) @ self.deltas.flatten(-2).mT
