"""Minimizing movements of networks: the inequalities on real runs, refusals that leave the model alone, float32, devices."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from optim import ConvexEnergy, FirstOrder, GaussNewton, SquaredEnergy, dirichlet_energy, minimizing_movements
from optim.movements.result import INEQUALITIES
from tests.reference import F64

N = 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def net(width=16, outputs=1, dtype=F64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def energy_of(name):
    signs = (torch.arange(N) % 2)[:, None]
    return {
        "squared": lambda: SquaredEnergy(draw(N, seed=2)),
        "dirichlet": lambda: dirichlet_energy(0.2 * torch.ones(N, N), draw(N, seed=2), 0.5),
        "logistic": lambda: ConvexEnergy(
            lambda u: (
                nn.functional.binary_cross_entropy_with_logits(u, signs.to(u), reduction="none").sum(1)
                + 0.05 * u.square().sum(1)
            ),
            convexity=0.1,
        ),
        "flat": lambda: ConvexEnergy(lambda u: nn.functional.softplus(-u).sum(1), floor=0.0),
    }[name]()


@pytest.mark.parametrize("solver", ["gauss-newton", "adam"])
@pytest.mark.parametrize("name", ["squared", "dirichlet", "logistic", "flat"])
def test_all_inequalities_hold_along_a_run(name, solver):
    made = GaussNewton() if solver == "gauss-newton" else FirstOrder(lambda p: torch.optim.Adam(p, lr=0.01))
    model = net()
    run = minimizing_movements(
        model, draw(N, 2), energy_of(name), tau=1.0, steps=5, delta=1e-3, solver=made, inner_steps=40
    )
    assert run.violated() == []
    c = run.columns()
    if solver == "gauss-newton":
        assert run.reached
        assert max(c["delta"]) <= 1e-3
    else:
        assert all(one.reached == (one.delta <= 1e-3) for one in run.inner)
    with torch.no_grad():
        torch.testing.assert_close(model(draw(N, 2)), run.trajectory.outputs[-1], rtol=0, atol=1e-14)
    frame = run.to_frame()
    assert len(frame) == 5
    assert {a for pair in INEQUALITIES for a in pair} <= set(frame.columns)
    assert frame["ball"].iloc[-1] == (math.inf if name == "flat" else frame["ball"].iloc[-1])
    assert run.iterations == sum(frame["iterations"])


def test_a_violated_inequality_is_named():
    """The claim λ = 10 for an energy of λ = 1 is what the check refuses; forced in, the columns show it."""
    run = minimizing_movements(net(), draw(N, 2), energy_of("squared"), tau=1.0, steps=3, delta=0.05)
    assert run.violated() == []
    wrong = copy.copy(run.trajectory)
    object.__setattr__(wrong, "convexity", 1e3)
    forged = copy.copy(run)
    object.__setattr__(forged, "trajectory", wrong)
    assert "tracking ≤ tracking_bound" in forged.violated()


def test_an_inner_solver_that_falls_short_says_so():
    model = net(width=1)  # 4 parameters for 8 outputs: the proximal points are out of reach
    run = minimizing_movements(model, draw(N, 2), energy_of("squared"), tau=1.0, steps=3, delta=1e-6, inner_steps=30)
    assert not run.reached
    assert "outer step 0 stopped at a distance of" in run.reason
    assert "1e-06 was asked for" in run.reason
    assert "3 of 3 steps fell short" in run.reason
    assert run.violated() == []  # with the δ_k that came out
    frame = run.to_frame()
    assert not frame["reached"].any()
    assert (frame["reason"] != "").all()


def test_a_step_within_delta_is_no_step():
    model = net()
    before = copy.deepcopy(model.state_dict())
    run = minimizing_movements(model, draw(N, 2), energy_of("squared"), tau=1e-9, steps=2, delta=0.1)
    assert run.reached
    assert run.iterations == 0
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tau": 0.0}, ValueError, "tau must be positive and finite, got 0.0"),
        ({"tau": -1.0}, ValueError, "tau must be positive and finite, got -1.0"),
        ({"tau": math.inf}, ValueError, "tau must be positive and finite, got inf"),
        ({"tau": math.nan}, ValueError, "tau must be positive and finite, got nan"),
        ({"tau": "1"}, TypeError, "tau must be a number"),
        ({"delta": 0.0}, ValueError, "delta must be positive"),
        ({"steps": 0}, ValueError, "steps must be an int of at least 1"),
        ({"steps": 2.0}, ValueError, "steps must be an int"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be an int"),
        ({"inner_seconds": 0.0}, ValueError, "inner_seconds must be positive"),
        ({"energy": lambda u: u.sum()}, TypeError, "write ConvexEnergy"),
        (
            {"energy": SquaredEnergy(torch.zeros(3, 1))},
            ValueError,
            r"targets are \(3, 1\), the model's outputs \(8, 1\)",
        ),
        ({"energy": ConvexEnergy(lambda u: -u.square().sum())}, ValueError, "not convex"),
        ({"energy": ConvexEnergy(lambda u: u.log().sum(1))}, ValueError, "not finite"),
        ({"solver": "adam"}, TypeError, "solver must be GaussNewton"),
        ({"clock": 3}, TypeError, "clock must be callable, got 3"),
        ({"output": 3}, TypeError, "output must be callable, got 3"),
        ({"x": torch.zeros(0, 2, dtype=F64)}, ValueError, "one common first dimension N >= 1"),
        ({"model": nn.Sequential(nn.LazyLinear(1))}, ValueError, "not initialised"),
        ({"model": "net"}, TypeError, "model must be an nn.Module"),
        ({"model": nn.Tanh()}, ValueError, "no trainable parameters"),
        ({"x": torch.full((N, 2), math.nan, dtype=F64)}, ValueError, "not finite"),
    ],
)
def test_what_is_refused(change, error, text):
    model = change.get("model", net())
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) and text != "not initialised" else {}
    options = {"tau": 1.0, "steps": 2, "delta": 1e-3, "energy": energy_of("squared"), "x": draw(N, 2), **change}
    options.pop("model", None)
    with pytest.raises(error, match=text):
        minimizing_movements(model, options.pop("x"), options.pop("energy"), **options)
    assert all(torch.equal(before[n], p) for n, p in (model.state_dict().items() if before else ()))


class Wandering(nn.Module):
    """Another output at every pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=F64)
        self.register_buffer("passes", torch.zeros((), dtype=F64))

    def forward(self, x):
        self.passes += 1
        return self.linear(x) + self.passes


