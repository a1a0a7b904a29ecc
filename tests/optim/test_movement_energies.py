"""Energies, curvatures and proximal points against autograd, dense matrices and scipy."""

import math

import pytest
import scipy.optimize
import torch
from torch import nn

from nt_kernel.errors import NumericalError
from optim import ConvexEnergy, QuadraticEnergy, SquaredEnergy, chain_weights, dirichlet_energy
from optim.movements.convexity import check_curvature, check_energy
from optim.movements.proximal import EXACT, certificate, minimum, newton, proximal_point
from optim.movements.space import Curvature, inner_product, norm
from tests.reference import F64

N, C = 5, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def weights():
    w = draw(N, N, seed=7).abs()
    return w + w.mT


def entropy(u):
    """Cross-entropy against classes 0, 1, 0, 1, …: convex, λ = 0, blocks."""
    return nn.functional.cross_entropy(u, torch.arange(len(u)) % C, reduction="none")


def coupled(u):
    """Convex, not quadratic, not separable."""
    return (u.diff(dim=0).square() + 1).sqrt().sum() + u.square().sum()


ENERGIES = {
    "squared": lambda: SquaredEnergy(draw(N, C, seed=1), 0.7),
    "quadratic": lambda: QuadraticEnergy(weights() @ weights(), draw(N, C, seed=2), 3.0),
    "dirichlet": lambda: dirichlet_energy(weights(), draw(N, C, seed=3), torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])),
    "cross-entropy": lambda: ConvexEnergy(entropy, floor=0.0),
    "entropy and ridge": lambda: ConvexEnergy(lambda u: entropy(u) + 0.15 * u.square().sum(1), convexity=0.3),
    "losses that couple": lambda: ConvexEnergy(lambda u: (u - u.roll(1, 0)).square().sum(1) + u.square().sum(1), 2.0),
    "coupled": lambda: ConvexEnergy(coupled, convexity=2.0 * N),
}
KINDS = {"squared": "number", "quadratic": "samples", "dirichlet": "samples", "cross-entropy": "blocks"}
KINDS |= {"entropy and ridge": "blocks", "losses that couple": "dense", "coupled": "dense"}


