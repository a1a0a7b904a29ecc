"""A-priori constants of convex losses: bounds of every gradient and Hessian, and the routes with them on trained twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

from stability.convex_losses import convex_constants
from stability.routes import convex_route, kozachkov_route, nonconvex_route, parameter_routes, strongly_convex_route
from tests.reference import trainable
from tests.stability.dense import F64

LOSSES = {
    "cross_entropy": lambda y, a: nn.functional.cross_entropy(y, a, reduction="none"),
    "logistic": lambda y, a: nn.functional.binary_cross_entropy_with_logits(y, a, reduction="none").sum(-1),
}


def problem(seed, loss, n=5, p=3):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, p)).to(F64)
    with torch.no_grad():
        for q in model.parameters():
            q.copy_(randn(*q.shape))
    a = randn(n + 2, p)
    a = nn.functional.one_hot(a.argmax(1), p).to(F64) if loss == "cross_entropy" else (a > 0).to(F64)
    x = randn(n + 2, 4)
    return model, x[:n], a[:n], x[n:], a[n:], draw


def risk(model, x, a, loss, decay=0.0):
    return lambda v: (
        LOSSES[loss](functional_call(model, v, (x,)), a).mean() + decay / 2 * sum(q.square().sum() for q in v.values())
    )


@given(
    seed=st.integers(0, 1000), loss=st.sampled_from(sorted(LOSSES)), p=st.integers(1, 3),
    size=st.sampled_from([0.1, 1.0, 20.0]), mass=st.sampled_from([1.0, 0.3]),
    sampling=st.sampled_from(["full batch", "one sample"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_they_bound_every_gradient_and_hessian(seed, loss, p, size, mass, sampling):
    model, x, a, others, aims, draw = problem(seed, loss, p=p)
    c = convex_constants(model, x, a, others, aims, [0.1], loss=loss, weight_decay=0.2, mass=mass, sampling=sampling)
    params = {n: size * torch.randn(q.shape, generator=draw, dtype=F64) for n, q in trainable(model).items()}
    points, wanted = torch.cat([x, others]), torch.cat([a, aims])
    g = vmap(lambda u, w: grad(risk(model, u[None], w[None], loss))(params))(points, wanted)
    norms = sum(t.flatten(1).square().sum(1) for t in g.values()).sqrt() / mass**0.5
    assert norms.max() <= c.lipschitz * (1 + 1e-12)
    batches = [(x, a)] if sampling == "full batch" else list(zip(points.split(1), wanted.split(1), strict=True))
    for u, w in batches:
        blocks = hessian(risk(model, u, w, loss, 0.2))(params)
        rows = [torch.cat([blocks[i][j].reshape(params[i].numel(), -1) for j in params], 1) for i in params]
        values = torch.linalg.eigvalsh(torch.cat(rows)) / mass
        assert values[-1] <= c.smoothness * (1 + 1e-12)
        assert values[0] >= c.curvature - 1e-12
    assert c.curvature == pytest.approx(0.2 / mass)


def test_no_constant_is_larger_than_it_has_to_be():
    """Each bound is met: logistic at y = 0, cross entropy between two equal classes, gradients far on the wrong side."""
    x, a = torch.tensor([[3.0]], dtype=F64), torch.tensor([[1.0]], dtype=F64)
    one = nn.Linear(1, 1, bias=False).to(F64)
    c = convex_constants(one, x, a, x, a, [0.1], loss="logistic", weight_decay=0.5)
    at = lambda w: hessian(risk(one, x, a, "logistic", 0.5))({"weight": torch.full((1, 1), w, dtype=F64)})  # noqa: E731
    assert at(0.0)["weight"]["weight"].item() == pytest.approx(c.smoothness)
    assert at(-20.0)["weight"]["weight"].item() == pytest.approx(c.curvature)
    assert c.lipschitz == pytest.approx(3.0)
    two, onehot = nn.Linear(1, 2, bias=False).to(F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    c = convex_constants(two, x, onehot, x, onehot, [0.1], loss="cross_entropy")
    H = hessian(risk(two, x, onehot, "cross_entropy"))({"weight": torch.zeros(2, 1, dtype=F64)})["weight"]["weight"]
    assert torch.linalg.eigvalsh(H.reshape(2, 2))[-1].item() == pytest.approx(c.smoothness)
    wrong = grad(risk(two, x, onehot, "cross_entropy"))({"weight": torch.tensor([[-20.0], [20.0]], dtype=F64)})[
        "weight"
    ]
    assert wrong.norm().item() == pytest.approx(c.lipschitz)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_routes_hold_for_twins_and_nothing_is_left_undecided(loss):
    model, x, a, others, aims, _ = problem(3, loss)
    steps, decay = 40, 0.1
    c = convex_constants(model, x, a, others, aims, [0.2] * steps, loss=loss, weight_decay=decay)
    ends = []
    for own, wanted in ((x, a), (torch.cat([others[:1], x[1:]]), torch.cat([aims[:1], a[1:]]))):
        params = trainable(model)
        for _ in range(steps):
            g = grad(risk(model, own, wanted, loss, decay))(params)
            params = {n: q - 0.2 * g[n] for n, q in params.items()}
        ends.append(params)
    points, wanted = torch.cat([x, others]), torch.cat([a, aims])
    one, two = (LOSSES[loss](functional_call(model, v, (points,)), wanted) for v in ends)
    moved = sum((ends[0][n] - ends[1][n]).square().sum() for n in ends[0]).sqrt()
    for route in (convex_route(c), strongly_convex_route(c), kozachkov_route(c)):
        assert route.to_dict()["status"] == "applicable", route.reason
        assert moved <= route.distance
        assert (one - two).abs().max() <= route.value
    plain = convex_constants(model, x, a, others, aims, [0.2], loss=loss)
    assert convex_route(plain).to_dict()["status"] == "applicable"
    assert not kozachkov_route(plain).applicable
    beyond = convex_constants(model, x, a, others, aims, [2.1 / plain.smoothness], loss=loss)
    assert "lr ≤ 2/β" in convex_route(beyond).reason
    single = convex_constants(model, x, a, others, aims, [0.1], loss=loss, sampling="one sample")
    assert nonconvex_route(single, loss_bound=1.0).applicable
    assert len(parameter_routes(c, loss_bound=5.0)) == 5


def test_bad_input():
    model, x, a, others, aims, _ = problem(0, "cross_entropy")
    good = {"loss": "cross_entropy"}
    for change, text in (
        ({"loss": "squared"}, "unknown loss 'squared'"),
        ({"sampling": "batch"}, "sampling must be one of"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ):
        with pytest.raises(ValueError, match=text):
            convex_constants(model, x, a, others, aims, [0.1], **good | change)
    with pytest.raises(ValueError, match="one positive number per step"):
        convex_constants(model, x, a, others, aims, [], **good)
    with pytest.raises(ValueError, match="must be distributions"):
        convex_constants(model, x, 2 * a, others, aims, [0.1], **good)
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        convex_constants(model, x, -a, others, aims, [0.1], loss="logistic")
    deep = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).to(F64)
    with pytest.raises(ValueError, match="not affine"):
        convex_constants(deep, x, a, others, aims, [0.1], **good)
