"""Bound-optimal masses: against a cvxpy solution of the same program, brute force, the dense kernel, and twins on digits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_kernel import generalized_ntk
from nt_kernel.errors import NumericalError
from optim import Woodbury
from stability import Replacement, train_twins
from stability.contraction.optimal_mass import MassSnapshot, mass_snapshot, optimal_masses
from tests.stability.dense import small_problem

F64 = torch.float64


def random_snapshots(seed, layers=3, n=3, p=2, extra=1, count=2):
    """Layers of random ranks, no one of which has full rank alone."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        kernels, blocks = {}, {}
        for a in range(layers):
            scale = 10.0 ** (2 * torch.rand(1, generator=draw).item() - 1)
            J = scale * torch.randn(n + extra, p, 2 + 2 * a, generator=draw, dtype=F64)
            flat = J[:n].flatten(0, 1)
            kernels[str(a)], blocks[str(a)] = flat @ flat.mT, J @ J.mT
        out.append(MassSnapshot(kernels, blocks, n))
    return out


def ratio(snapshots, weights):
    """h/ξ from the definitions."""
    names = list(snapshots[0].kernels)
    h = max(
        torch.linalg.eigvalsh(sum(w * s.blocks[a] for w, a in zip(weights, names, strict=True)))[:, -1].max().item()
        for s in snapshots
    )
    xi = min(
        torch.linalg.eigvalsh(sum(w * s.kernels[a] for w, a in zip(weights, names, strict=True)) / s.samples)[0].item()
        for s in snapshots
    )
    return h / xi if xi > 0 else math.inf


def by_cvxpy(snapshots, constraint, floor):
    """The semidefinite program as it is written, by Clarabel: the optimal value of s."""
    import cvxpy

    names = list(snapshots[0].kernels)
    w, s = cvxpy.Variable(len(names)), cvxpy.Variable()
    sup = lambda m: float(torch.linalg.eigvalsh(m)[..., -1].max())  # noqa: E731
    kappa2 = [max(sup(t.blocks[a]) for t in snapshots) for a in names]
    size = max(sup(sum(t.blocks.values())) for t in snapshots) if constraint == "exact" else sum(kappa2)
    constraints = [w >= floor / size]
    for t in snapshots:
        K = sum(w[j] * t.kernels[a].numpy() / t.samples for j, a in enumerate(names))
        constraints.append(K - s * np.eye(len(t.kernels[names[0]])) >> 0)
        if constraint == "exact":
            for i in range(len(t.blocks[names[0]])):
                R = sum(w[j] * t.blocks[a][i].numpy() for j, a in enumerate(names))
                constraints.append(np.eye(R.shape[0]) - R >> 0)
    if constraint == "norms":
        constraints.append(sum(w[j] * k for j, k in enumerate(kappa2)) <= 1)
    problem = cvxpy.Problem(cvxpy.Maximize(s), constraints)
    problem.solve(solver=cvxpy.CLARABEL)
    return float(s.value)


@given(seed=st.integers(0, 10_000), constraint=st.sampled_from(["exact", "norms"]))
@settings(max_examples=12, deadline=None)
def test_cutting_planes_and_clarabel_agree(seed, constraint):
    snapshots = random_snapshots(seed)
    found = optimal_masses(snapshots, constraint=constraint)
    s = by_cvxpy(snapshots, constraint, 1e-3)
    assert 1 / found.bound == pytest.approx(s, rel=2e-3)
    weights = [1 / found.masses[a] for a in ("0", "1", "2")]
    assert found.ratio == pytest.approx(ratio(snapshots, weights), rel=1e-8)
    if constraint == "exact":
        assert found.ratio == pytest.approx(1 / s, rel=3e-3)
        assert found.ratio >= found.bound * (1 - 1e-9)
        assert found.improvement >= 1 - 1e-9
    assert found.ratio_equal == pytest.approx(ratio(snapshots, [1.0] * 3), rel=1e-8)
    assert found.improvement == pytest.approx(found.ratio_equal / found.ratio)
    assert found.cost.startswith(f"{found.rounds} linear programs")


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_no_other_masses_do_better(seed):
    snapshots = random_snapshots(seed)
    found = optimal_masses(snapshots)
    draw = np.random.default_rng(seed)
    for _ in range(60):
        assert ratio(snapshots, np.exp(draw.uniform(-5, 5, 3))) >= found.bound * (1 - 1e-6)
        near = [1 / m * math.exp(0.1 * draw.standard_normal()) for m in found.masses.values()]
        assert ratio(snapshots, near) >= found.ratio * (1 - 2e-3)
    # the scale: h on the snapshots is that of mass 1
    weights = [1 / m for m in found.masses.values()]
    tops = [
        max(
            torch.linalg.eigvalsh(sum(w * b for w, b in zip(v, s.blocks.values(), strict=True)))[:, -1].max()
            for s in snapshots
        )
        for v in (weights, [1.0] * 3)
    ]
    assert tops[0] == pytest.approx(tops[1].item(), rel=1e-9)


