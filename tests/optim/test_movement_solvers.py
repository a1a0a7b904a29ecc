"""Inner solvers: a Gauss–Newton step against dense normal equations, what is foretold, first-order steps, the best iterate."""

import copy
import itertools

import pytest
import torch
from torch import nn

from optim import ConvexEnergy, FirstOrder, GaussNewton, SquaredEnergy, dirichlet_energy, minimizing_movements
from optim.movements.gauss_newton import View
from optim.movements.inner import InnerProblem, network_outputs, solve_inner
from optim.movements.proximal import proximal_point
from optim.movements.space import norm
from optim.options.damping import LevenbergMarquardt
from tests.reference import F64, jacobians

N, C = 6, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def net(seed=0, width=8, outputs=C):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).to(F64)


def entropy(u):
    return nn.functional.cross_entropy(u, torch.arange(len(u)) % C, reduction="none")


ENERGIES = {
    "squared": lambda: SquaredEnergy(draw(N, C, seed=1), 0.7),
    "dirichlet": lambda: dirichlet_energy((draw(N, N, seed=2).abs() + draw(N, N, seed=2).abs().mT), draw(N, C, seed=3)),
    "cross-entropy": lambda: ConvexEnergy(entropy),
    "dense": lambda: ConvexEnergy(lambda u: (u.diff(dim=0).square() + 1).sqrt().sum() + u.square().sum(), 2.0 * N),
}
MASSES = {
    "one": 1.0,
    "layers": {"0": 0.3, "2": 2.0},
    "entries": {"0": 1.0, "2.weight": draw(C, 8, seed=9).abs() + 0.5, "2.bias": 3.0},
}


def problem(model, energy, tau=0.5, centre=None):
    x = draw(N, 3)
    with torch.no_grad():
        u = network_outputs(model, x)
    return InnerProblem(model, x, energy, tau, u if centre is None else centre)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", ENERGIES)
def test_a_step_solves_the_normal_equations(name, mass):
    """(w JᵀBJ + εD)Δ = −w Jᵀρ densely, and the decrease foretold is that of the quadratic model."""
    model, energy, tau, epsilon = net(), ENERGIES[name](), 0.5, 0.02
    one = problem(model, energy, tau, centre=draw(N, C, seed=5))
    view = View.of(one, MASSES[mass], "cholesky")
    move, foretold = view.step(epsilon)

    u = network_outputs(model, one.x).detach()
    J = torch.cat(list(jacobians(model, one.x).values()), -1).reshape(N * C, -1)
    B = N * torch.func.hessian(energy.value)(u).reshape(N * C, -1) + torch.eye(N * C, dtype=F64) / tau
    rho = (N * torch.func.grad(energy.value)(u) + (u - one.centre) / tau).flatten()
    given, D = MASSES[mass], []
    for n, p in model.named_parameters():
        m = given if isinstance(given, float) else given.get(n, given.get(n.rpartition(".")[0]))
        D.append((torch.as_tensor(m, dtype=F64) * torch.ones_like(p)).flatten())
    C_ = J.mT @ B @ J / N
    expected = torch.linalg.solve(C_ + epsilon * torch.diag(torch.cat(D)), -J.mT @ rho / N)
    found = torch.cat([move[n].flatten() for n, _ in model.named_parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    model_fall = -(J.mT @ rho / N) @ found - 0.5 * found @ C_ @ found
    assert foretold == pytest.approx(model_fall.item(), rel=1e-9)
    assert foretold > 0


def test_conjugate_gradients_are_cholesky():
    one = problem(net(), ENERGIES["squared"](), centre=draw(N, C, seed=5))
    found, foretold = View.of(one, 0.5, "cg").step(0.02)
    expected, other = View.of(one, 0.5, "cholesky").step(0.02)
    for n in expected:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-8, atol=1e-10)
    assert foretold == pytest.approx(other, rel=1e-8)
    with pytest.raises(ValueError, match="constant curvature"):
        View.of(problem(net(), ENERGIES["cross-entropy"]()), 1.0, "cg")


@pytest.mark.parametrize("name", ENERGIES)
def test_a_linear_model_reaches_its_proximal_point(name):
    """Enough linear features: one step for quadratics (to ε), a few where B moves."""
    model = nn.Linear(3, C).to(F64)
    x = torch.cat([torch.eye(3), torch.zeros(1, 3)]).to(F64)  # 4 affinely independent points
    energies = {
        "squared": SquaredEnergy(draw(4, C, seed=1)),
        "dirichlet": dirichlet_energy(torch.ones(4, 4), draw(4, C, seed=3)),
        "cross-entropy": ConvexEnergy(entropy),
        "dense": ConvexEnergy(lambda u: (u.diff(dim=0).square() + 1).sqrt().sum(), 0.0),
    }
    run = minimizing_movements(
        model, x, energies[name], tau=2.0, steps=3, delta=1e-8, solver=GaussNewton(damping=1e-12), inner_steps=20
    )
    assert run.reached
    quadratic = name in ("squared", "dirichlet")
    assert all(one.iterations <= (1 if quadratic else 6) for one in run.inner)
    assert run.violated() == []


def test_the_metric_flow_is_a_fraction_of_the_step():
    model, other = net(), net()
    energy, settings = ENERGIES["squared"](), {"damping": 0.1, "mass": 0.5}
    one, two = problem(model, energy), problem(other, energy)
    next(GaussNewton(**settings).session(model).iterate(one))
    next(GaussNewton(lr=0.25, **settings).session(other).iterate(two))
    start = dict(net().named_parameters())
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q - start[n], 0.25 * (p - start[n]), rtol=1e-10, atol=1e-14)