NO_FUNCTION = {
    "dropout": (
        lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(F64),
        r"'1' \(Dropout\) draws",
    ),
    "BatchNorm": (
        lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).to(F64),
        "samples interact",
    ),
    "a forward that remembers": (Wandering, "two passes of the model at the same parameters and inputs differ by 1"),
}


@pytest.mark.parametrize("solver", [GaussNewton(), FirstOrder(lambda p: torch.optim.SGD(p, lr=0.01))])
@pytest.mark.parametrize("case", NO_FUNCTION)
def test_outputs_that_are_no_function_of_the_parameters_are_refused(case, solver):
    make, text = NO_FUNCTION[case]
    model = make()
    before = copy.deepcopy(model.state_dict())
    options = {"tau": 1.0, "steps": 1, "delta": 1e-3, "solver": solver, "inner_steps": 2}
    with pytest.raises(ValueError, match=text):
        minimizing_movements(model, draw(N, 2), energy_of("squared"), **options)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    if case != "a forward that remembers":
        minimizing_movements(model.eval(), draw(N, 2), energy_of("squared"), **options)


def test_an_interrupted_run_puts_buffers_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 1, dtype=F64)
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("stopped")

    model = Counting()
    with pytest.raises(RuntimeError, match="stopped"):
        minimizing_movements(
            model, draw(N, 2), energy_of("squared"), tau=1.0, steps=1, delta=1e-9,
            solver=FirstOrder(lambda params: Broken(params, lr=0.05)),
        )  # fmt: skip
    assert model.passes == 0