@pytest.mark.parametrize("name", ENERGIES)
def test_gradient_and_curvature_are_those_of_the_value(name):
    energy, u = ENERGIES[name](), draw(N, C, seed=4)
    slope = torch.func.grad(energy.value)(u)
    torch.testing.assert_close(energy.gradient(u), N * slope, rtol=1e-12, atol=1e-13)  # ⟨∇E, v⟩ = (1/N)Σ…
    hessian = N * torch.func.hessian(energy.value)(u).reshape(N * C, N * C)
    B = energy.curvature(u).shifted(0.4)
    assert B.kind == KINDS[name]
    v = draw(N, C, seed=5)
    dense = hessian + 0.4 * torch.eye(N * C, dtype=F64)
    torch.testing.assert_close(B.apply(v).flatten(), dense @ v.flatten(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(B.solve(v).flatten(), torch.linalg.solve(dense, v.flatten()), rtol=1e-9, atol=1e-10)
    assert B.smallest() == pytest.approx(torch.linalg.eigvalsh(dense)[0].item(), rel=1e-8, abs=1e-10)
    gram = draw(N * C, N * C, seed=6)
    kept = gram.clone()
    found = B.add_to(gram, 0.3, C)
    torch.testing.assert_close(found, gram + 0.3 * torch.linalg.inv(dense), rtol=1e-9, atol=1e-10)
    assert torch.equal(gram, kept)


@pytest.mark.parametrize("tau", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("name", ENERGIES)
def test_proximal_points_are_the_minimum(name, tau):
    """Against scipy on the same objective, and certified by the gradient far closer than that."""
    energy, centre = ENERGIES[name](), draw(N, C, seed=8)
    p = proximal_point(energy, centre, tau)
    assert certificate(energy, p, centre, tau) <= 3 * EXACT * max(1.0, norm(p).item())
    torch.testing.assert_close(p, newton(energy, centre, tau), rtol=1e-9, atol=1e-10)

    def objective(z):
        u = torch.as_tensor(z).reshape(N, C)
        return (energy.value(u) + inner_product(u - centre, u - centre) / (2 * tau)).item() * N

    found = scipy.optimize.minimize(objective, centre.flatten().numpy(), method="BFGS", options={"gtol": 1e-9})
    torch.testing.assert_close(p.flatten(), torch.as_tensor(found.x), rtol=1e-4, atol=1e-5)
    assert objective(p.flatten().numpy()) <= found.fun + 1e-11


@pytest.mark.parametrize("name", ENERGIES)
def test_the_certificate_bounds_the_distance(name):
    energy, centre, tau = ENERGIES[name](), draw(N, C, seed=8), 0.7
    p = proximal_point(energy, centre, tau)
    for seed in range(5):
        v = p + draw(N, C, seed=20 + seed) * 10.0 ** (-seed)
        assert norm(v - p).item() <= certificate(energy, v, centre, tau) * (1 + 1e-9) + 1e-12


def test_minima():
    for name in ("squared", "quadratic", "entropy and ridge", "coupled"):
        energy = ENERGIES[name]()
        u, least = minimum(energy, draw(N, C, seed=9))
        assert norm(energy.gradient(u)).item() <= 1e-9
        assert least == pytest.approx(energy.value(u).item())
        assert all(energy.value(u + 0.1 * draw(N, C, seed=s)) > least for s in range(5))
    assert minimum(ENERGIES["cross-entropy"](), draw(N, C)) is None
    flat = QuadraticEnergy(torch.zeros(2, 2), torch.zeros(2, 1))
    assert (flat.convexity, flat.minimizer, minimum(flat, torch.zeros(2, 1, dtype=F64))) == (0.0, None, None)


def test_dirichlet_is_its_definition():
    w, a, u = weights(), draw(N, C, seed=3), draw(N, C, seed=4)
    f = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0], dtype=F64)
    energy = dirichlet_energy(w, a, f)
    pairs = sum(w[i, j] * (u[i] - u[j]).square().sum() for i in range(N) for j in range(i))
    expected = (pairs / 2 + sum(f[i] * (u[i] - a[i]).square().sum() for i in range(N)) / 2) / N
    assert energy.value(u).item() == pytest.approx(expected.item(), rel=1e-12)
    assert energy.convexity == pytest.approx(torch.linalg.eigvalsh(energy.A)[0].item())
    assert dirichlet_energy(w, a, 0.0).convexity == 0.0
    t = torch.tensor([0.0, 0.1, 0.4, 0.45, 1.0], dtype=F64)
    chain = dirichlet_energy(chain_weights(t), torch.zeros(N, 1), 0.0)
    values = t.square()[:, None]
    integral = (0.5 * values[:, 0].diff().square() / t.diff()).sum()
    assert chain.value(values).item() == pytest.approx(integral.item(), rel=1e-12)


BAD = {
    "not symmetric": (lambda: QuadraticEnergy(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2, 1)), "symmetric"),
    "concave": (lambda: QuadraticEnergy(torch.diag(torch.tensor([1.0, -0.5])), torch.zeros(2, 1)), r"not convex.*-0.5"),
    "nan": (lambda: QuadraticEnergy(torch.full((2, 2), float("nan")), torch.zeros(2, 1)), "not finite"),
    "shapes": (lambda: QuadraticEnergy(torch.eye(2), torch.zeros(3, 1)), r"A must be \[N, N\]"),
    "targets": (lambda: SquaredEnergy(torch.full((2, 1), float("inf"))), "finite"),
    "curvature": (lambda: SquaredEnergy(torch.zeros(2, 1), 0.0), "curvature must be positive"),
    "λ < 0": (lambda: ConvexEnergy(coupled, -1.0), "convexity must be a number λ ≥ 0"),
    "weights": (lambda: dirichlet_energy(-torch.ones(2, 2), torch.zeros(2, 1)), "must not be negative"),
    "order": (lambda: chain_weights(torch.tensor([1.0, 0.0])), "ascending"),
}


