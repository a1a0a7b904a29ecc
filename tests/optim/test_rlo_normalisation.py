"""Normalised directions at every size that a type holds: unit length, no scale of its own, zero zero, nan visible."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optim.lyapunov import rlo_rules
from optim.lyapunov.rlo_rules import bend, unit_norm
from optim.rlo import RLO
from tests.optim.rlo_runs import draw
from tests.reference import F64

# Squares that vanish, that keep a few digits, that overflow; and what lies between.
SIZES = {
    torch.float32: (1e-44, 1e-38, 1e-30, 1e-24, 2e-22, 1e-10, 1e9, 1e20, 1e30, 3e38),
    F64: (5e-324, 1e-310, 1e-170, 2e-161, 1e-78, 1e76, 1e200, 1.7e308),
    torch.float16: (1e-7, 1e-5, 6e4),
    torch.bfloat16: (1e-40, 1e-30, 1e30, 3e38),
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


def first_step(gradients, dtype, **options):
    """The moves of the first step of length lr = 1, and the gradients as the type holds them, in float64."""
    params = [nn.Parameter(torch.zeros(len(g), dtype=dtype)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g, dtype=dtype)
    RLO(params, 1.0, eta=1.0, memory="gradient", **options).step()
    return [p.detach().double() for p in params], [p.grad.double() for p in params]


def unit(parts):
    """The parts of a vector of norm 1, by way of the largest entry, in float64."""
    whole = torch.cat(parts)
    whole = whole / whole.abs().max()
    return (whole / whole.norm()).split([len(p) for p in parts])


@pytest.fixture(params=[True, False], ids=["cpu", "as on a device"])
def path(request, monkeypatch):
    """Off the CPU nothing may be asked of the numbers: the same code for all of them."""
    if not request.param:
        monkeypatch.setattr(rlo_rules, "_on_cpu", lambda tensors: False)


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_a_normalised_step_has_length_one_at_every_size(dtype, size, path):
    near = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    gradients = [[size, 0.0], [-size, size, 0.0]]
    moves, held = first_step(gradients, dtype, direction="identity", normalize=True)
    for move, g in zip(moves, unit(held), strict=True):
        torch.testing.assert_close(move, -g, **near)
    moves, held = first_step(gradients, dtype, direction="normalized")
    for move, g in zip(moves, held, strict=True):
        torch.testing.assert_close(move, -unit([g])[0], **near)


@given(st.sampled_from([torch.float32, F64]), st.integers(-140, 120), st.integers(0, 50))
def test_normalisation_does_not_see_a_power_of_two(dtype, exponent, seed):
    exponent *= 1 if dtype == torch.float32 else 8
    parts = [draw(3, seed=seed, dtype=dtype), draw(2, 2, seed=seed + 99, dtype=dtype)]
    scaled = [
        torch.ldexp(torch.ldexp(p, torch.tensor(exponent // 2)), torch.tensor(exponent - exponent // 2)) for p in parts
    ]
    back = [
        torch.ldexp(torch.ldexp(p, torch.tensor(-(exponent // 2))), torch.tensor(exponent // 2 - exponent))
        for p in scaled
    ]
    unit_norm(scaled)  # the entries may have become subnormal, with fewer digits: compared with what they then are
    unit_norm(back)
    for a, b in zip(scaled, back, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_zero_stays_zero_and_what_is_no_number_stays_visible(path):
    for dtype in SIZES:
        for options in ({"direction": "identity", "normalize": True}, {"direction": "normalized"}):
            moves, _ = first_step([[0.0, -0.0], [0.0]], dtype, **options)
            assert all((move == 0).all() for move in moves)
            for bad in (math.nan, math.inf, -math.inf):
                moves, _ = first_step([[1.0, bad], [0.0]], dtype, **options)
                assert not moves[0].isfinite().all()
    empty = [torch.zeros(0), torch.tensor([2.0])]
    unit_norm(empty)
    assert empty[1].item() == 1.0
    unit_norm(empty[:1])


def test_parameters_of_several_types_have_one_norm(path):
    """Where one type's entries are beyond the other's they are all there is, or nothing."""
    for (a, small), (b, large) in itertools.permutations([(torch.float16, 3.0), (torch.float32, 4.0), (F64, 12.0)], 2):
        d = [torch.tensor([small], dtype=a), torch.tensor([large, 0.0], dtype=b)]
        unit_norm(d)
        size = math.hypot(small, large)
        assert d[0].item() == pytest.approx(small / size, rel=1e-3)
        assert d[1].tolist() == pytest.approx([large / size, 0.0], rel=1e-3)
    for first, second, expected in ((6e4, 1e30, [0.0, 1.0]), (0.0, 1e-30, [0.0, 1.0]), (6e4, 1e-300, [1.0, 0.0])):
        d = [torch.tensor([first], dtype=torch.float16), torch.tensor([second], dtype=F64)]
        unit_norm(d)
        assert [x.item() for x in d] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_ordinary_sizes_it_is_the_plain_quotient(dtype):
    """Bit for bit: d/‖d‖ with the norm of the norms."""
    for scale in (1e-9, 1e-3, 1.0, 1e6):
        parts = [scale * draw(4, 3, dtype=dtype), scale * draw(7, seed=1, dtype=dtype)]
        whole = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in parts]))
        expected, each = [p / whole for p in parts], [p / torch.linalg.vector_norm(p) for p in parts]
        signals = [p.clone() for p in parts]
        bend("normalized", signals)
        unit_norm(parts)
        for found, exact in zip([*parts, *signals], [*expected, *each], strict=True):
            assert torch.equal(found, exact)
