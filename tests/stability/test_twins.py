"""train_twins against the dense study, step by step, and the promises its results make."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stability import Replacement, train_twins
from tests.stability.dense import F64, dense_study, small_problem
from tests.thinned import thinned

PER_PAIR = ["kappa", "L", "h", "column", "disturbance", "drift"]
SLACK = 1 + 1e-9


def softmax_metric(y):
    s = y.softmax(-1)
    return torch.diag_embed(s) - s[..., :, None] * s[..., None, :]


def matrix_metric(y):  # any positive definite function of the outputs
    return torch.eye(y.shape[-1], dtype=y.dtype) + y[..., :, None] * y[..., None, :]


CASES = {
    "mean": {},
    "small mass": {"mass": 1e-2},
    "mass per layer": {"mass": [0.5, 0.1, 2.0]},
    "sum": {"scale": "sum"},
    "gradient descent": {"scale": "none", "mass": 0.5},
    "singular metric": {"output_metric": "cross_entropy"},
    "user's metric": {"output_metric": matrix_metric},
}


@pytest.mark.parametrize("case", thinned(CASES, 3))
def test_every_series_equals_the_dense_study(case):
    options = CASES[case]
    model, x, a, zs, held_out = small_problem(seed=3)
    steps, lr = 8, 0.2
    result = train_twins(model, x, a, zs, held_out=held_out, steps=steps, lr=lr, **options)
    c = {"mean": 1 / len(x), "sum": 1.0, "none": 0.0}[options.get("scale", "mean")]
    M = {"cross_entropy": softmax_metric, matrix_metric: matrix_metric}.get(options.get("output_metric"))
    for j, z in enumerate(zs):
        dense = dense_study(model, x, a, z, held_out, steps=steps, lr=lr, mass=options.get("mass", 1.0), c=c, M=M)
        for name, series in result.trajectories.items():
            # Kernels at mass 0.01 carry κ²/μ ~ 1e3 roundings; e_0 = 0 exactly, so absolute errors count there.
            np.testing.assert_allclose(series[j], dense[name], rtol=1e-8, atol=1e-11, err_msg=name)
        for name in ("xi", "lambda_max", "train_loss"):
            np.testing.assert_allclose(result.run[name], dense[name], rtol=1e-8, atol=1e-10, err_msg=name)
        for name in PER_PAIR:
            np.testing.assert_allclose(result.pairs[j][name], max(dense[name]), rtol=1e-8, err_msg=name)


def test_bounds_are_the_formulas_of_the_theorem():
    model, x, a, zs, _ = small_problem(seed=1)
    pair = train_twins(model, x, a, zs, steps=5, mass=0.5).pairs[0]
    xi, kappa, L, mu, n = pair["xi"], pair["kappa"], pair["L"], pair["mu"], len(x)
    assert mu == 0.5
    assert pair["T0"] == pytest.approx(2 * kappa**2 * L / (xi * mu * n**0.5))
    assert pair["T1"] == pytest.approx(2 * pair["h"] * L / (xi * n**0.5))
    assert pair["T1c"] == pytest.approx(2 * L * pair["column"] / xi)
    assert pair["T2"] == pytest.approx(pair["disturbance"] / xi)
    assert pair["vacuity_floor"] == pytest.approx(2 * L * n**0.5)
    assert pair["drift_share"] == pytest.approx(pair["drift"] / pair["disturbance"])


def assert_invariants(pair):
    ladder = [pair[name] for name in ("T0", "T1", "T1c", "T2", "T3")]
    for above, below in pairwise(ladder):
        assert above * SLACK >= below
    assert pair["T0"] * SLACK >= pair["vacuity_floor"]
    assert pair["T4"] * SLACK >= pair["measured_l2"]
    assert pair["T5"] * SLACK >= pair["measured_sup"]
    assert pair["T5_others"] * SLACK >= pair["measured_others"]
    assert pair["path_sup"] * SLACK >= pair["measured_sup"]
    assert pair["path_l2"] * SLACK >= pair["measured_l2"]
    assert pair["T4"] * SLACK >= pair["T5"]
    assert pair["measured_sup"] == max(pair["measured_replaced"], pair["measured_others"])


RUNS = {
    "seed": st.integers(0, 10_000),
    "n": st.integers(1, 5),
    "p": st.integers(1, 3),
    "width": st.integers(1, 6),
    "mass": st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    "scale": st.sampled_from(["mean", "sum", "none"]),
    "metric": st.sampled_from(["identity", "cross_entropy"]),
    "blocks": st.sampled_from(["layer", "network"]),
    "activation": st.sampled_from([nn.Tanh, nn.ReLU, nn.Softplus]),
}


def check_one_run(seed, n, p, width, mass, scale, metric, blocks, activation):
    p = max(p, 2) if metric == "cross_entropy" else p  # softmax of one output is constant
    model, x, a, zs, _ = small_problem(seed, n=n, p=p, width=width, activation=activation)
    kappa2 = 400  # generous bound of ‖J‖² here, so that gradient descent steps stay below 2/λ_max
    lr = 0.3 if scale == "mean" and metric == "identity" else mass / (kappa2 + mass)
    result = train_twins(model, x, a, zs, steps=6, lr=lr, mass=mass, scale=scale, output_metric=metric, blocks=blocks)
    for pair in result.pairs:
        assert_invariants(pair)
        assert not any(isinstance(value, float) and np.isnan(value) for value in pair.values())


@given(**RUNS)
@settings(max_examples=20, deadline=None)
def test_the_ladder_is_ordered_and_the_enclosures_hold(**drawn):
    check_one_run(**drawn)


@pytest.mark.slow
@given(**RUNS)
@settings(max_examples=1000, deadline=None)
def test_the_ladder_is_ordered_and_the_enclosures_hold_at_length(**drawn):
    check_one_run(**drawn)


def test_column_bound_and_h_obey_their_own_inequalities():
    model, x, a, zs, _ = small_problem(seed=5, n=6)
    for pair in train_twins(model, x, a, zs, steps=10, mass=0.05).pairs:
        assert pair["column"] <= pair["h"] / 6**0.5 * SLACK
        assert pair["h"] <= pair["kappa"] ** 2 / pair["mu"] * SLACK
        assert pair["disturbance"] <= 2 * pair["L"] * pair["column"] * SLACK


def test_replacement_equal_to_the_original_gives_exactly_zero():
    model, x, a, _, held_out = small_problem()
    result = train_twins(model, x, a, [Replacement(1, x[1], a[1])], held_out=held_out, steps=10)
    pair = result.pairs[0]
    assert pair["measured_sup"] == pair["measured_l2"] == pair["measured_heldout"] == pair["T4"] == pair["T5"] == 0.0
    assert "the replacement equals the original" in pair["flags"]


def test_one_sample_more_outputs_than_parameters_and_equal_rows_run_with_a_verdict():
    model, x, a, zs, _ = small_problem(n=1, twins=1)
    assert train_twins(model, x, a, zs, steps=3).pairs[0]["measured_others"] == 0.0

    assert (
        train_twins(model, x, a, [Replacement(np.int64(0), zs[0].x, zs[0].target)], steps=1).pairs[0]["replaced"] == 0
    )

    wide = nn.Linear(2, 1).double()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, generator=draw, dtype=F64)
    z = Replacement(0, torch.ones(2, dtype=F64), torch.ones(1, dtype=F64))
    result = train_twins(wide, x, torch.zeros(5, 1, dtype=F64), [z], steps=3)
    assert result.pairs[0]["xi"] == 0.0
    assert result.pairs[0]["T0"] == result.pairs[0]["T2"] == np.inf
    assert np.isfinite(result.pairs[0]["T3"])
    assert "n·p = 5 > 3 parameters" in result.pairs[0]["flags"]

    model, x, a, zs, _ = small_problem(width=20)
    x[3] = x[1]
    result = train_twins(model, x, a, zs, steps=3)
    assert result.pairs[0]["xi"] == 0.0
    assert "inputs 1 and 3 of S are equal" in result.pairs[0]["flags"]
    verdict = next(v for v in result.assumptions if v["assumption"] == "positive rate")
    assert verdict["verdict"] == "violated"
    assert "inputs 1 and 3" in verdict["reason"]


def test_null_twin_moves_by_rounding_only():
    model, x, a, zs, _ = small_problem()
    pair = train_twins(model, x, a, zs, steps=20).pairs[0]
    assert 0 < pair["null_sup"] < 1e-12 < pair["measured_sup"]


def test_the_model_and_the_global_state_are_left_alone():
    model, x, a, zs, _ = small_problem()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    rng, dtype = torch.get_rng_state(), torch.get_default_dtype()
    hooks = len(model._forward_hooks)
    train_twins(model, x, a, zs, steps=3)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert dtype == torch.get_default_dtype()
    assert len(model._forward_hooks) == hooks
    assert all(p.grad is None for p in model.parameters())


def test_auto_lr_is_one_over_the_number_of_blocks_and_is_recorded():
    model, x, a, zs, _ = small_problem()
    pair = train_twins(model, x, a, zs, steps=2, lr="auto").pairs[0]
    assert pair["lr"] == 1 / 3
    assert pair["lambda_max_twin"] == 3.0  # the bound N that made the step safe


def test_a_step_too_large_is_refused_naming_its_limit():
    model, x, a, zs, _ = small_problem(seed=2)
    rate = train_twins(model, x, a, zs, steps=1, lr=1e-6, scale="none", mass=0.01).run["lambda_max"][0]
    with pytest.raises(ValueError, match=r"step 0: lr = 1 is too large: .*lr < 2/λ_max = ") as caught:
        train_twins(model, x, a, zs, steps=1, lr=1.0, scale="none", mass=0.01)
    assert caught.value.limit <= 2 / rate * SLACK


def bad(**changes):
    model, x, a, zs, held_out = small_problem()
    return {"model": model, "x": x, "targets": a, "replacements": zs, "held_out": held_out, "steps": 2} | changes


def _nan(x):
    x = x.clone()
    x[2, 1] = float("nan")
    return x


_, X, A, ZS, HELD = small_problem()
BAD = [
    ({"x": X.tolist()}, TypeError, r"x must be a floating-point tensor, got list"),
    ({"replacements": ZS[0]}, TypeError, r"replacements must be a list of Replacement, got Replacement"),
    (
        {"replacements": [(0, X[0], A[0])]},
        TypeError,
        r"replacements\[0\] must be a Replacement\(index, x, target\), got tuple",
    ),
    ({"targets": A.float()}, TypeError, r"targets is torch.float32 on cpu, x is torch.float64 on cpu"),
    (
        {"x": X[:, :2], "replacements": [Replacement(0, X[0, :2], A[0])], "held_out": None},
        ValueError,
        r"the model cannot run on x of shape",
    ),
    (
        {"lr": "auto", "output_metric": "cross_entropy"},
        ValueError,
        r"needs M = I under a loss of bounded curvature, .*; with loss='squared' and output_metric='cross_entropy'",
    ),
    ({"lr": "auto", "scale": "none"}, ValueError, r'needs scale="mean"; with scale=.none. write a number'),
    ({"x": _nan(X)}, ValueError, r"x holds NaN or inf, first at index \(2, 1\)"),
    ({"targets": _nan(A)}, ValueError, r"targets holds NaN or inf"),
    ({"targets": A[:3]}, ValueError, r"targets must be \[n, p\] = \[4, p\], got shape \(3, 2\)"),
    (
        {"targets": A[:, :1], "replacements": [Replacement(0, X[0], A[0, :1])]},
        ValueError,
        r"the model gives 2 outputs, targets have 1",
    ),
    ({"held_out": HELD[:, :2]}, ValueError, r"held_out must be \[Q, 3\], got \(3, 2\)"),
    ({"replacements": []}, ValueError, r"replacements is empty"),
    ({"replacements": [Replacement(4, X[0], A[0])]}, ValueError, r"replacements\[0\].index must be an int in 0..3"),
    ({"replacements": [Replacement(-1, X[0], A[0])]}, ValueError, r"in 0..3 \(n = 4\), got -1"),
    (
        {"replacements": [Replacement(0, X[0, :2], A[0])]},
        ValueError,
        r"replacements\[0\].x has shape \(2,\), expected \(3,\)",
    ),
    ({"replacements": [Replacement(0, X[0], A[0] * float("inf"))]}, ValueError, r"replacements\[0\].target holds NaN"),
    ({"mass": 0.0}, ValueError, r"mass must be positive and finite, got 0.0"),
    ({"mass": float("nan")}, ValueError, r"must be positive and finite, got nan"),
    ({"mass": [1.0, 2.0]}, ValueError, r"mass has 2 entries, the model has 3 layers"),
    ({"mass": {"4.wieght": 1.0}}, ValueError, r"did you mean '4.weight'"),
    ({"output_metric": "identiy"}, ValueError, r"unknown output metric 'identiy'.*did you mean 'identity'"),
    ({"scale": "average"}, ValueError, r"unknown scale 'average'"),
    ({"blocks": "layers"}, ValueError, r"blocks must be 'layer' or 'network'"),
    ({"lr": 0.0}, ValueError, r"lr must be positive"),
    ({"lr": "fast"}, TypeError, r"lr must be a positive number or \"auto\""),
    ({"lr": 5.0}, ValueError, r"lr = 5 is too large: the step needs lr < 2/λ_max"),
    ({"steps": 0}, ValueError, r"steps must be an int >= 1"),
    ({"loss": "sqared"}, ValueError, r"unknown loss 'sqared'; .*did you mean 'squared'"),
    ({"loss": "cross_entropy"}, ValueError, r"targets of loss='cross_entropy' must be distributions"),
    ({"dynamics": "flow", "x": X.float()}, TypeError, r"needs float64, x is torch.float32"),
    ({"dynamics": "rk4"}, ValueError, r"dynamics must be 'euler' or 'flow'"),
    ({"x": X.float()}, TypeError, r"the model is torch.float64 on cpu, x is torch.float32"),
    ({"x": (X * 10).long()}, TypeError, r"the model is torch.float64 on cpu, x is torch.int64 on cpu"),
    (
        {"model": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double()},
        ValueError,
        r"layer '1' \(Dropout\).*model.eval",
    ),
    ({"model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()}, ValueError, r"layer '1' \(BatchNorm1d\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input_is_one_clear_line(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        train_twins(**bad(**changes))
    assert "\n" not in str(caught.value)