ONE, SQUARE = torch.zeros(2, 1), torch.ones(2, 2)
WRONG_KIND = {
    "A": (lambda: QuadraticEnergy([[1.0]], ONE), TypeError, "A must be a real tensor, got list"),
    "b": (lambda: QuadraticEnergy(SQUARE, [[1.0]]), TypeError, "b must be a real tensor, got list"),
    "complex": (lambda: QuadraticEnergy(SQUARE + 0j, ONE), TypeError, "A must be a real tensor, got torch.complex64"),
    "constant": (lambda: QuadraticEnergy(SQUARE, ONE, "0"), TypeError, "constant must be a number, got '0'"),
    "empty A": (lambda: QuadraticEnergy(torch.zeros(0, 0), torch.zeros(0, 1)), ValueError, r"A must be \[N, N\]"),
    "targets": (lambda: SquaredEnergy([1.0]), TypeError, "targets must be a real tensor, got list"),
    "empty": (lambda: SquaredEnergy(torch.zeros(0, 1)), ValueError, r"N, C ≥ 1, got shape \(0, 1\)"),
    "three": (lambda: SquaredEnergy(torch.zeros(2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
    "weights": (lambda: dirichlet_energy([[0.0]], ONE), TypeError, "weights must be a real tensor, got list"),
    "size": (lambda: dirichlet_energy(torch.ones(3, 3), ONE), ValueError, r"N = 2 as the targets, got shape \(3, 3\)"),
    "no weights": (lambda: dirichlet_energy(torch.ones(0, 0), ONE), ValueError, r"got shape \(0, 0\)"),
    "values": (lambda: dirichlet_energy(SQUARE, [0.0, 1.0]), TypeError, "targets must be a real tensor, got list"),
    "long": (lambda: dirichlet_energy(SQUARE, ONE, torch.ones(3)), ValueError, r"with N = 2, got shape \(3,\)"),
    "words": (
        lambda: dirichlet_energy(SQUARE, ONE, "x"),
        TypeError,
        r"fidelity must be a number or a tensor \[N\], got 'x'",
    ),
    "points": (lambda: chain_weights([0.0, 1.0]), TypeError, "points must be a real tensor, got list"),
    "no points": (lambda: chain_weights(torch.zeros(0)), ValueError, r"got shape \(0,\)"),
}


@pytest.mark.parametrize("case", WRONG_KIND)
def test_what_is_no_energy_says_what_came(case):
    make, error, text = WRONG_KIND[case]
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("case", BAD)
def test_energies_that_are_refused(case):
    make, text = BAD[case]
    with pytest.raises(ValueError, match=text):
        make()
    with pytest.raises(TypeError, match="callable"):
        ConvexEnergy(3.0)


NOT_CONVEX = {
    "concave": (lambda u: -u.square().sum(), 0.0, "not convex"),
    "λ too large": (lambda u: u.square().sum(1), 3.0, "not 3-convex"),
    "double well far away": (lambda u: (u.square() - 1).square().sum(1) + 0 * u.sum(), 0.0, "not convex"),
    "infinite here": (lambda u: u.sum() / 0.0, 0.0, "not finite"),
    "not a number": (lambda u: (u - 100).log().sum(1), 0.0, "not finite"),
    "two dimensions": (lambda u: u, 0.0, "scalar or the losses"),
    "no tensor": (lambda u: 1.0, 0.0, "got float"),
}


@pytest.mark.parametrize("case", NOT_CONVEX)
def test_energies_that_are_not_what_they_say(case):
    function, convexity, text = NOT_CONVEX[case]
    at = 0.1 * draw(N, C) if case.startswith("double") else draw(N, C)
    with pytest.raises(ValueError, match=text):
        check_energy(ConvexEnergy(function, convexity), at)


def test_concavity_elsewhere_is_met_by_the_secants():
    """Convex around the network's outputs, concave beyond 3: only a secant can see it."""
    bump = ConvexEnergy(lambda u: torch.where(u.abs() < 3, u.square(), 6 * u.abs() - 9 - (u.abs() - 3).square()).sum(1))
    check_curvature(bump, torch.zeros(N, C, dtype=F64))
    with pytest.raises(ValueError, match=r"not convex: ⟨∇E"):
        check_energy(bump, 0.1 * draw(N, C))


def test_a_modulus_is_held_against_the_curvature_and_against_the_secants():
    quadratic = ConvexEnergy(lambda u: u.square().sum(1), 3.0)
    with pytest.raises(ValueError, match=r"not 3-convex: λ_min\(∇²E\) = 2 at"):
        check_curvature(quadratic, torch.zeros(N, C, dtype=F64))
    # 1-convex where |u| < 1, straight beyond
    huber = ConvexEnergy(lambda u: torch.where(u.abs() < 1, u.square() / 2, u.abs() - 0.5).sum(1), 1.0)
    check_curvature(huber, torch.zeros(N, C, dtype=F64))
    with pytest.raises(ValueError, match=r"not 1-convex: ⟨∇E"):
        check_energy(huber, torch.zeros(N, C, dtype=F64))


@pytest.mark.parametrize("name", ENERGIES)
def test_convex_energies_pass(name):
    for seed in range(5):
        check_energy(ENERGIES[name](), 3 * draw(N, C, seed=seed), seed=seed)


def test_newton_says_how_far_it_came():
    kink = ConvexEnergy(lambda u: u.abs().sum(1))  # not smooth at its proximal points
    with pytest.raises(NumericalError, match="Newton's method"):
        newton(kink, torch.full((2, 1), 0.1, dtype=F64), 1.0)
    with pytest.raises(NumericalError, match="not positive definite"):
        Curvature("number", torch.tensor(-1.0), 0.5).solve(torch.ones(2, 1))


CANCELLING = {
    "terms far larger than E": (lambda u: u.exp() - u - 1, 0.0, False),
    "softplus both ways": (
        lambda u: nn.functional.softplus(u) + nn.functional.softplus(-u) - 2 * math.log(2),
        0.0,
        False,
    ),
    "a constant": (lambda u: 0.5 * u.square() + 1e6 - 1e6, 1.0, False),
    "minimum of a small ridge": (
        lambda u: (
            nn.functional.binary_cross_entropy_with_logits(u, (torch.arange(4) % 2)[:, None].to(u), reduction="none")
            + 5e-7 * u.square()
        ),
        1e-6,
        True,
    ),
}


@pytest.mark.parametrize("case", CANCELLING)
def test_newton_goes_on_where_the_fall_of_the_energy_is_below_its_rounding(case):
    function, convexity, of_itself = CANCELLING[case]
    energy = ConvexEnergy(lambda u: function(u).sum(1), convexity)
    for seed in (1, 2, 8, 9):
        g = torch.Generator().manual_seed(seed)
        size = 10 ** (torch.rand((), generator=g, dtype=F64) * 4 - 3)
        centre, tau = (
            torch.randn(4, 1, generator=g, dtype=F64) * size,
            10 ** (torch.rand((), generator=g).item() * 3 - 1),
        )
        p = newton(energy, centre, None if of_itself else tau)
        slope = energy.gradient(p) + (0 if of_itself else (p - centre) / tau)
        off = norm(slope).item() / (convexity + (0 if of_itself else 1 / tau))
        assert off <= 100 * EXACT * max(1.0, norm(p).item())


def test_newton_does_not_go_in_circles():
    """Up by a smaller slope, back by a smaller value: softplus(−2u) with a long step."""
    energy = ConvexEnergy(lambda u: nn.functional.softplus(-2 * u).sum(1))
    centre = torch.tensor([[-0.72], [3.85], [4.64], [-5.46]], dtype=F64)
    p = proximal_point(energy, centre, 36.7)
    assert certificate(energy, p, centre, 36.7) <= 100 * EXACT * norm(p).item()


def test_what_newton_does_not_reach_is_named_and_an_unknown_minimum_is_none():
    kink = ConvexEnergy(lambda u: (u.abs() + 0.5 * (u + 0.3).square()).sum(1), 1.0)
    at = torch.full((2, 1), 3.0, dtype=F64)
    with pytest.raises(NumericalError, match="the minimum of 'callable' is known to this distance only"):
        newton(kink, at, None)
    assert minimum(kink, at) is None


UNSEEN = {
    "all": lambda u: (u.detach() - 5).square().sum(1),
    "a number": lambda u: torch.tensor(u.detach().square().sum().item()),
    "a part": lambda u: u.square().sum(1) + 3 * u.detach().sum(1),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_an_energy_that_autograd_does_not_see_is_refused(case):
    for seed in range(5):
        with pytest.raises(ValueError, match=r"not what its gradient says.*no detach\(\), item\(\) or numpy"):
            check_energy(ConvexEnergy(UNSEEN[case]), 1 + draw(N, C, seed=seed))


def test_both_sides_of_a_point_near_an_unseen_minimum_are_looked_at():
    """E − E(u) < 0 on one side only, and only near u."""
    for seed in range(12):
        u = draw(N, C, seed=seed)
        target = u + 0.05
        with pytest.raises(ValueError, match="not what its gradient says"):
            check_energy(ConvexEnergy(lambda v, target=target: (v.detach() - target).square().sum(1)), u)


def test_values_of_few_digits_are_no_reason_to_refuse():
    for function in (
        lambda u: u.sum(1) + 1e6 - 1e6,
        lambda u: u.exp().sum(1) - u.sum(1) - C,
        lambda u: u.float().sum(1),
    ):
        for seed in range(5):
            for size in (1e-6, 1.0, 30.0):
                check_energy(ConvexEnergy(function), size * draw(N, C, seed=seed), seed=seed)


def test_a_gradient_with_a_jump_is_no_proximal_point_to_rounding():
    with pytest.raises(NumericalError, match=r"proximal point of 'callable' is known to this distance only \("):
        proximal_point(ConvexEnergy(lambda u: u.abs().sum(1)), torch.full((1, 1), 0.3, dtype=F64), 1.0)