def test_a_damping_schedule_is_asked_at_every_iteration():
    asked = []

    def damping(step):
        asked.append(step)
        return 1e-3

    one = problem(net(), ENERGIES["squared"]())
    session = GaussNewton(damping=damping).session(one.model)
    steps = session.iterate(one)
    for _ in range(3):
        next(steps)
    assert asked[-3:] == [0, 1, 2]


@pytest.mark.parametrize("name", ENERGIES)
def test_levenberg_marquardt_never_raises_the_objective(name):
    model = net(width=4)
    one = problem(model, ENERGIES[name](), tau=5.0)
    session = GaussNewton(damping=LevenbergMarquardt(start=1e-9)).session(model)
    before = one.objective(one.centre).item()
    for _, u in zip(range(15), session.iterate(one), strict=False):
        with torch.no_grad():
            torch.testing.assert_close(network_outputs(model, one.x), u, rtol=1e-12, atol=1e-12)
        assert one.objective(u).item() <= before + 1e-15
        before = one.objective(u).item()


def test_where_no_move_helps_the_damping_starts_anew(monkeypatch):
    model = net(width=4)
    one = problem(model, ENERGIES["squared"]())
    session = GaussNewton(damping=LevenbergMarquardt(start=1e-3)).session(model)
    steps = session.iterate(one)
    next(steps)
    assert session.damping != 1e-3
    before, rising = copy.deepcopy(model.state_dict()), itertools.count()
    monkeypatch.setattr(one, "objective", lambda u: u.new_tensor(float(next(rising))))
    assert next(steps, None) is None
    assert "lowered the objective" in one.reason
    assert (session.damping, session.growth) == (1e-3, 2.0)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize("start", [1e-3, 1e-12])
def test_every_trial_of_a_trust_region_is_an_evaluation(start, monkeypatch):
    model = net(width=4)
    one = problem(model, ENERGIES["cross-entropy"](), tau=5.0)
    seen = []
    monkeypatch.setattr(
        "optim.movements.gauss_newton.network_outputs", lambda *a: seen.append(network_outputs(*a)) or seen[-1]
    )
    next(GaussNewton(damping=LevenbergMarquardt(start=start)).session(model).iterate(one))
    assert one.evaluations == len(seen) > 0


