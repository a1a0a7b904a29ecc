"""NAIM diagnostics: the recursion, rates, bounds and Lyapunov descent, on runs where each of them is a theorem."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optim.lyapunov.retraction import embedded_manifold
from optim.naim import NaimMonitor, contraction_rate, fitted_factor, residual_bound
from optim.naim_lyapunov import descent_margin, lyapunov, steady_state
from optim.rlo import RLO, RLOLambda, RLOLifted
from tests.reference import F64

ETAS = st.floats(0.02, 1.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def quadratic(optimizer, steps=40, seed=0, noise=0.0, curvature=(1.0, 0.3, 0.05), shape=()):
    """½θᵀΛθ with gradient noise, watched; (record, monitor, parameter)."""
    w = nn.Parameter(draw(3, seed=seed))
    opt, L = optimizer([w]), torch.tensor(curvature, dtype=F64)
    with NaimMonitor(opt) as naim:
        for t in range(steps):
            opt.zero_grad()
            h = 0.5 * (L * w.square()).sum()
            naim.note_loss(h)
            (h + noise * (draw(3, seed=1000 * seed + t) * w).sum()).backward()
            opt.step()
    return naim.record()


OPTIMIZERS = {
    "identity": lambda p: RLO(p, 0.1, eta=0.3, memory="gradient", direction="identity"),
    "tanh": lambda p: RLO(p, 0.1, eta=0.3, scale=0.5),
    "sign of lion": lambda p: RLO(p, 0.1, eta=0.3, memory="lion", direction="sign"),
    "normalised adam": lambda p: RLO(p, 0.1, eta=0.3, memory="adam", direction="identity", normalize=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.03, momentum=0.7),
    "dampened SGD": lambda p: torch.optim.SGD(p, 0.03, momentum=0.7, dampening=0.4),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.7, 0.99)),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, betas=(0.7, 0.99), weight_decay=0.1),
}


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_recursion_is_exact_and_eta_is_found(name, noise):
    record = quadratic(OPTIMIZERS[name], noise=noise)
    assert record.recursion[1:].max() < 1e-14
    assert record.recursion[:1].isnan().all()
    f, misfit = fitted_factor(record)
    assert f == pytest.approx(0.7, abs=1e-12)
    assert misfit < 1e-6
    assert record.constant("eta") == pytest.approx(0.3, abs=1e-15)
    bound, steady = residual_bound(record)
    assert (record.residual <= bound * (1 + 1e-12)).all()
    assert steady == pytest.approx(0.7 / 0.3 * record.forcing[1:].max().item(), rel=1e-12)
    assert (record.residual[1:].square() <= 0.7 * record.residual[:-1].square() * (1 + 1e-12)
            + 0.49 / 0.3 * record.forcing[1:].square()).all()  # fmt: skip


def test_columns_against_the_definitions():
    pairs = [([draw(2, 2, seed=4 * t), draw(3, seed=4 * t + 1)], [draw(2, 2, seed=4 * t + 2), draw(3, seed=4 * t + 3)])
             for t in range(4)]  # fmt: skip
    naim, z_before, d_before = NaimMonitor(), None, None
    for t, (velocities, targets) in enumerate(pairs):
        naim.note_loss(t)
        naim.add(velocities, targets, eta=0.25, lr=0.1 * t)
        record = naim.record()
        v, d = (torch.cat([x.flatten() for x in xs]) for xs in (velocities, targets))
        z, row = v - d, {n: float(getattr(record, n)[t]) for n in record.__dataclass_fields__}
        expected = {
            "residual": z.norm(),
            "target": d.norm(),
            "velocity": v.norm(),
            "loss": t,
            "eta": 0.25,
            "lr": 0.1 * t,
        }
        expected["alignment"] = torch.cosine_similarity(v, d, dim=0)
        if t:
            w = z_before - (d - d_before)
            expected |= {"forcing": (d - d_before).norm(), "inflow": w.norm(), "passed": z @ w}
            expected["recursion"] = (z - 0.75 * w).norm() / max(v.norm(), d.norm())
        for n, value in expected.items():
            assert row[n] == pytest.approx(float(value), rel=1e-12), n
        assert record.thickness[t].item() == pytest.approx(float(z.norm() / d.norm()), rel=1e-12)
        z_before, d_before = z, d
    with pytest.raises(ValueError, match="lr is not one known number"):
        record.constant("lr")


def test_a_velocity_that_follows_no_graph_is_seen():
    naim = NaimMonitor()
    for t in range(30):
        naim.add([draw(50, seed=t)], [draw(50, seed=100 + t)], eta=0.3)
    record = naim.record()
    assert record.recursion[1:].min() > 0.1
    assert fitted_factor(record)[1] > 0.5


@pytest.mark.parametrize("manifold", ["sphere", "stiefel"])
def test_the_recursion_is_exact_with_transport(manifold):
    m = embedded_manifold(manifold)
    params = [nn.Parameter(m.onto(draw(4, 3))), nn.Parameter(draw(5))]
    opt = RLOLifted(
        [{"params": params[:1], "manifold": manifold}, {"params": params[1:]}], 0.2, eta=0.3, scale=0.5, normalize=True
    )
    with NaimMonitor(opt) as naim:
        for t in range(20):
            for i, p in enumerate(params):
                p.grad = draw(*p.shape, seed=10 * t + i)
            opt.step()
    record = naim.record()
    assert record.recursion[1:].max() < 1e-14
    assert fitted_factor(record)[0] == pytest.approx(0.7, abs=1e-12)
    assert (record.residual <= residual_bound(record)[0] * (1 + 1e-12)).all()


@given(ETAS.filter(lambda eta: eta < 0.98), st.floats(1e-5, 1e-1), st.integers(0, 30), st.floats(0.05, 0.9))
def test_the_measured_rate_is_within_its_proven_tolerance(eta, lr, seed, forced):
    record = quadratic(
        lambda p: RLO(p, lr, eta=eta, memory="gradient", direction="identity"), 15, seed, curvature=(1.0, 0.5, 0.1)
    )
    rate = contraction_rate(record, forced)
    if rate.pairs:
        assert abs(rate.value - rate.expected) <= rate.tolerance + 1e-10
        assert rate.expected == pytest.approx(math.log(1 - eta), rel=1e-12)
        assert rate.tolerance <= -math.log(1 - forced) * (1 + 1e-12)


def test_the_rate_tends_to_log_one_minus_eta_as_lr_tends_to_zero():
    for lr in (1e-2, 1e-4, 1e-6):
        rate = contraction_rate(
            quadratic(lambda p, lr=lr: RLO(p, lr, eta=0.2, memory="gradient", direction="identity"), 8)
        )
        assert rate.pairs == 7
        assert abs(rate.value - math.log(0.8)) < 10 * lr


@given(ETAS, st.floats(1e-3, 0.49), st.integers(0, 30), st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2))
def test_strict_descent_where_the_margin_is_positive(eta, lr, seed, rest):
    """V⁺ − V ≤ −lr·margin·(‖∇h‖² + ‖z‖²) on quadratics with L = 1, for every η, lr with a positive margin."""
    margin = descent_margin(lr, eta, 1.0)
    if margin <= 0:
        return
    record = quadratic(
        lambda p: RLO(p, lr, eta=eta, memory="gradient", direction="identity"), 30, seed, curvature=(1.0, *rest)
    )
    V = lyapunov(record)
    decrease = lr * margin * (record.target.square() + record.residual.square())
    assert (V[1:] - V[:-1] <= -decrease[:-1] + 1e-13 * V[0]).all()


def test_values_of_the_lyapunov_function():
    record = quadratic(OPTIMIZERS["identity"], 5)
    assert torch.allclose(lyapunov(record), record.loss + 0.1 / 0.3 * record.residual.square(), rtol=1e-14)
    assert torch.allclose(lyapunov(record, -2.0, 5.0), record.loss + 2 + 5 * record.residual.square(), rtol=1e-14)
    w = draw(3)
    assert record.loss[0].item() == pytest.approx(float(0.5 * (torch.tensor([1.0, 0.3, 0.05], dtype=F64) * w**2).sum()))
    assert descent_margin(0.1, 0.5, 2.0) == pytest.approx(0.5 - 0.2 - 2 * 0.04)
    assert descent_margin(0.1, 0.25, 1.0) == pytest.approx(0.5 - 0.1 - 2 * 0.09)


def brute(V, step):
    """Least c₃/r over a fine grid of r."""
    best = math.inf
    for r in torch.logspace(-6, 0, 4001, dtype=F64):
        c3 = ((V[1:] - (1 - r) * V[:-1]).clamp_min(0) / step).max()
        best = min(best, float(c3 / r))
    return best * float(step.max())


@given(st.integers(0, 200), st.floats(0.1, 3.0))
def test_steady_state_is_the_least_bound_and_holds(seed, spread):
    V, forcing = (draw(12, seed=seed) * spread).exp(), (draw(12, seed=seed + 999) * 0.3).exp()
    found = steady_state(V, forcing, eta=0.3, lr=0.1)
    step = forcing[1:].square()
    assert found.applicable
    assert 0 < found.rate <= 1
    assert found.rho * 0.3 * 0.1 == pytest.approx(found.rate)
    assert found.value == pytest.approx(found.c3 / found.rate * float(step.max()))
    assert found.forcing == float(step.max())
    assert (V[1:] <= ((1 - found.rate) * V[:-1] + found.c3 * step) * (1 + 1e-9)).all()
    assert (found.bound(float(V[0]), 11) * (1 + 1e-9) >= V).all()
    expected = brute(V, step)
    assert found.value <= expected * (1 + 1e-9)
    assert found.value >= expected * (1 - 1e-2)


@pytest.mark.parametrize("start", [0.1, 40.0])
def test_steady_state_of_an_exact_dissipation(start):
    """V⁺ = .8V + .5δ² from below and from above its fixed points: no worse than with the true constants."""
    V, forcing = [start], torch.tensor([0.0] + [1.0, 3.0] * 20, dtype=F64).sqrt()
    for s in forcing[1:].square().tolist():
        V.append(0.8 * V[-1] + 0.5 * s)
    V = torch.tensor(V, dtype=F64)
    found = steady_state(V, forcing, eta=0.4, lr=0.25)
    assert (found.bound(start, 40) * (1 + 1e-9) >= V).all()
    assert found.value <= 0.5 / 0.2 * 3 * (1 + 1e-9)
    if start < 1:
        assert (found.rate, found.c3) == pytest.approx((0.2, 0.5))
        assert found.bound(start, 2).tolist() == pytest.approx([start, 0.8 * start + 1.5, 0.64 * start + 1.2 + 1.5])


def test_a_bound_fitted_on_a_settled_run_covers_the_rest():
    """Noisy descent: fitted on the first half, held against the second; sup V is of the order of what is bounded."""
    record = quadratic(lambda p: RLO(p, 0.2, eta=0.5, memory="gradient", direction="identity"), 400, noise=0.3)
    V = lyapunov(record)
    found = steady_state(V[:200], record.forcing[:200], eta=0.5, lr=0.2)
    assert found.applicable
    assert V[200:].max() <= found.value


@pytest.mark.parametrize(
    ("V", "forcing", "applicable", "c3", "value"),
    [
        ([4.0, 2.0, 1.0], [0.0, 0.0, 0.0], True, 0.0, 0.0),  # V → 0 of itself
        ([4.0, 5.0], [0.0, 0.0], False, math.inf, math.inf),
        ([4.0, 4.0], [0.0, 0.0], False, math.inf, math.inf),
        ([0.0, 0.0], [0.0, 0.0], True, 0.0, 0.0),
        (
            [4.0, 2.0, 3.0],
            [0.0, 0.0, 1.0],
            True,
            2.0,
            4.0,
        ),  # r ≤ ½ by the first step, c₃ = 3 − 2(1 − r), c₃/r = 1/r + 2
    ],
)
def test_steady_state_without_forcing(V, forcing, applicable, c3, value):
    found = steady_state(torch.tensor(V), torch.tensor(forcing), eta=0.5, lr=0.1)
    assert (found.applicable, found.c3, found.value) == (applicable, c3, value)
    if not applicable:
        assert "without forcing" in found.reason
        with pytest.raises(ValueError, match="does not apply to this run"):
            found.bound(1.0, 3)


def test_lambda_lies_on_the_graph():
    record = quadratic(lambda p: RLOLambda(p, 0.1), 5)
    assert (record.residual == 0).all()
    assert (record.thickness == 0).all()
    assert torch.allclose(record.alignment, torch.ones(5, dtype=F64))
    assert residual_bound(record)[1] == 0
    assert contraction_rate(record).pairs == 0
    assert fitted_factor(record) == (0.0, 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_watching_changes_no_bit(name):
    ends = []
    for watched in (False, True):
        w = nn.Parameter(draw(3))
        opt = OPTIMIZERS[name]([w])
        naim = NaimMonitor(opt if watched else None)
        for _ in range(5):
            w.grad = w.detach() ** 3
            kept = w.grad.clone()
            opt.step()
            assert torch.equal(w.grad, kept)
        naim.close()
        opt.step()
        ends.append(w.detach().clone())
        assert len(naim.record().eta) == (5 if watched else 0)
    assert torch.equal(*ends)


def test_a_parameter_that_pauses():
    """The comparison is left out where the set of moving parameters changes, and taken up again; a schedule is exact too."""
    a, b = nn.Parameter(draw(3)), nn.Parameter(draw(2))
    opt = RLOLifted([a, b], 0.1, eta=lambda t: 1 / (t + 2))
    with NaimMonitor(opt) as naim:
        for t in range(6):
            a.grad, b.grad = draw(3, seed=t), None if t == 3 else draw(2, seed=50 + t)
            opt.step()
        a.grad = b.grad = None
        opt.step()
    record = naim.record()
    assert record.recursion.isnan().tolist() == [True, False, False, True, True, False]
    assert record.recursion[[1, 2, 5]].max() < 1e-14
    assert record.eta.tolist() == [1 / (t + 2) for t in range(6)]
    assert math.isnan(residual_bound(record)[1])


def test_groups_with_different_eta_are_exact_too():
    a, b = nn.Parameter(draw(3)), nn.Parameter(draw(2))
    opt = RLOLifted([{"params": [a], "eta": 0.2}, {"params": [b], "lr": 1.0}], 0.1, eta=0.5)
    with NaimMonitor(opt) as naim:
        for t in range(4):
            a.grad, b.grad = draw(3, seed=t), draw(2, seed=50 + t)
            opt.step()
    record = naim.record()
    assert record.recursion[1:].max() < 1e-14
    assert record.eta.isnan().all()
    assert record.lr.isnan().all()


def test_the_fitted_rate_is_at_most_one():
    """Of r alone the least bound would be at r = 1.375, where (1 − r)V is negative."""
    found = steady_state(torch.tensor([1.0, 0.2, 0.5]), torch.tensor([0.0, 1.0, 1.0]), eta=0.5, lr=0.1)
    assert (found.rate, found.value) == (1.0, pytest.approx(0.5))
