"""RLO on the sphere and the Stiefel manifold, and the maps of these manifolds against their definitions and geoopt's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optim.lyapunov.retraction import embedded_manifold
from optim.lyapunov.rlo_rules import DIRECTIONS
from optim.rlo import RLO, RLOLifted
from tests.optim.rlo_runs import CURVED, draw, points


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
    import geoopt  # here: its import takes a second

    for name, theirs in (("sphere", geoopt.Sphere()), ("stiefel", geoopt.EuclideanStiefel())):
        ours = embedded_manifold(name)
        x, u = ours.onto(draw(*shape)), draw(*shape, seed=1)
        v = ours.tangent(x, u)
        assert torch.allclose(v, theirs.proju(x, u), atol=1e-13)
        assert torch.allclose(ours.retract(x, v), theirs.retr(x, v), atol=1e-13)
        assert torch.allclose(ours.onto(u), theirs.projx(u), atol=1e-12)
        y = ours.retract(x, v)
        assert torch.allclose(ours.tangent(y, v), theirs.transp(x, y, v), atol=1e-12)