def test_first_order_steps_are_those_of_the_loop():
    model, other = net(), net()
    energy, tau = ENERGIES["cross-entropy"](), 0.5
    one = problem(model, energy, tau)
    session = FirstOrder(lambda params: torch.optim.Adam(params, lr=0.01)).session(model)
    steps = session.iterate(one)
    found = [next(steps) for _ in range(4)]
    assert (one.gradients, one.evaluations) == (4, 5)
    opt = torch.optim.Adam(other.parameters(), lr=0.01)
    for u in found:
        opt.zero_grad()
        y = other(one.x)
        (energy.value(y) + ((y - one.centre).square().sum() / N) / (2 * tau)).backward()
        opt.step()
        torch.testing.assert_close(other(one.x).detach(), u, rtol=1e-11, atol=1e-12)


def test_moments_are_kept_only_where_asked():
    for keep, count in ((True, 1), (False, 3)):
        made = []

        def factory(params, made=made):
            made.append(torch.optim.Adam(params, lr=0.01))
            return made[-1]

        model = net()
        minimizing_movements(
            model,
            draw(N, 3),
            ENERGIES["squared"](),
            tau=0.5,
            steps=3,
            delta=1e-9,
            solver=FirstOrder(factory, keep),
            inner_steps=2,
        )
        assert len(made) == count
        assert all(p.grad is None for p in model.parameters())


def test_lbfgs_by_closure():
    model = net(width=32)
    solver = FirstOrder(
        lambda params: torch.optim.LBFGS(params, max_iter=20, line_search_fn="strong_wolfe"), closure=True
    )
    run = minimizing_movements(
        model, draw(N, 3), ENERGIES["squared"](), tau=1.0, steps=2, delta=1e-3, solver=solver, inner_steps=30
    )
    assert run.reached
    assert run.violated() == []


def test_the_best_iterate_is_kept():
    """Steps far too long: the outputs run away, and what is left is the best that was met, in θ as in u."""
    model, energy, x = net(), ENERGIES["squared"](), draw(N, 3)
    with torch.no_grad():
        u0 = network_outputs(model, x)
    target = proximal_point(energy, u0, 0.5)
    one = InnerProblem(model, x, energy, 0.5, u0)
    session = FirstOrder(lambda params: torch.optim.SGD(params, lr=3.0)).session(model)
    found = solve_inner(one, session, target, 1e-9, most=30, clock=lambda: 0.0)
    assert not found.reached
    assert found.delta <= norm(u0 - target).item()
    with torch.no_grad():
        torch.testing.assert_close(network_outputs(model, x), found.outputs, rtol=0, atol=1e-14)
    assert norm(found.outputs - target).item() == pytest.approx(found.delta)


class Runaway(torch.optim.SGD):
    """Two steps downhill, then nan."""

    taken = 0

    def step(self, closure=None):
        self.taken += 1
        super().step()
        if self.taken == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))


def test_a_solver_that_diverges_is_said_to():
    model = net()
    kept = copy.deepcopy(model)
    run = minimizing_movements(
        model,
        draw(N, 3),
        ENERGIES["squared"](),
        tau=0.5,
        steps=1,
        delta=1e-9,
        solver=FirstOrder(lambda params: Runaway(params, lr=0.05)),
    )
    assert not run.reached
    assert "diverged" in run.reason
    assert run.inner[0].iterations == 3
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert run.inner[0].delta < norm(run.trajectory.proximal[0] - run.trajectory.outputs[0]).item()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), kept.parameters(), strict=True))


