"""σ_min of J, its ball and the verdicts against dense Jacobians; negative controls for every verdict."""

import math

import pytest
import torch
from torch import nn

from optim import GaussNewton, SquaredEnergy, minimizing_movements
from optim.movements.degeneracy import Nondegeneracy, local_nondegeneracy
from tests.reference import F64, jacobians

N = 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def net(width, inputs=2, outputs=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).to(F64)


def movement(model, x, size=1.0, tau=1.0, steps=3):
    a = size * draw(N, 2, seed=3)
    options = {"delta": 1e-3, "solver": GaussNewton(), "inner_steps": 30, "keep_parameters": True}
    return minimizing_movements(model, x, SquaredEnergy(a), tau=tau, steps=steps, **options)


def verdicts(seen):
    return [v.verdict for v in seen.verdicts()]


@pytest.mark.parametrize("mass", [1.0, {"0": 0.5, "2": 3.0}])
def test_the_numbers_are_those_of_dense_jacobians(mass):
    model, x = net(12), draw(N, 2)
    run = movement(model, x)
    seen = local_nondegeneracy(model, x, run, mass=mass)
    D = torch.cat(
        [
            torch.full_like(p, mass if isinstance(mass, float) else mass[n[0]]).flatten()
            for n, p in model.named_parameters()
        ]
    ).detach()

    def at(k):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(run.parameters[n][k])
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        return torch.cat(list(jacobians(model, x).values()), -1).reshape(2 * N, -1) / D.sqrt() / N**0.5, theta

    J0, start = at(0)
    for k in range(4):
        J, theta = at(k)
        values = torch.linalg.svdvals(J)
        assert seen.sigma_min[k].item() == pytest.approx(values[-1].item(), rel=1e-6)
        assert seen.sigma_min[k] <= values[-1] * (1 + 1e-12)
        assert seen.sigma_max[k].item() == pytest.approx(values[0].item(), rel=1e-10)
        assert seen.displacement[k].item() == pytest.approx((D.sqrt() * (theta - start)).norm().item(), rel=1e-10)
        assert seen.change[k].item() == pytest.approx(torch.linalg.matrix_norm(J - J0, 2).item(), rel=1e-5, abs=1e-7)
    ratios = [torch.linalg.matrix_norm(at(k)[0] - J0, 2) / (D.sqrt() * (at(k)[1] - start)).norm() for k in (1, 2, 3)]
    assert seen.lipschitz == pytest.approx(max(ratios).item(), rel=1e-5)
    assert seen.radius == pytest.approx((seen.sigma_min[0] / (2 * max(ratios))).item(), rel=1e-5)
    assert seen.path == pytest.approx(sum(run.columns()["move"]))
    assert seen.needed == pytest.approx(2 * seen.path / seen.sigma_min[0].item())


def test_a_short_movement_of_a_wide_network_stays_inside():
    model, x = net(400), draw(N, 2)
    seen = local_nondegeneracy(model, x, movement(model, x, size=0.2, tau=0.02, steps=2), mass=1.0)
    assert verdicts(seen)[:2] == ["holds", "holds"]
    assert seen.displacement.max() < seen.radius
    assert seen.structural == ""


def test_weyl_holds_inside_the_ball():
    model, x = net(100), draw(N, 2)
    seen = local_nondegeneracy(model, x, movement(model, x, steps=6))
    assert (seen.sigma_min >= seen.sigma_min[0] - seen.change - 1e-7).all()


def test_negative_controls():
    x = draw(N, 2)
    narrow = net(2)  # 12 parameters for 12 outputs: not onto in general; 1 wide: 7 < 12
    tiny = net(1)
    seen = local_nondegeneracy(tiny, x, movement(tiny, x))
    assert verdicts(seen) == ["violated"] * 3
    assert "7 parameters cannot move 12 outputs" in seen.structural
    assert (seen.sigma_min == 0).all()
    assert seen.needed == math.inf

    twice = torch.cat([x[:-1], x[:1]])
    wide = net(100)
    seen = local_nondegeneracy(wide, twice, movement(wide, twice))
    assert verdicts(seen) == ["violated"] * 3
    assert "2 samples have the same input" in seen.structural

    close = torch.cat([x[:-1], x[:1] + 1e-13])  # no two equal, yet nothing can tell them apart
    seen = local_nondegeneracy(wide, close, movement(wide, close))
    assert verdicts(seen) == ["undecided"] * 3

    seen = local_nondegeneracy(narrow, x, movement(narrow, x, size=5.0, tau=10.0))  # a long way for a small network
    assert verdicts(seen)[1] == "violated"
    assert "leave" in seen.verdicts()[1].reason


def test_a_fall_of_sigma_is_violated():
    seen = Nondegeneracy(
        torch.tensor([1.0, 0.9, 0.4]),
        torch.ones(3),
        torch.tensor([0.0, 0.1, 0.2]),
        torch.tensor([0.0, 0.1, 0.6]),
        0.3,
        "",
    )
    first, second, third = seen.verdicts()
    assert first.verdict == "violated"
    assert "0.4 of its start" in first.reason
    assert first.margin == pytest.approx(-0.1)
    assert seen.lipschitz == pytest.approx(3.0)
    assert (second.verdict, third.verdict) == ("violated", "violated")  # .2 and .6 against R = 1/6
    assert third.to_dict()["value"] == pytest.approx(0.6)


def test_a_run_without_parameters_is_refused():
    model, x = net(8), draw(N, 2)
    run = minimizing_movements(model, x, SquaredEnergy(draw(N, 2)), tau=1.0, steps=1, delta=0.1)
    with pytest.raises(ValueError, match="keep_parameters=True"):
        local_nondegeneracy(model, x, run)


def test_on_the_edge_of_the_ball_is_not_inside():
    two, move = torch.tensor([2.0, 2.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    seen = Nondegeneracy(two, two, displacement=move, change=move, path=1.0, structural="")
    assert (seen.radius, seen.needed) == (1.0, 1.0)
    assert verdicts(seen) == ["holds", "violated", "violated"]
