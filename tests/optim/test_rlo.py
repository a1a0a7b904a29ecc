"""RLO against the originals it contains, a plain reference of its own, and the contract of torch optimizers."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optim.lyapunov.retraction import embedded_manifold
from optim.lyapunov.rlo_rules import BETAS, DIRECTIONS, tanh_of_half_
from optim.rlo import RLO, RLOLambda, RLOLifted
from tests.reference import F64

CURVED = ["sphere", "stiefel"]


def net(dtype=F64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def train(model, opt, steps, start=0, scheduler=None):
    """Mini-batches that depend on the step alone; returns the losses."""
    losses, p = [], next(model.parameters())
    for t in range(start, start + steps):
        x, y = draw(8, 3, seed=t, dtype=p.dtype), draw(8, 2, seed=1000 + t, dtype=p.dtype)
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def gap(a, b):
    return max((p - q).detach().abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


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


def points(manifold, seed=0):
    onto = embedded_manifold(manifold).onto
    return [onto(draw(*shape, seed=seed + i)) for i, shape in enumerate([(5, 3), (2, 4), (2, 3, 3)])]


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


@given(st.sampled_from(CURVED), st.sampled_from(DIRECTIONS), st.floats(1e-3, 1e3), st.integers(0, 50), st.booleans())
def test_points_stay_on_the_manifold_and_velocities_tangent(name, direction, lr, seed, normalize):
    manifold, start = embedded_manifold(name), points(name, seed)
    params = [nn.Parameter(p) for p in start]
    opt = RLOLifted(params, lr, eta=0.3, direction=direction, normalize=normalize, manifold=name)
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = 10 * draw(*p.shape, seed=seed + 100 * t + i)
        opt.step()
        for p in params:
            assert manifold.defect(p) < 1e-12
            for slot in ("velocity", "mean"):
                u = opt.state[p][slot]
                assert (manifold.tangent(p.detach(), u) - u).abs().max() < 1e-12 * max(1, float(u.abs().max()))


@given(
    st.sampled_from(["euclidean", *CURVED]),
    st.sampled_from(DIRECTIONS),
    st.sampled_from(["gradient", "ema", "adam"]),
    st.booleans(),
    st.integers(0, 100),
)
def test_first_steps_descend(manifold, direction, memory, normalize, seed):
    """⟨∇h, d⟩ < 0 for every Φ, and a small first step, lifted or not, lowers h."""
    start = points(manifold, seed)
    targets = [draw(*p.shape, seed=seed + 31 + i) for i, p in enumerate(start)]
    h = lambda ps: sum(0.5 * (p - a).square().sum() for p, a in zip(ps, targets, strict=True))  # noqa: E731
    params = [nn.Parameter(p.clone()) for p in start]
    opt = RLOLifted(
        params, 1e-6, eta=0.5, memory=memory, direction=direction, manifold=manifold, normalize=normalize, scale=0.1
    )
    before = h(params)
    before.backward()
    opt.step()
    slope = sum((p.grad * (p.detach() - q)).sum() for p, q in zip(params, start, strict=True))
    assert slope < 0
    assert h(params) < before


@pytest.mark.parametrize("manifold", CURVED)
def test_trace_on_the_manifold_reaches_the_eigenvectors(manifold):
    """min tr XᵀAX: rows on the sphere each find the least eigenvalue, the frame the two least."""
    A = draw(6, 6)
    A = A @ A.T
    w = torch.linalg.eigvalsh(A)
    x = nn.Parameter(embedded_manifold(manifold).onto(draw(2, 6, seed=5)))
    opt = RLO([x], 0.02, eta=0.5, memory="gradient", direction="identity", manifold=manifold)
    for _ in range(1500):
        opt.zero_grad()
        h = 0.5 * (x @ A @ x.T).trace()
        h.backward()
        opt.step()
    assert h.item() == pytest.approx(float(w[0] if manifold == "sphere" else (w[0] + w[1]) / 2), abs=1e-6)


@pytest.mark.parametrize("manifold", CURVED)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 4), (4, 1)])
def test_maps_of_a_manifold(manifold, shape):
    m = embedded_manifold(manifold)
    x, u, w = m.onto(draw(*shape)), draw(*shape, seed=1), draw(*shape, seed=2)
    Pu, Pw = m.tangent(x, u), m.tangent(x, w)
    assert torch.allclose(m.tangent(x, Pu), Pu, atol=1e-14)
    assert torch.allclose((Pu * w).sum(), (u * Pw).sum(), atol=1e-13)  # orthogonal: symmetric and idempotent
    assert m.defect(x) < 1e-14
    assert m.defect(m.retract(x, 1e4 * Pu)) < 1e-13
    assert torch.allclose(m.retract(x, 0 * u), x, atol=1e-14)
    velocity = (m.retract(x, 1e-6 * Pu) - m.retract(x, -1e-6 * Pu)) / 2e-6
    assert torch.allclose(velocity, Pu, atol=1e-8)
    curve = lambda t: m.defect(x + t * Pu)  # noqa: E731
    assert curve(1e-4) < 1e-6  # of second order: tangent
    for seed in range(5):  # the nearest point
        other = m.onto(x + 0.1 * draw(*shape, seed=seed))
        assert (m.onto(u) - u).norm() <= (other - u).norm() + 1e-12


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (2, 5, 2)])
def test_maps_are_those_of_geoopt(shape):
    geoopt = pytest.importorskip("geoopt")
    for name, theirs in (("sphere", geoopt.Sphere()), ("stiefel", geoopt.EuclideanStiefel())):
        ours = embedded_manifold(name)
        x, u = ours.onto(draw(*shape)), draw(*shape, seed=1)
        v = ours.tangent(x, u)
        assert torch.allclose(v, theirs.proju(x, u), atol=1e-13)
        assert torch.allclose(ours.retract(x, v), theirs.retr(x, v), atol=1e-13)
        assert torch.allclose(ours.onto(u), theirs.projx(u), atol=1e-12)
        y = ours.retract(x, v)
        assert torch.allclose(ours.tangent(y, v), theirs.transp(x, y, v), atol=1e-12)


STATEFUL = {
    "lifted": {"eta": 0.2},
    "scheduled": {"eta": lambda t: 1 / (1 + 0.1 * t)},
    "adam": {"memory": "adam", "eta": 0.5, "normalize": True},
    "lion": {"memory": "lion", "direction": "sign", "eta": 1.0},
    "own direction": {"direction": lambda u: -u.clamp(-0.01, 0.01)},
}


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_is_the_same_bit_for_bit(name, dtype):
    options = {"lr": 0.01, "weight_decay": 0.1, **STATEFUL[name]}
    model = net(dtype)
    opt = RLO(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    train(model, opt, 5, scheduler=schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), schedule.state_dict()], file)
    train(model, opt, 5, 5, schedule)

    other = net(dtype, seed=7)
    again = RLO(other.parameters(), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(again, 0.9)
    file.seek(0)
    for thing, state in zip((other, again, schedule), torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(state)
    kept = copy.deepcopy(opt.state_dict())
    train(other, again, 5, 5, schedule)
    assert gap(model, other) == 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == again.state[q].keys()
        for slot, value in opt.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[q][slot]))
            assert not isinstance(value, torch.Tensor) or value.dtype == dtype
    assert again.param_groups[0]["steps"] == 10
    assert str(kept) == str(opt.state_dict())


def test_copies_and_pickles_continue_alike():
    model = net()
    opt = RLOLifted(model.parameters(), 0.01)
    opt.observers.append(lambda seen: None)
    train(model, opt, 3)
    for model2, opt2 in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        assert type(opt2) is RLOLifted
        assert opt2.observers == []
        original, same = copy.deepcopy((model, opt))
        assert train(original, same, 3, 3) == train(model2, opt2, 3, 3)
        assert gap(original, model2) == 0
    opt.load_state_dict(opt.state_dict())
    assert len(opt.observers) == 1


def test_a_state_of_other_groups_is_refused():
    opt = RLO(net().parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        RLO([{"params": [p]} for p in net().parameters()]).load_state_dict(opt.state_dict())


def test_closure_runs_once_with_gradients_and_its_loss_is_returned():
    model, calls = net(), []
    opt = RLO(model.parameters(), lr=0.0)

    def closure():
        opt.zero_grad()
        loss = model(draw(4, 3)).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    assert opt.step(closure) is calls[0]
    assert len(calls) == 1
    assert RLO(net().parameters()).step() is None


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


def test_a_run_changes_no_global_state():
    state = torch.random.get_rng_state()
    model = net()
    train(model, RLO(model.parameters(), normalize=True), 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def unit():
    return nn.Parameter(torch.eye(3, dtype=F64))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"eta": 0.0}, ValueError, r"eta must be in \(0, 1\], got 0.0"),
        ({"eta": 1.5}, ValueError, r"eta must be in \(0, 1\], got 1.5"),
        ({"eta": float("nan")}, ValueError, r"eta must be in \(0, 1\], got nan"),
        ({"eta": True}, TypeError, "eta must be a number"),
        ({"eta": "x"}, TypeError, "eta must be a number"),
        ({"eta": lambda t: 2.0}, ValueError, "got 2.0 of its schedule at step 0"),
        ({"lr": -1.0}, ValueError, r"lr must be in \[0, ∞\), got -1.0"),
        ({"lr": float("inf")}, ValueError, r"lr must be in"),
        ({"lr": "auto"}, TypeError, "lr must be a number"),
        ({"scale": 0.0}, ValueError, r"scale must be in \(0, ∞\), got 0.0"),
        ({"eps": -1e-8}, ValueError, "eps must be in"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair"),
        ({"memory": "lions"}, ValueError, "unknown memory 'lions'.*did you mean 'lion'"),
        ({"direction": "tan"}, ValueError, "unknown direction 'tan'.*did you mean 'tanh'"),
        ({"direction": None}, ValueError, "unknown direction None"),
        ({"normalize": 1}, TypeError, "normalize must be True or False"),
        ({"manifold": "shpere"}, ValueError, "unknown manifold 'shpere'.*did you mean 'sphere'"),
        ({"manifold": 3}, TypeError, "manifold must be one of"),
        ({"manifold": "sphere", "weight_decay": 0.1}, ValueError, "weight_decay=0.1 on the manifold 'sphere'"),
    ],
)
def test_what_is_refused_by_the_optimizer_and_by_a_group(options, error, text):
    with pytest.raises(error, match=text):
        RLO([unit()], **options)
    opt = RLO([unit()])
    with pytest.raises(error, match=text):
        opt.add_param_group({"params": [unit()], **options})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("p", "manifold", "error", "text"),
    [
        (2 * torch.eye(3), "sphere", ValueError, "parameter 0 of the group, .* off the manifold 'sphere' by 1 "),
        (2 * torch.eye(3), "stiefel", ValueError, "off the manifold 'stiefel' by 3 .*onto"),
        (torch.full((2, 2), float("nan")), "sphere", ValueError, "by nan"),
        (torch.ones(3), "stiefel", ValueError, "is a matrix, got the shape"),
        (torch.ones(()), "sphere", ValueError, "got a number"),
        (torch.ones(2, dtype=torch.complex64), "euclidean", TypeError, "complex64"),
    ],
)
def test_parameters_that_are_refused(p, manifold, error, text):
    opt = RLO([unit()])
    with pytest.raises(error, match=text):
        opt.add_param_group({"params": [nn.Parameter(p)], "manifold": manifold})
    assert len(opt.param_groups) == 1
    with pytest.raises(error, match=text):
        RLO([nn.Parameter(p)], manifold=manifold)


def test_torch_refuses_what_it_always_refuses():
    with pytest.raises(ValueError, match="empty parameter list"):
        RLO([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        RLO(torch.ones(2))
    with pytest.raises(TypeError, match="ordered collections"):
        RLO([{"params": {unit()}}])
    p = unit()
    with pytest.raises(ValueError, match="more than one parameter group"):
        RLO([{"params": [p]}, {"params": [p]}])
    assert len(RLO(nn.Linear(2, 2).named_parameters()).param_groups[0]["params"]) == 2


def test_lambda_and_lifted_say_which_is_which():
    with pytest.raises(TypeError, match="RLOLambda has no eta"):
        RLOLambda([unit()], eta=0.5)
    with pytest.raises(ValueError, match="RLOLifted needs an eta below 1"):
        RLOLifted([unit()], eta=1.0)


def as_before(opt, model, run):
    """``run`` raises what the test expects; then nothing of the optimizer or the model has moved."""
    before, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict()["state"])
    run()
    assert gap(model, before) == 0
    assert str(opt.state_dict()["state"]) == str(state)


def test_a_step_that_is_refused_leaves_everything():
    model = net()
    opt = RLOLifted([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1)
    train(model, opt, 2)
    opt.param_groups[1]["eta"] = 0.0

    def refused():
        with pytest.raises(ValueError, match=r"eta must be in \(0, 1\], got 0.0"):
            opt.step()

    as_before(opt, model, refused)
    fixed = RLOLambda(model.parameters())
    fixed.param_groups[0]["eta"] = 0.5
    with pytest.raises(ValueError, match="keeps no velocity; use RLOLifted"):
        fixed.step()

    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        RLO(table.parameters()).step()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda u: u.sum(), ValueError, "shape, dtype and device"),
        (lambda u: u.float(), ValueError, "float32"),
        (lambda u: None, TypeError, "NoneType"),
        (lambda u: u.nonsense, AttributeError, "nonsense"),
    ],
)
def test_a_direction_that_fails_leaves_everything(wrong, error, text):
    model, broken = net(), []
    fine = lambda u: -u  # noqa: E731
    opt = RLOLifted(
        [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "direction": lambda u: (wrong if broken else fine)(u)},
        ],
        memory="adam",
    )
    train(model, opt, 2)
    broken.append(True)

    def refused():
        with pytest.raises(error, match=text):
            opt.step()

    as_before(opt, model, refused)


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


def test_a_saved_option_beats_the_loading_optimizers_own():
    saved = RLO(net().parameters(), direction="sign", manifold="euclidean", eta=0.7).state_dict()
    model = net()
    opt = RLO(model.parameters(), direction="tanh", eta=lambda t: 0.1)
    kept = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    assert saved == kept
    assert [opt.param_groups[0][k] for k in ("direction", "eta", "eta_schedule")] == ["sign", 0.7, None]


def test_on_each_device(device):
    model = net(torch.float32).to(device)
    start = copy.deepcopy(model)
    opt = RLOLifted(model.parameters(), 0.01, memory="adam", normalize=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert gap(model, start) > 0
    assert all(opt.state[p]["velocity"].device == p.device for p in model.parameters())