def test_a_fixed_damping_without_a_step_ends_the_inner_solve_at_the_best_iterate():
    """An input twice: K is singular, and a damping that rounding swallows leaves nothing positive definite."""
    x = torch.cat([draw(N - 1, 3), draw(N - 1, 3)[:1]])
    targets = draw(N, C, seed=1)

    def run(damping):
        model = net(width=16)
        solver = GaussNewton(damping=damping)
        return model, minimizing_movements(
            model, x, SquaredEnergy(targets), tau=0.5, steps=2, delta=1e-9, solver=solver, inner_steps=5
        )

    model, ended = run(lambda step: 1e-2 if step < 2 else 1e-300)
    assert not ended.reached
    assert [one.iterations for one in ended.inner] == [2, 0]
    assert "no step at damping 1e-300: " in ended.reason
    assert "not positive definite" in ended.reason
    assert "a larger one, or LevenbergMarquardt(), may have one" in ended.reason
    assert ended.inner[0].delta < norm(ended.trajectory.proximal[0] - ended.trajectory.outputs[0]).item()
    with torch.no_grad():
        torch.testing.assert_close(network_outputs(model, x), ended.trajectory.outputs[-1], rtol=0, atol=1e-13)
    assert run(1e-300)[1].iterations == 0


class Watching(nn.Module):
    """A linear model that remembers its last outputs in a buffer."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(3, C, dtype=F64)
        self.register_buffer("last", torch.zeros(N, C, dtype=F64))

    def forward(self, x):
        y = self.linear(x)
        self.last.copy_(y.detach())
        return y


def test_buffers_are_those_of_the_best_iterate():
    model = Watching()
    run = minimizing_movements(
        model,
        draw(N, 3),
        ENERGIES["squared"](),
        tau=0.5,
        steps=1,
        delta=1e-9,
        solver=FirstOrder(lambda params: torch.optim.SGD(params, lr=3.0)),
        inner_steps=9,
    )
    assert not run.reached
    torch.testing.assert_close(model.last, run.trajectory.outputs[-1], rtol=0, atol=1e-13)


def test_seconds_are_the_solvers_own():
    clock = iter(range(0, 1000))
    run = minimizing_movements(
        net(),
        draw(N, 3),
        ENERGIES["squared"](),
        tau=0.5,
        steps=2,
        delta=1e-9,
        solver=FirstOrder(lambda params: torch.optim.SGD(params, lr=0.01)),
        inner_seconds=5,
        clock=lambda: next(clock),
    )
    assert [one.seconds for one in run.inner] == [5, 5]
    assert [one.iterations for one in run.inner] == [5, 5]
    assert "5 s were not enough" in run.reason


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: GaussNewton(damping=0.0), ValueError, "damping must be positive"),
        (lambda: GaussNewton(damping="much"), TypeError, "damping must be"),
        (lambda: GaussNewton(solver="qr"), ValueError, "unknown solver of GaussNewton 'qr'"),
        (lambda: GaussNewton(lr=0.0, damping=1.0), ValueError, "lr of GaussNewton must be positive"),
        (lambda: GaussNewton(lr=0.5), ValueError, "the trust region sets the length"),
        (lambda: GaussNewton(mass=-1.0).session(net()), ValueError, "mass"),
        (lambda: GaussNewton(mass={"7": 1.0}).session(net()), ValueError, "7"),
        (lambda: FirstOrder(torch.optim.Adam(net().parameters())), TypeError, "takes a function"),
        (lambda: FirstOrder(lambda params: 3).session(net()), TypeError, "must return a torch optimizer"),
        (
            lambda: FirstOrder(lambda params: torch.optim.Adam(net(1).parameters())).session(net()),
            ValueError,
            "4 of the 4 parameters of the Adam that factory returned are not the model's",
        ),
        (
            lambda: FirstOrder(lambda p: torch.optim.LBFGS(p)).session(net()),
            ValueError,
            "LBFGS.step asks for a closure",
        ),
        (
            lambda: GaussNewton().session(net().to(torch.bfloat16)),
            ValueError,
            "parameter '0.weight' is torch.bfloat16; Gauss–Newton .* torch.float32 or torch.float64",
        ),
    ],
)
def test_solvers_that_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