def test_concavity_met_later_puts_everything_back():
    """E is convex around the start and concave at the second proximal point: the model is as it was, first step undone."""
    calls = []

    def turning(u):
        calls.append(1)
        return torch.where(u < 1, u.square() - 4 * u, -3 - 4 * (u - 1).square() - 2 * (u - 1)).sum(1)

    energy = ConvexEnergy(turning)
    model = net(32)
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(0.01)
    before = copy.deepcopy(model.state_dict())
    energy_check = __import__("optim.movements.convexity", fromlist=["check_curvature"])
    energy_check.check_curvature(energy, torch.zeros(N, 1, dtype=F64))
    with pytest.raises(ValueError, match="not convex"):
        minimizing_movements(model, draw(N, 2), energy, tau=0.2, steps=6, delta=1e-3)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_an_energy_that_ends_on_the_way_puts_everything_back():
    """Finite and convex where the run starts, not a number where its proximal points lead."""
    model = net(32)
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(0.01)
    before = copy.deepcopy(model.state_dict())
    energy = ConvexEnergy(lambda u: (0.5 * (u - 2).square() + 0 * (0.5 - u).sqrt()).sum(1), convexity=1.0)
    with pytest.raises(
        ValueError,
        match="energy 'callable' or its gradient is not finite on the way to the proximal point of 'callable'",
    ):
        minimizing_movements(model, draw(N, 2), energy, tau=0.2, steps=6, delta=1e-3)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_floor_above_the_energy_is_refused_and_one_below_the_minimum_changes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    x = draw(N, 2)

    def run(floor):
        energy = ConvexEnergy(lambda u: 0.5 * (u - 2).square().sum(1), convexity=1.0, floor=floor)
        return minimizing_movements(model, x, energy, tau=0.5, steps=2, delta=1e-3)

    with pytest.raises(ValueError, match=r"floor = 0\.5 of energy 'callable' is above E = "):
        run(0.5)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    budget = run(-10.0).columns()["budget"]
    model.load_state_dict(before)
    assert run(0.0).columns()["budget"] == pytest.approx(budget, rel=1e-9)  # E* is known, whatever the floor


@pytest.mark.parametrize("floor", [math.nan, math.inf, "0", True])
def test_a_floor_is_a_number(floor):
    with pytest.raises(ValueError, match="floor must be a number that E never falls below"):
        ConvexEnergy(lambda u: u.square().sum(1), floor=floor)


def test_an_interrupted_run_puts_everything_back():
    model = net()
    before = copy.deepcopy(model.state_dict())

    class Broken(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            super().step()
            Broken.count += 1
            if Broken.count > 4:
                raise KeyboardInterrupt

    solver = FirstOrder(lambda params: Broken(params, lr=0.05))
    with pytest.raises(KeyboardInterrupt):
        minimizing_movements(
            model, draw(N, 2), energy_of("squared"), tau=1.0, steps=3, delta=1e-9, solver=solver, inner_steps=3
        )
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_single_precision_networks():
    """Function space stays in float64; δ is then as fine as the outputs are."""
    model = net(dtype=torch.float32)
    run = minimizing_movements(model, draw(N, 2).float(), energy_of("squared"), tau=1.0, steps=4, delta=1e-4)
    assert run.reached
    assert run.trajectory.outputs.dtype == F64
    assert next(model.parameters()).dtype == torch.float32
    assert run.violated() == []


def test_outputs_of_any_shape_and_inputs_in_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 4).to(F64)

        def forward(self, a, b):
            return {"out": torch.tanh(self.one(a + b)).reshape(-1, 2, 2)}

    x = (draw(3, 2), draw(3, 2, seed=4))
    energy = SquaredEnergy(0.1 * draw(3, 4, seed=5))
    run = minimizing_movements(Two(), x, energy, tau=0.5, steps=2, delta=1e-3, output=lambda y: y["out"])
    assert run.reached
    assert run.trajectory.outputs.shape == (3, 3, 4)


