"""How a direction moves a parameter, against torch's SGD and AdamW, stacked, and with bad hyperparameters."""

import itertools

import pytest
import torch

from optim.steps.update import Update, decayed_gradient, moved
from tests.reference import F64

COMBINATIONS = [
    {"momentum": b, "dampening": damp, "nesterov": nesterov}
    for b, damp, nesterov in itertools.product((0.0, 0.5, 0.9), (0.0, 0.3), (False, True))
    if not nesterov or (b and not damp)
]


def gradients(steps=6, shape=(3, 2)):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw, dtype=F64) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", COMBINATIONS)
def test_it_is_torchs_sgd_bit_for_bit(options, decay):
    update = Update(0.2, **options, weight_decay=decay, decay="riemannian")
    p, buffer = torch.ones(3, 2, dtype=F64), None
    other = torch.nn.Parameter(p.clone())
    sgd = torch.optim.SGD([other], lr=0.2, **options, weight_decay=decay, foreach=False)
    for g in gradients():
        other.grad = g.clone()
        sgd.step()
        p, buffer = moved(p, decayed_gradient(g, p, update), buffer, update)
        assert torch.equal(p, other.detach())
    assert (buffer is None) == (options["momentum"] == 0)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_decoupled_decay_shrinks_and_leaves_the_buffer_alone(options):
    """θ ← (1 − lr·w)θ − lr·v: the v of a run is that of the same directions without decay."""
    update, plain = Update(0.2, **options, weight_decay=0.4), Update(0.2, **options)
    p = torch.ones(3, 2, dtype=F64)
    buffer = other = None
    for d in gradients():
        assert decayed_gradient(d, p, update) is d
        still, other = moved(torch.zeros_like(p), d, other, plain)
        before = p
        p, buffer = moved(p, d, buffer, update)
        torch.testing.assert_close(p, 0.92 * before + still, rtol=0, atol=1e-15)
        assert buffer is None or torch.equal(buffer, other)


def test_decoupled_decay_is_adamws():
    """With β₁ = β₂ = 0 AdamW goes along g/(|g| + ε)."""
    update, p = Update(0.1, weight_decay=0.3), torch.ones(3, 2, dtype=F64)
    other = torch.nn.Parameter(p.clone())
    adamw = torch.optim.AdamW([other], lr=0.1, betas=(0.0, 0.0), eps=1e-3, weight_decay=0.3)
    for g in gradients():
        other.grad = g.clone()
        adamw.step()
        p, _ = moved(p, g / (g.abs() + 1e-3), None, update)
        torch.testing.assert_close(p, other.detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_stacks_move_as_each_does(options):
    update = Update(0.2, **options, weight_decay=0.1)
    p, buffer = torch.ones(4, 3, 2, dtype=F64), None
    alone = [(p[0], None)] * 4
    for g in gradients(shape=(4, 3, 2)):
        p, buffer = moved(p, g, buffer, update)
        alone = [moved(q, g[k], v, update) for k, (q, v) in enumerate(alone)]
        assert all(torch.equal(p[k], q) for k, (q, _) in enumerate(alone))


def test_nothing_is_written_to():
    """Arguments stay, and what is returned shares no memory with them: a caller may write into it."""
    for options in COMBINATIONS:
        update = Update(0.2, **options, weight_decay=0.1)
        p, d, v = (torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(3))
        for buffer in (None, v):
            kept = [t.clone() for t in (p, d, v)]
            found = [t for t in moved(p, d, buffer, update) if t is not None]
            if options["momentum"]:
                for t in found:
                    t.fill_(7.0)
            assert all(torch.equal(t, k) for t, k in zip((p, d, v), kept, strict=True))


BAD = {
    "lr": (
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("a", TypeError),
        (True, TypeError),
    ),
    "momentum": ((-0.1, ValueError), (1.0, ValueError), (float("nan"), ValueError), (None, TypeError)),
    "dampening": ((-0.1, ValueError), (1.0, ValueError), (float("nan"), ValueError), ("much", TypeError)),
    "weight_decay": ((-1e-9, ValueError), (float("inf"), ValueError), (None, TypeError)),
    "nesterov": ((1, TypeError), (None, TypeError)),
    "decay": (("decouple", ValueError), (None, ValueError)),
}


@pytest.mark.parametrize(("key", "value", "error"), [(k, v, e) for k, cases in BAD.items() for v, e in cases])
def test_bad_hyperparameters(key, value, error):
    with pytest.raises(error, match=rf"{key}.*{value}"):
        Update(**{"lr": 0.1, key: value})


def test_the_nearest_decay_is_named():
    with pytest.raises(ValueError, match=r"unknown decay 'decouple'.*did you mean 'decoupled'"):
        Update(0.1, decay="decouple")


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(options):
    with pytest.raises(ValueError, match=r"nesterov=True needs momentum > 0 and dampening = 0, got momentum=0\.[09]"):
        Update(0.1, nesterov=True, **options)
