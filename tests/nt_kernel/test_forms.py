"""Gram products of all forms, by every route and across tile borders, against their dense Jacobians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_kernel.products import forms, tiles
from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.positions import ROUTES, Positions, route_costs
from nt_kernel.products.tiles import blocks_of, gram_of

F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-11}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def form_of(kind: str, N: int, C: int, seed: int, T: int = 4, o: int = 3, d: int = 5):
    """(form, its dense Jacobian [N, C, P])."""
    if kind == "outer":
        a, delta = draw(N, d, seed=seed), draw(N, C, o, seed=seed + 1)
        return Outer(a, delta), torch.einsum("nco,nd->ncod", delta, a).flatten(2)
    if kind == "flat":
        J = draw(N, C, o * d, seed=seed)
        return Flat(J), J
    if kind == "decoupled":
        a = draw(N, d, seed=seed)
        return Decoupled(a, C), torch.einsum("ce,nd->nced", torch.eye(C, dtype=F64), a).flatten(2)
    delta = draw(N, C, T, o, seed=seed + 1)
    if kind == "lookup":
        rows = torch.randint(d, (N, T), generator=torch.Generator().manual_seed(seed))
        hot = torch.nn.functional.one_hot(rows, d).to(F64)
        return Positions(rows, delta, d), torch.einsum("ncto,ntd->ncod", delta, hot).flatten(2)
    a = draw(N, T, d, seed=seed)
    J = torch.einsum("ncto,ntd->ncod", delta, a)
    if kind == "weighted":
        w = draw(o, d, seed=5).abs() + 0.1
        return Weighted(a, delta, w), (J * w).flatten(2)
    return Positions(a, delta), J.flatten(2)


KINDS = ["outer", "flat", "decoupled", "weighted", "positions", "lookup"]


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from([1, 7, 16, 10**6]),
    st.sampled_from([1, 10**4, 10**7]),
)
def test_tiles_add_up_to_the_dense_product(kinds, N, M, C, tile_rows, chunk_bytes):
    mine = [form_of(kind, N, C, 10 * k) for k, kind in enumerate(kinds)]
    theirs = [form_of(kind, M, C, 10 * k + 5) for k, kind in enumerate(kinds)]
    J, J2 = (torch.cat([dense for _, dense in side], -1) for side in (mine, theirs))
    before, tiles.TILE_ROWS, forms.CHUNK_BYTES = (tiles.TILE_ROWS, forms.CHUNK_BYTES), tile_rows, chunk_bytes
    try:
        own, cross = gram_of([f for f, _ in mine]), gram_of([f for f, _ in mine], [f for f, _ in theirs])
    finally:
        tiles.TILE_ROWS, forms.CHUNK_BYTES = before
    torch.testing.assert_close(own, torch.einsum("ncp,mdp->ncmd", J, J), **CLOSE)
    torch.testing.assert_close(cross, torch.einsum("ncp,mdp->ncmd", J, J2), **CLOSE)
    torch.testing.assert_close(blocks_of([f for f, _ in mine]), J @ J.mT, **CLOSE)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["positions", "lookup"])
def test_every_route_of_the_double_sum(kind, route):
    (a, J), (b, J2) = form_of(kind, 4, 3, 0), form_of(kind, 5, 3, 7)
    expected = torch.einsum("ncp,mdp->ncmd", J, J2)
    a, b = (Positions(f.inputs, f.deltas, f.vocabulary, route) for f in (a, b))
    left, right = a.matched(b)
    assert isinstance(left, Flat) == (route == "summed")
    torch.testing.assert_close(left.gram(right), expected, **CLOSE)
    torch.testing.assert_close(a.block_gram(), J @ J.mT, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "route"),
    [
        ({"T": 784, "o": 32, "d": 144}, "summed"),  # a convolution
        ({"T": 4, "o": 256, "d": 2304}, "transfer"),  # a deep convolution with few positions left
        ({"T": 2, "o": 1, "d": 500}, "transfer"),
        ({"T": 1, "o": 64, "d": 64}, "pairs"),  # one position: nothing to carry
    ],
)
def test_the_cheapest_route(shape, route):
    T, o, d = shape["T"], shape["o"], shape["d"]
    costs = route_costs(16, 16, 10, T, T, o, d)
    assert costs[route] <= 1.3 * min(costs.values()), costs


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_forms_are_one_product(kind):
    pairs = [form_of(kind, 6, 2, seed) for seed in (0, 20, 40)]
    fields = [
        f for f in pairs[0][0].__dataclass_fields__ if torch.is_tensor(getattr(pairs[0][0], f)) and f != "weights"
    ]
    one = pairs[0][0]
    rest = {f: getattr(one, f) for f in one.__dataclass_fields__ if f not in fields}
    stacked = type(one)(**{f: torch.stack([getattr(p, f) for p, _ in pairs]) for f in fields}, **rest)
    found = gram_of([stacked])
    for k, (_, J) in enumerate(pairs):
        torch.testing.assert_close(found[k], torch.einsum("ncp,mdp->ncmd", J, J), **CLOSE)
