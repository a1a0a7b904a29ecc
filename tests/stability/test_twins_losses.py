"""Twins under every loss: against the dense study, the enclosures, the step limit, σ, class indices, prediction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stability import Replacement, huber_loss, predict_twins, squared_loss, train_twins
from stability.loss_ladder import QUADRATIC_ONLY
from tests.stability.dense import F64, DenseRun, dense_study, small_problem, twin_data
from tests.stability.test_losses import TORCH, quartic
from tests.thinned import thinned

SLACK = 1 + 1e-9
LOSSES = {
    "mse": "mse",
    "cross_entropy": "cross_entropy",
    "logistic": "logistic",
    "narrow": huber_loss(0.3),
    "own": quartic,
}
PER_PAIR = ["kappa", "L", "h", "column", "disturbance", "drift"]
ONLY_FOR_SQUARED = {"T3", "T3H", "T3H_drift", "rate_H", "measured_H"}  # these have tests of their own


def problem(name, seed=0, **options):
    """:func:`small_problem` with targets that the loss takes."""
    model, x, a, zs, held_out = small_problem(seed, **options)
    if name in ("cross_entropy", "logistic"):
        a, zs = a.softmax(-1), [Replacement(z.index, z.x, z.target.softmax(-1)) for z in zs]
    return model, x, a, zs, held_out


@pytest.mark.parametrize(
    ("name", "options"),
    thinned(
        [
            ("mse", {}),
            ("cross_entropy", {"mass": 0.1}),
            ("cross_entropy", {"output_metric": "cross_entropy", "lr": 0.4}),
            ("logistic", {"scale": "none", "mass": 0.5}),
            ("narrow", {}),
            ("own", {"lr": 0.01}),
        ],
        3,
    ),
)
def test_every_series_equals_the_dense_study(name, options):
    model, x, a, zs, held_out = problem(name, seed=3, p=3)
    given = {"lr": 0.2} | {k: v for k, v in options.items() if k in ("lr", "mass")}
    result = train_twins(model, x, a, zs, held_out=held_out, steps=6, loss=LOSSES[name], **({"lr": 0.2} | options))
    M = softmax if options.get("output_metric") else None
    c = 0.0 if options.get("scale") else None
    for j, z in enumerate(zs):
        dense = dense_study(model, x, a, z, held_out, steps=6, loss=TORCH[name], M=M, c=c, **given)
        for series in set(result.trajectories) - ONLY_FOR_SQUARED:
            np.testing.assert_allclose(
                result.trajectories[series][j], dense[series], rtol=1e-8, atol=1e-11, err_msg=series
            )
        for constant in PER_PAIR:
            np.testing.assert_allclose(result.pairs[j][constant], max(dense[constant]), rtol=1e-8, err_msg=constant)
        np.testing.assert_allclose(result.run["train_loss"], dense["train_loss"], rtol=1e-9)
        assert result.pairs[j]["lambda_max_twin"] >= max(dense["rate"]) * (1 - 1e-9)
        assert (name == "mse") == (result.pairs[j]["T3"] == result.pairs[j]["T3"])


def softmax(y):
    s = y.softmax(-1)
    return torch.diag_embed(s) - s[..., :, None] * s[..., None, :]


RUNS = {
    "name": st.sampled_from(sorted(LOSSES)),
    "seed": st.integers(0, 10_000),
    "n": st.integers(1, 4),
    "p": st.integers(2, 3),
    "mass": st.sampled_from([1e-2, 0.3, 5.0]),
    "scale": st.sampled_from(["mean", "none"]),
    "activation": st.sampled_from([nn.Tanh, nn.ReLU]),
    "dynamics": st.sampled_from(["euler", "euler", "euler", "flow"]),
}


def check_one_run(name, seed, n, p, mass, scale, activation, dynamics):
    model, x, a, zs, _ = problem(name, seed, n=n, p=p, width=4, activation=activation)
    lr = 0.3 if scale == "mean" and name != "own" else 1e-5 * mass
    result = train_twins(model, x, a, zs, steps=5, lr=lr, mass=mass, scale=scale, loss=LOSSES[name], dynamics=dynamics)
    for pair in result.pairs:
        assert pair["T4"] * SLACK >= pair["measured_l2"]
        assert pair["T5"] * SLACK >= pair["measured_sup"]
        assert pair["T5_others"] * SLACK >= pair["measured_others"]
        assert pair["T4"] * SLACK >= pair["T5"]
        if name != "mse":
            assert all(np.isnan(pair[rung]) for rung in QUADRATIC_ONLY)
            assert "T0 to T3" in pair["not_applicable"]
            assert np.isnan(pair["T2H"]) == ("T2H" in pair["not_applicable"])
            if pair["T2H"] == pair["T2H"]:
                assert pair["T2H"] * SLACK >= pair["T3H"]


@given(**RUNS)
@settings(max_examples=6, deadline=None)
def test_the_enclosures_hold_for_every_loss(**drawn):
    check_one_run(**drawn)


@pytest.mark.slow
@given(**RUNS)
@settings(max_examples=400, deadline=None)
def test_the_enclosures_hold_for_every_loss_at_length(**drawn):
    check_one_run(**drawn)


def test_mse_is_squared_loss_at_the_step_times_sigma_and_every_rung_stays():
    """G is that of M = I either way: ∇ℓ = σ(y − a) at lr is y − a at σ·lr, L and d grow by σ, ξ gives way to σξ."""
    model, x, a, zs, held_out = small_problem(seed=5, p=4, width=12)
    given = {"held_out": held_out, "steps": 10, "mass": 0.2}
    squared = train_twins(model, x, a, zs, lr=0.2, **given).pairs
    for loss, lr in (("mse", 0.4), (squared_loss(0.1), 2.0)):
        sigma = 0.2 / lr
        for pair, other in zip(train_twins(model, x, a, zs, lr=lr, loss=loss, **given).pairs, squared, strict=True):
            same = ["T0", "T1", "T1c", "T2", "T3", "T4", "T5", "path_sup", "measured_sup", "measured_heldout", "xi"]
            for name in (*same, "vacuity_floor", "trivial_sup", "drift_share"):
                assert pair[name] == pytest.approx(other[name], rel=1e-9), name
            for name in ("L", "disturbance", "drift", "train_loss"):
                assert pair[name] == pytest.approx(sigma * other[name], rel=1e-9), name
            assert pair["T0"] >= pair["vacuity_floor"]
            assert pair["lambda_max_twin"] == pytest.approx(sigma * 3)  # N = 3 blocks


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "logistic", "own"])
def test_the_step_limit_is_that_of_the_weighed_kernels(name):
    model, x, a, zs, _ = problem(name, seed=1, p=3)
    given = {"scale": "none", "mass": 0.5, "loss": LOSSES[name]}
    largest = 0.0
    for data in [(x, a), *(twin_data(x, a, z) for z in zs)]:
        run = DenseRun(model, *data, mass=0.5, c=0.0, loss=TORCH[name])
        y = run.outputs(run.x)
        hessian = torch.func.hessian(lambda y: TORCH[name](y.reshape(-1, 3), data[1]).sum())(y.flatten())  # noqa: B023
        largest = max(largest, torch.linalg.eigvals(run.kernel(run.x, run.x) / len(x) @ hessian).real.max().item())
    limit = 2 / largest
    train_twins(model, x, a, zs, steps=1, lr=0.05 * limit, **given)  # well inside at later steps, too
    with pytest.raises(ValueError, match=r"step 0: lr = .* too large: .* lr < 2/λ_max\(ΛHΛᵀ\) = ") as caught:
        train_twins(model, x, a, zs, steps=1, lr=1.001 * limit, **given)
    assert caught.value.limit == pytest.approx(limit, rel=1e-6)
    with pytest.raises(ValueError, match=r"lr < 2/λ_max\(ΛHΛᵀ\) = ") as caught:  # prediction knows the run on S alone
        predict_twins(model, x, a, zs, steps=1, lr=50 * limit, **given)
    assert caught.value.limit >= limit * (1 - 1e-9)


def test_auto_steps_use_half_of_what_the_curvature_allows():
    found = {}
    for name, metric in (
        ("mse", "identity"), ("cross_entropy", "identity"), ("cross_entropy", "cross_entropy"), ("logistic", "identity")
    ):  # fmt: skip
        model, x, a, zs, _ = problem(name, p=4)
        given = {"steps": 2, "lr": "auto", "loss": name, "output_metric": metric}
        pair = train_twins(model, x, a, zs, **given).pairs[0]
        assert pair["lr"] * pair["lambda_max_twin"] == pytest.approx(1.0)
        found[name, metric] = pair["lr"] * 3
        true = predict_twins(model, x, a, zs, method="cg", **given).pairs[0]["predicted_sup"]
        assert true == pytest.approx(pair["measured_sup"], rel=1e-8)
    assert list(found.values()) == pytest.approx([2.0, 2.0, 1.0, 4.0])


@pytest.mark.parametrize("name", thinned([*LOSSES, "huber"], 3))
def test_predictions_to_rounding_are_the_trained_twins(name):
    model, x, a, zs, held_out = problem(name, seed=4, p=3)
    loss = LOSSES.get(name, name)
    given = {"held_out": held_out, "steps": 8, "lr": 0.02, "mass": 0.2, "loss": loss}
    trained = train_twins(model, x, a, zs, **given)
    found = predict_twins(model, x, a, zs, method="cg", **given)
    for pair, true in zip(found.pairs, trained.pairs, strict=True):
        for where in ("sup", "l2", "replaced", "others", "heldout"):
            assert pair[f"predicted_{where}"] == pytest.approx(true[f"measured_{where}"], rel=1e-7), where


def test_class_indices_are_one_hot_rows():
    model, x, _, zs, _ = small_problem(p=3)
    labels = torch.tensor([2, 0, 1, 1])
    by_index = [Replacement(z.index, z.x, torch.tensor(j)) for j, z in enumerate(zs)]
    eye = torch.eye(3, dtype=F64)
    by_row = [Replacement(z.index, z.x, eye[j]) for j, z in enumerate(zs)]
    given = {"steps": 4, "loss": "cross_entropy"}
    assert train_twins(model, x, labels, by_index, **given).pairs[0]["measured_sup"] == pytest.approx(
        train_twins(model, x, eye[labels], by_row, **given).pairs[0]["measured_sup"], rel=1e-14
    )
    predicted = [predict_twins(model, x, *of, **given).pairs for of in ((labels, by_index), (eye[labels], by_row))]
    assert predicted[0] == predicted[1]
    with pytest.raises(TypeError, match=r"targets must be a floating-point tensor, got torch.int64"):
        train_twins(model, x, labels, by_index, steps=1)
    with pytest.raises(ValueError, match=r"replacements\[0\].target must hold class indices 0..2, got 7"):
        train_twins(model, x, labels, [Replacement(0, x[1], torch.tensor(7))], **given)


def test_the_verdict_on_the_loss_of_the_theorem():
    for name, verdict in (("mse", "holds"), ("narrow", "violated"), ("cross_entropy", "violated")):
        model, x, a, zs, _ = problem(name)
        rows = train_twins(model, x, a, zs, steps=2, loss=LOSSES[name]).assumptions
        assert next(row["verdict"] for row in rows if row["assumption"] == "squared loss") == verdict


def test_a_loss_of_ones_own_has_to_be_convex():
    model, x, a, zs, _ = small_problem()
    with pytest.raises(RuntimeError, match="not positive semidefinite: smallest eigenvalue"):
        train_twins(model, x, a, zs, steps=1, lr=1e-3, loss=lambda y, a: (y - a).cos().sum(-1))