def test_nothing_global_moves_and_runs_repeat():
    state, ends = torch.random.get_rng_state(), []
    for _ in range(2):
        model = net()
        run = minimizing_movements(
            model, draw(N, 2), energy_of("logistic"), tau=1.0, steps=3, delta=1e-4, keep_parameters=True
        )
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    assert torch.equal(torch.random.get_rng_state(), state)
    for n, p in model.named_parameters():
        assert run.parameters[n].shape == (4, *p.shape)
        assert torch.equal(run.parameters[n][-1], p)


def test_on_each_device(device):
    model = net(dtype=torch.float32).to(device)
    x, targets = draw(N, 2).float().to(device), draw(N, seed=2).to(device)
    for solver in (GaussNewton(), FirstOrder(lambda p: torch.optim.Adam(p, lr=0.01))):
        run = minimizing_movements(
            model, x, SquaredEnergy(targets), tau=1.0, steps=2, delta=1e-3, solver=solver, inner_steps=20
        )
        assert run.violated() == []


def test_no_more_inner_iterations_than_allowed():
    solver = FirstOrder(lambda params: torch.optim.SGD(params, lr=1e-3))
    options = {"tau": 1.0, "steps": 2, "delta": 1e-9, "solver": solver, "inner_steps": 3}
    run = minimizing_movements(net(), draw(N, 2), energy_of("squared"), **options)
    assert [one.iterations for one in run.inner] == [3, 3]
    assert run.violated() == []
    assert replace(run, certificates=0 * run.certificates).violated() == ["delta ≤ delta_certificate"]


def test_a_run_is_kept_where_the_minimum_is_not_known():
    """Every proximal point is found, u* (at a kink) is not: no distance to it, the rest stands."""
    energy = ConvexEnergy(lambda u: 3 * (u + 5).abs().sum(1) + 0.05 * u.square().sum(1), convexity=0.1, floor=0.0)
    run = minimizing_movements(net(), draw(N, 2), energy, tau=0.3, steps=3, delta=1e-3)
    assert run.reached
    assert run.trajectory.minimizer is None
    c = run.columns()
    assert all(math.isnan(value) for value in c["distance"] + c["distance_bound"])
    assert c["budget"] == pytest.approx(
        [(2 * 0.3 * k * run.energies[0].item() / (2 + 0.3 * 0.1)) ** 0.5 for k in (1, 2, 3)], rel=1e-9
    )  # E(u⁰) − floor
    assert run.violated() == []


def test_energies_are_those_after_each_step_and_the_budget_is_that_of_the_fall_to_the_minimum():
    model, x, tau, K = net(), draw(N, 2), 0.5, 3
    energy = ConvexEnergy(lambda u: 0.5 * (u - 2).square().sum(1) + 3.0, convexity=1.0)
    run = minimizing_movements(model, x, energy, tau=tau, steps=K, delta=1e-3)
    outputs, c = run.trajectory.outputs, run.columns()
    assert c["energy"] == pytest.approx([energy.value(u).item() for u in outputs[1:]], rel=1e-12)
    assert c["exact_energy"] == pytest.approx([energy.value(u).item() for u in run.trajectory.exact[1:]], rel=1e-12)
    fall = energy.value(outputs[0]).item() - 3.0
    assert c["budget"] == pytest.approx([(2 * tau * k * fall / (2 + tau)) ** 0.5 for k in (1, 2, 3)], rel=1e-9)
    # nothing is known of a minimum: the fall along the exact sequence
    flat = ConvexEnergy(lambda u: nn.functional.softplus(-u).sum(1))
    run = minimizing_movements(net(1), x, flat, tau=tau, steps=1, delta=1e-3)
    fall = (flat.value(run.trajectory.exact[0]) - flat.value(run.trajectory.exact[1])).item()
    assert run.columns()["budget"] == pytest.approx([(tau * fall) ** 0.5], rel=1e-9)
