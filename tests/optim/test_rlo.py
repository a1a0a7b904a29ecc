"""RLO against the originals it contains and a plain reference of its own; what tanh and the normalisation do."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from optim.lyapunov import rlo_rules
from optim.lyapunov.retraction import embedded_manifold
from optim.lyapunov.rlo_rules import BETAS, DIRECTIONS, Room, tanh_of_half_
from optim.rlo import RLO, RLOLambda, RLOLifted
from tests.optim.rlo_runs import CURVED, draw, gap, net, points, train
from tests.reference import F64


class ReferenceLion:
    """Chen et al., arXiv 2302.06675, algorithm 2: decay and step from the interpolation with the old m, then the EMA."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        self.params, self.lr, self.betas, self.decay = list(params), lr, betas, weight_decay
        self.m = [torch.zeros_like(p) for p in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        b1, b2 = self.betas
        with torch.no_grad():
            for p, m in zip(self.params, self.m, strict=True):
                c = b1 * m + (1 - b1) * p.grad
                p -= self.lr * (torch.sign(c) + self.decay * p)
                m.copy_(b2 * m + (1 - b2) * p.grad)


ORIGINALS = {
    "SGD": (
        lambda p: RLO(p, 0.1, eta=1.0, memory="gradient", direction="identity"),
        lambda p: torch.optim.SGD(p, 0.1),
    ),
    "heavy ball": (
        lambda p: RLO(p, 0.1, eta=0.25, memory="gradient", direction="identity"),
        lambda p: torch.optim.SGD(p, 0.025, momentum=0.75),
    ),
    "averaged gradient": (
        lambda p: RLO(p, 0.1, eta=1.0, memory="ema", betas=(0.75, 0.0), direction="identity"),
        lambda p: torch.optim.SGD(p, 0.025, momentum=0.75),
    ),
    "Adam": (
        lambda p: RLO(p, 0.01, eta=1.0, memory="adam", direction="identity"),
        lambda p: torch.optim.Adam(p, 0.01),
    ),
    "AdamW": (
        lambda p: RLOLambda(p, 0.01, memory="adam", direction="identity", betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, foreach=True),
    ),
    "sign descent": (
        lambda p: RLOLambda(p, 0.01, memory="gradient", direction="sign"),
        lambda p: ReferenceLion(p, 0.01, betas=(0.0, 0.0)),
    ),
    "Lion": (
        lambda p: RLOLambda(p, 0.01, memory="lion", direction="sign", weight_decay=0.3),
        lambda p: ReferenceLion(p, 0.01, weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_special_cases_are_the_originals_at_every_step(name):
    ours, theirs = net(), net()
    a, b = (make(m.parameters()) for make, m in zip(ORIGINALS[name], (ours, theirs), strict=True))
    for t in range(40):
        train(ours, a, 1, t)
        train(theirs, b, 1, t)
        assert gap(ours, theirs) < 1e-13


def reference_run(params, gradients, options):
    """The definition, one tensor at a time in plain arithmetic: list of parameters after every step."""
    lr, eta = options["lr"], options["eta"]
    b1, b2 = options.get("betas") or BETAS[options["memory"]]
    P = embedded_manifold(options.get("manifold", "euclidean"))
    m, s, v = ([torch.zeros_like(p) for p in params] for _ in range(3))
    out = []
    for t, step in enumerate(gradients):
        ds = []
        for i, (p, g) in enumerate(zip(params, step, strict=True)):
            g = P.tangent(p, g)
            old = m[i]
            if options["memory"] == "lion":
                u, m[i] = b1 * old + (1 - b1) * g, b2 * old + (1 - b2) * g
            elif options["memory"] == "ema":
                u = m[i] = b1 * old + (1 - b1) * g
            elif options["memory"] == "adam":
                m[i], s[i] = b1 * old + (1 - b1) * g, b2 * s[i] + (1 - b2) * g * g
                u = (m[i] / (1 - b1 ** (t + 1))) / ((s[i] / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
            else:
                u = g
            phi = {
                "identity": lambda u: -u,
                "tanh": lambda u: -torch.tanh(u / options["scale"]),
                "sign": lambda u: -torch.sign(u),
                "normalized": lambda u: -u / u.norm(),
            }[options["direction"]]
            ds.append(P.tangent(p, phi(u)))
        if options["normalize"]:
            norm = torch.cat([d.flatten() for d in ds]).norm()
            ds = [d / norm for d in ds]
        e = eta(t) if callable(eta) else eta
        new = []
        for i, (p, d) in enumerate(zip(params, ds, strict=True)):
            v[i] = (1 - e) * v[i] + e * d
            p = P.retract(p * (1 - lr * options.get("weight_decay", 0.0)), lr * v[i])
            v[i], m[i] = P.tangent(p, v[i]), P.tangent(p, m[i])
            new.append(p)
        params = new
        out.append(params)
    return out


@pytest.mark.parametrize("manifold", ["euclidean", *CURVED])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("memory", BETAS)
def test_every_combination_is_its_definition(memory, direction, normalize, manifold):
    for eta in (1.0, 0.3, lambda t: 1 / (t + 1)):
        options = {"lr": 0.1, "eta": eta, "memory": memory, "direction": direction, "normalize": normalize}
        options |= {"scale": 0.5, "manifold": manifold}
        if manifold == "euclidean":
            options["weight_decay"] = 0.2
        start = points(manifold)
        gradients = [[draw(*p.shape, seed=100 * t + i) for i, p in enumerate(start)] for t in range(5)]
        params = [nn.Parameter(p.clone()) for p in start]
        opt = RLO(params, **options)
        for step, expected in zip(gradients, reference_run(start, gradients, options), strict=True):
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            opt.step()
            for p, g, q in zip(params, step, expected, strict=True):
                assert torch.allclose(p, q, rtol=0, atol=1e-12)
                assert torch.equal(p.grad, g)


def test_groups_have_their_own_options_and_one_normalisation():
    a, b, c = (nn.Parameter(draw(4, seed=i)) for i in range(3))
    start = [p.detach().clone() for p in (a, b, c)]
    opt = RLO(
        [
            {"params": [a], "lr": 0.5, "direction": "sign"},
            {"params": b, "memory": "adam"},
            {"params": [c], "normalize": False, "eta": 0.5},
        ],
        lr=0.1,
        eta=1.0,
        memory="gradient",
        direction="identity",
        normalize=True,
    )
    assert [group["betas"] for group in opt.param_groups] == [(0.0, 0.0), (0.9, 0.999), (0.0, 0.0)]
    for i, p in enumerate((a, b, c)):
        p.grad = draw(4, seed=10 + i)
    opt.step()
    da, db = -a.grad.sign(), -b.grad / (b.grad.abs() + 1e-8)
    norm = torch.cat([da, db]).norm()
    assert torch.allclose(a - start[0], 0.5 * da / norm)
    assert torch.allclose(b - start[1], 0.1 * db / norm)
    assert torch.allclose(c - start[2], -0.1 * 0.5 * c.grad)
    assert "velocity" not in opt.state[a]


def test_parameters_without_a_gradient_stay_and_count_no_step():
    model = net()
    model[0].weight.requires_grad_(False)
    start = copy.deepcopy(model)
    opt = RLOLifted(model.parameters(), 0.01, memory="adam", weight_decay=0.5)
    opt.step()
    assert gap(model, start) == 0
    train(model, opt, 2)
    model[2].bias.grad = None
    held = model[2].bias.detach().clone()
    opt.step()
    assert torch.equal(model[0].weight, start[0].weight)
    assert torch.equal(model[2].bias, held)
    assert opt.state[model[2].bias]["step"] == 2
    assert opt.state[model[2].weight]["step"] == 3


def test_zero_gradients_move_nothing():
    for direction, memory, normalize in itertools.product(DIRECTIONS, BETAS, (False, True)):
        p = nn.Parameter(draw(3))
        opt = RLO([p], 1.0, memory=memory, direction=direction, normalize=normalize)
        p.grad = torch.zeros_like(p)
        opt.step()
        assert torch.equal(p, draw(3))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tanh_is_tanh(dtype):
    """Relative accuracy at every size, both signs, the ends and nan."""
    x = torch.cat([sign * torch.logspace(-12, 3, 20001, dtype=F64) for sign in (1, -1)]).to(dtype)
    (found,) = values = [2 * x]
    tanh_of_half_(values)
    exact = torch.from_numpy(np.tanh(x.numpy().astype(np.longdouble)).astype(float))
    assert ((found - exact).abs() <= 4 * torch.finfo(dtype).eps * exact.abs()).all()
    ends = [torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=dtype)]
    tanh_of_half_(ends)
    assert str(ends[0].tolist()) == "[nan, 1.0, -1.0, 0.0]"


def test_normalised_steps_have_length_lr():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, RLOLambda(model.parameters(), 0.3, normalize=True), 1)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-12)


def test_tanh_settles_where_sign_rattles():
    """The paper's claim without global normalisation, on a quadratic: steady loss of sign ∝ lr², of tanh none."""
    losses = {}
    for direction in ("tanh", "sign"):
        p = nn.Parameter(draw(10))
        opt = RLOLifted([p], 0.01, eta=0.5, direction=direction, scale=0.1)
        for _ in range(600):
            opt.zero_grad()
            loss = 0.5 * p.square().sum()
            loss.backward()
            opt.step()
        losses[direction] = loss.item()
    assert losses["tanh"] < 1e-12 < 1e-6 < losses["sign"]


@pytest.mark.parametrize("memory", BETAS)
def test_a_direction_may_write_into_its_argument(memory):
    """Φ gets a copy: the memory and p.grad are not its own."""
    a, b = net(), net()
    for t in range(3):
        train(a, RLO(a.parameters(), memory=memory, direction=lambda u: u.neg_()), 1, t)
        train(b, RLO(b.parameters(), memory=memory, direction="identity"), 1, t)
        assert gap(a, b) == 0
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    ours, theirs = (
        RLO(m.parameters(), memory=memory, direction=d) for m, d in ((a, lambda u: u.neg_()), (b, "identity"))
    )
    train(a, ours, 3)
    train(b, theirs, 3)
    assert gap(a, b) == 0


def test_what_a_direction_returns_stays_as_it_was():
    """Under normalisation too, and where two parameters get one tensor: d = (3, 0), (3, 0) is divided by √18."""
    mine = torch.tensor([3.0, 0.0], dtype=F64)
    params = [torch.nn.Parameter(torch.zeros(2, dtype=F64)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = RLOLambda(params, 1.0, memory="gradient", direction=lambda u: mine, normalize=True)
    for t in (1, 2):
        opt.step()
        assert mine.tolist() == [3.0, 0.0]
        for p in params:
            torch.testing.assert_close(p.detach(), t * mine / 18**0.5)


@pytest.mark.parametrize("block", [3, 2**18])
def test_room_is_memory_of_each_entry_once(block, monkeypatch):
    """Whatever the strides, types and the size of a block; it fits what it was made for alone."""
    monkeypatch.setattr(rlo_rules, "BLOCK", block)
    params = [draw(2, 3, 4, 5).to(memory_format=torch.channels_last), draw(3, 2).float().T, draw(()), draw(0), draw(4)]
    room = Room.like(params)
    assert [t.stride() for t in room.tensors] == [p.stride() for p in params]
    for t, p in zip(room.tensors, params, strict=True):
        t.copy_(p)
    assert all(b.dim() == 1 and len(b) <= block for b in room.blocks)
    for b in room.blocks:
        b.mul_(2)
    for t, p in zip(room.tensors, params, strict=True):
        assert torch.equal(t, 2 * p)
    assert room.fits(params)
    assert not room.fits(params[:-1])
    assert not room.fits([*params[:-1], draw(5)])
    assert not room.fits([*params[:-1], params[-1].float()])


@pytest.mark.parametrize("options", [{}, {"direction": "identity", "normalize": True}])
def test_parameters_that_pause_are_counted_each_for_itself(options):
    """Adam's bias correction with different counts in one group, and a group whose set of moving parameters changes."""
    together, alone = ([nn.Parameter(draw(4, seed=i)) for i in range(3)] for _ in range(2))
    options = {"memory": "adam", "direction": "identity", "eta": 0.5} | options
    whole = RLO(together, 0.1, **options)
    each = RLO([{"params": [p]} for p in alone], 0.1, **options)
    for t in range(7):
        for i in range(3):
            for params in (together, alone):
                params[i].grad = None if (t + i) % 3 == 0 else draw(4, seed=10 * t + i)
        whole.step()
        each.step()
        for p, q in zip(together, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
