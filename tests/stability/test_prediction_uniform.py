"""The uniform estimate: its ellipsoids hold what they should, and it keeps above trained twins."""

from copy import deepcopy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_kernel import generalized_ntk
from optim import Woodbury
from stability.enclosures import ellipsoid_radii
from stability.prediction.predict import predict_twins
from stability.prediction.trained import trained_divergence
from stability.prediction.uniform import injection_factor, uniform_estimate, uniform_step
from stability.replacement import Replacement
from tests.stability.dense import F64, small_problem


@given(seed=st.integers(0, 10_000), R=st.integers(1, 9), D=st.integers(1, 6), floor=st.sampled_from([1e-6, 1e-2]))
@settings(max_examples=80, deadline=None)
def test_every_injection_lies_in_the_ellipsoid_which_is_the_one_of_the_formula(seed, R, D, floor):
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(R, D, generator=draw, dtype=F64) * torch.rand(R, 1, generator=draw, dtype=F64)
    if R > 2:
        W[1] = W[0]
    B = injection_factor(W, floor)
    spread = W.T @ W + floor * W.square().sum() / D * torch.eye(D, dtype=F64)
    q = max(w @ torch.linalg.solve(spread, w) for w in W)
    torch.testing.assert_close(B @ B.T, q * spread, rtol=1e-8, atol=1e-10)
    for w in W:
        assert torch.linalg.eigvalsh(B @ B.T - torch.outer(w, w))[0] >= -1e-9


def test_no_injection_is_no_ellipsoid():
    assert injection_factor(torch.zeros(3, 2, dtype=F64)).abs().max() == 0
    assert uniform_step(torch.zeros(2, 1), torch.zeros(2, 2)).abs().max() == 0


@given(seed=st.integers(0, 10_000), D=st.integers(1, 5), a=st.sampled_from([0.0, 1.0]), b=st.sampled_from([0.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_one_step_is_the_trace_minimal_outer_ellipsoid(seed, D, a, b):
    draw = torch.Generator().manual_seed(seed)
    AF = a * torch.randn(D, 2, generator=draw, dtype=F64)
    B = b * torch.randn(D, 3, generator=draw, dtype=F64)
    F = uniform_step(AF, B)
    assert F.shape[1] <= max(D, 5)
    root = AF.square().sum().sqrt() + B.square().sum().sqrt()
    assert abs(F.square().sum() - root**2) <= 1e-9 * (1 + root**2)
    u, v = torch.randn(2, 1, generator=draw, dtype=F64), torch.randn(3, 1, generator=draw, dtype=F64)
    e = AF @ u / u.norm() + B @ v / v.norm()  # any sum of a point of each
    assert torch.linalg.eigvalsh(F @ F.T - e @ e.T)[0] >= -1e-8


def test_it_encloses_what_was_predicted_of_its_candidates():
    model, x, a, zs, _ = small_problem(seed=3, n=5, twins=5)
    draw = torch.Generator().manual_seed(0)
    labels, classes = torch.randint(2, (2, 5), generator=draw)
    of_classes = labels, [Replacement(z.index, z.x, c) for z, c in zip(zs, classes, strict=True)]
    for mass, loss in ((1.0, "squared"), (0.05, "squared"), (0.05, "cross_entropy")):
        a, zs = of_classes if loss == "cross_entropy" else (a, zs)
        given_ = {"steps": 12, "lr": 0.2, "mass": mass, "cg_steps": 2, "loss": loss}
        found = uniform_estimate(model, x, a, zs, **given_)
        for steps in (1, 4, 12):
            predicted = predict_twins(model, x, a, zs, **given_ | {"steps": steps})
            e = predicted.outputs - predicted.run_outputs
            assert (e.norm(dim=-1) <= found.radii[steps] * (1 + 1e-9)).all()
            assert (e.flatten(1).norm(dim=-1) <= found.stacked[steps] * (1 + 1e-9)).all()
        assert found.radii.shape == (13, 5)
        assert found.radii[0].max() == 0
        assert found.sup == found.radii.max()


def test_two_steps_of_one_candidate_are_those_of_the_enclosure():
    """With one candidate Q is wwᵀ and ε·I, so that T5 of its predicted divergence comes back."""
    model, x, a, zs, _ = small_problem(seed=3, n=4, twins=1)
    found = uniform_estimate(model, x, a, zs, steps=2, lr=0.2, method="cg")
    e = [torch.zeros(8, dtype=F64)]
    for steps in (1, 2):
        predicted = predict_twins(model, x, a, zs, steps=steps, lr=0.2, method="cg")
        e.append((predicted.outputs - predicted.run_outputs).flatten())
    H = [generalized_ntk(model, x).matrix]
    torch.testing.assert_close(found.stacked[1], e[1].norm(), rtol=1e-3, atol=0)
    moved = deepcopy(model)
    opt = Woodbury(moved, lr=0.2)
    (0.5 * (moved(x) - a).square().sum(1).mean()).backward()
    opt.step()
    H.append(generalized_ntk(moved, x).matrix)
    w = e[2] - e[1] + 0.2 * H[1] @ e[1]
    Ae = e[1] - 0.2 * H[1] @ e[1]
    alpha, omega = Ae.norm(), w.norm()
    P = (1 + omega / alpha) * torch.outer(Ae, Ae) + (1 + alpha / omega) * torch.outer(w, w)
    torch.testing.assert_close(
        found.radii[2], ellipsoid_radii(torch.linalg.cholesky(P + 1e-12 * torch.eye(8)), 2), rtol=5e-3, atol=0
    )


def test_it_covers_trained_twins_that_were_not_among_its_candidates():
    covered = []
    for seed in range(4):
        model, x, a, _, _ = small_problem(seed=seed, n=6, width=16)
        draw = torch.Generator().manual_seed(seed)
        zs = [
            Replacement(j % 6, torch.randn(3, generator=draw, dtype=F64), torch.randn(2, generator=draw, dtype=F64))
            for j in range(24)
        ]
        given_ = {"steps": 12, "lr": 0.2, "mass": 0.1}
        measured = trained_divergence(model, x, a, zs[12:], **given_)["measured_sup"]
        covered.append(uniform_estimate(model, x, a, zs[:12], **given_).sup >= measured)
    assert torch.cat(covered).double().mean() >= 0.9