def test_a_snapshot_is_the_dense_jacobians():
    model, x, _, replacements, _ = small_problem()
    extra = torch.stack([z.x for z in replacements])
    snapshot = mass_snapshot(model, x, extra)
    points = torch.cat([x, extra])
    params = dict(model.named_parameters())
    J = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, (points,)))(params)
    n, p = len(x), 2
    for layer in ("0", "2", "4"):
        flat = torch.cat([J[name].flatten(2) for name in params if name.startswith(layer + ".")], 2)
        K = torch.einsum("icp,jdp->icjd", flat, flat)
        torch.testing.assert_close(snapshot.kernels[layer], K[:n, :, :n].reshape(n * p, n * p))
        torch.testing.assert_close(snapshot.blocks[layer], torch.stack([K[i, :, i] for i in range(len(points))]))
    H = generalized_ntk(model, x, scale="none", mass={"0": 0.5, "2": 2.0, "4": 0.1}).matrix
    weighted = sum(w * snapshot.kernels[a] for a, w in (("0", 2.0), ("2", 0.5), ("4", 10.0)))
    torch.testing.assert_close(H, weighted / n)


@pytest.mark.parametrize("floor", [0.5, 0.01])
def test_a_layer_that_only_costs_goes_to_the_floor(floor):
    """Layer 1 has rank one and adds to h alone: w₀ + 4w₁ ≤ 1, w₁ ≥ floor/5; masses are scaled back to h = 5."""
    kernels = {"0": torch.eye(2, dtype=F64), "1": torch.full((2, 2), 4.0, dtype=F64)}
    blocks = {"0": torch.ones(2, 1, 1, dtype=F64), "1": torch.full((2, 1, 1), 4.0, dtype=F64)}
    found = optimal_masses([MassSnapshot(kernels, blocks, 2)], floor=floor)
    assert found.masses["1"] == pytest.approx(1 / floor, rel=1e-6)
    assert found.masses["0"] == pytest.approx(1 / (5 - 4 * floor), rel=1e-6)
    assert found.ratio == pytest.approx(2 / (1 - 4 * floor / 5), rel=1e-6)


def test_without_replacements_there_are_only_the_samples():
    model, x, *_ = small_problem()
    assert mass_snapshot(model, x).blocks["0"].shape == (4, 2, 2)


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (lambda s: [], {}, ValueError, "snapshots is empty"),
        (lambda s: ["no"], {}, TypeError, "must be a MassSnapshot"),
        (lambda s: s, {"constraint": "exakt"}, ValueError, "did you mean 'exact'"),
        (lambda s: s, {"floor": 0.0}, ValueError, "floor must be"),
        (lambda s: s, {"tolerance": 2.0}, ValueError, "tolerance must be"),
        (lambda s: [s[0], MassSnapshot({"0": s[0].kernels["0"]}, {}, 3)], {}, ValueError, r"snapshots\[1\] has layers"),
    ],
)
def test_refusals(make, options, error, text):
    with pytest.raises(error, match=text):
        optimal_masses(make(random_snapshots(0)), **options)


def test_equal_inputs_leave_nothing_to_optimise():
    model, x, *_ = small_problem()
    with pytest.raises(NumericalError, match="λ_min"):
        optimal_masses([mass_snapshot(model, torch.cat([x, x[:1]]))])


def test_the_masses_are_masses_of_the_optimizer():
    """Woodbury(mass=found.masses) takes the step θ_α ← θ_α − lr·w_α∇_αh with the weights of the program."""
    model, x, a, replacements, _ = small_problem()
    found = optimal_masses([mass_snapshot(model, x, torch.stack([z.x for z in replacements]))])
    (0.5 * (model(x) - a).square().sum(1).mean()).backward()
    expected = {
        name: p.detach() - 0.01 / found.masses[name.rpartition(".")[0]] * p.grad for name, p in model.named_parameters()
    }
    opt = Woodbury(model, lr=0.01, mass=found.masses, scale="none", check_step=False)
    opt.zero_grad()
    (0.5 * (model(x) - a).square().sum(1).mean()).backward()
    opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


def test_masses_lower_T1_on_digits():
    """The run with the masses that were optimal for the run at equal masses: T1 falls; nothing is said of ‖e‖."""
    from studies import Study
    from studies.data.subsets import draw

    study = Study.from_toml("digits", ["n=6", "mass=1", "width=32"])
    d = draw(study, study.points()[0])
    z = Replacement(d.replaced[0], d.replacement_x[0], d.replacement_targets[0])
    options = {"steps": 100, "lr": 0.01, "scale": "none", "null_twin": False}

    snapshots, model = [], d.model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    opt = Woodbury(model, lr=0.01, scale="none", check_step=False)
    for t in range(101):
        if t % 25 == 0:
            snapshots.append(mass_snapshot(model, d.x, z.x[None]))
        opt.zero_grad()
        (0.5 * (model(d.x) - d.targets).square().sum(1).mean()).backward()
        opt.step()
    model.load_state_dict(state)

    found = optimal_masses(snapshots)
    equal = train_twins(model, d.x, d.targets, [z], mass=1.0, **options).pairs[0]
    best = train_twins(model, d.x, d.targets, [z], mass=found.masses, **options).pairs[0]
    assert found.improvement > 2
    assert best["T1"] < equal["T1"] / 2
    assert equal["h"] / equal["xi"] == pytest.approx(found.ratio_equal, rel=0.1)  # twins have their own h
