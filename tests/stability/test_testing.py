"""The assertions: each passes where what it claims is true, and fails, with numbers, where it is not."""

import math

import numpy as np
import pytest
import torch

from stability import predict_twins, train_twins
from stability.assumptions.controls import linear
from stability.testing import RUNGS, assert_bounded, assert_contracting, assert_predicted, assert_rate, each_assumption
from tests.stability.dense import F64, small_problem

A = torch.tensor([[0.9, 0.5], [-0.1, 0.5]], dtype=F64)


@pytest.fixture(scope="module")
def twins():
    model, x, a, zs, _ = small_problem(width=6)
    return train_twins(model, x, a, zs, steps=15, lr=0.1), predict_twins(model, x, a, zs, steps=15, lr=0.1)


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_that_holds_passes_and_says_how_tight_it_is(twins, rung):
    result = twins[0]
    expected = max(pair[RUNGS[rung]] / pair[rung] for pair in result.pairs)
    if expected > 1:  # the bounds on the flow do not cover the kernel drift
        with pytest.raises(AssertionError, match=f"{rung} does not hold"):
            assert_bounded(result, rung)
    else:
        assert assert_bounded(result, rung) == pytest.approx(expected)
        with pytest.raises(AssertionError, match=r"with a margin of .* too large"):
            assert_bounded(result, rung, margin=1 - 0.9 * expected)


def test_a_series_that_is_broken_in_the_middle_is_seen(twins):
    result = twins[0]
    series = {name: values.copy() for name, values in result.trajectories.items()}
    series["T5"][1, 7] = (1 - 1e-4) * series["measured_sup"][1, 7]
    broken = type(result)(result.pairs, series, result.run, result.spectrum, [], result.times)
    with pytest.raises(AssertionError, match=r"T5 does not hold for the twin of sample 1: sup.* at step 7"):
        assert_bounded(broken, "T5")


def test_a_bound_of_infinity_bounds_nothing():
    with pytest.raises(AssertionError, match="T0 = inf bounds nothing"):
        assert_bounded([{"replaced": 0, "T0": math.inf, "measured_l2": 1.0}], "T0")
    with pytest.raises(AssertionError, match="T2 does not hold"):
        assert_bounded([{"replaced": 0, "T2": 1.0, "measured_l2": 1 + 1e-6}], "T2")
    for options, said in (({"rung": "T6"}, "unknown rung"), ({"margin": 1.0}, "margin is a share")):
        with pytest.raises(ValueError, match=said):
            assert_bounded([{}], **options)


def test_predictions_are_held_against_trained_twins(twins):
    result, prediction = twins
    found = assert_predicted(prediction, result, tolerance=0.2)["error"]
    exact = [
        abs(p["predicted_sup"] / r["measured_sup"] - 1) for p, r in zip(prediction.pairs, result.pairs, strict=True)
    ]
    assert found == pytest.approx(max(exact))
    assert assert_predicted([1.0], [2.0], tolerance=0.5)["error"] == 0.5
    with pytest.raises(AssertionError, match=r"twin \d was predicted at"):
        assert_predicted(prediction, result, tolerance=0.5 * found)


def test_coverage_fails_only_where_it_is_improbable():
    """α = 0.2, m = 9: q is the 8th smallest score, the count of t covered is beta-binomial (t, 8, 2)."""
    draw = np.random.default_rng(0)
    scores = draw.lognormal(size=(400, 29))
    failures = 0
    for row in scores:
        try:
            found = assert_predicted(np.ones(29), row, alpha=0.2, calibration=9, significance=0.05)
            assert found["factor"] == np.sort(row[:9])[7]
        except AssertionError:
            failures += 1
    assert 2 <= failures <= 35  # at most 5 % of 400, with room for chance; not none
    shifted = np.concatenate([np.ones(9), np.full(20, 2.0)])
    with pytest.raises(AssertionError, match="covers 0 of 20, 0 %; 80 % was promised"):
        assert_predicted(np.ones(29), shifted, alpha=0.2, calibration=9)
    with pytest.raises(ValueError, match="calibration of at least 9 twins"):
        assert_predicted(np.ones(12), np.ones(12), alpha=0.1, calibration=8)
    with pytest.raises(ValueError, match="say what is asserted"):
        assert_predicted([1.0], [1.0])


@pytest.mark.parametrize(("m", "t", "alpha"), [(9, 20, 0.2), (19, 12, 0.1)])
def test_the_probability_of_a_coverage_is_that_of_counted_orders(m, t, alpha):
    """All orders of m + t scores alike: of C(m + t, m), those with x test scores below the r-th calibration score."""
    r = math.ceil((1 - alpha) * (m + 1) - 1e-9)
    ways = [math.comb(x + r - 1, x) * math.comb(t - x + m - r, t - x) for x in range(t + 1)]
    assert sum(ways) == math.comb(m + t, m)
    covered = t // 2
    chance = sum(ways[: covered + 1]) / sum(ways)
    scores = np.concatenate([1.0 + np.arange(m), np.full(covered, 0.5), np.full(t - covered, 2.0 * m)])
    options = {"alpha": alpha, "calibration": m}
    found = assert_predicted(np.ones(m + t), scores, significance=0.999 * chance, **options)
    assert (found["factor"], found["coverage"]) == (r, covered / t)
    with pytest.raises(AssertionError, match=f"so few have probability {chance:.2g}"):
        assert_predicted(np.ones(m + t), scores, significance=1.001 * chance, **options)


def test_rates_are_least_squares_and_their_intervals_have_their_coverage():
    draw, n = np.random.default_rng(1), np.tile([8.0, 16.0, 32.0, 64.0], 6)
    seeds = np.repeat(np.arange(6), 4)
    hits = 0
    for _ in range(200):
        values = n**-0.5 * np.exp(0.1 * draw.standard_normal(24))
        slope, low, high = assert_rate(n, values, between=(-5, 5), series=seeds, level=0.9)
        hits += low <= -0.5 <= high
    assert 165 <= hits <= 195  # 90 % of 200
    assert slope == pytest.approx(
        np.polyfit(np.log(n), np.log(values), 1)[0]
    )  # all at once, where every seed has every n
    slopes = [np.polyfit(np.log(n[:4]), np.log(values[seeds == s]), 1)[0] for s in range(6)]
    half = 2.0150484 * math.sqrt(np.square(slopes - np.mean(slopes)).sum() / 5 / 6)  # t, 5 degrees, 90 %
    assert (low, high) == (pytest.approx(slope - half), pytest.approx(slope + half))
    one = assert_rate(n[:4], values[:4], between=(-5, 5))
    assert one[0] == pytest.approx(np.polyfit(np.log(n[:4]), np.log(values[:4]), 1)[0])
    covariance = np.polyfit(np.log(n[:4]), np.log(values[:4]), 1, cov="unscaled")[1][0, 0]
    rest = np.log(values[:4]) - np.polyval(np.polyfit(np.log(n[:4]), np.log(values[:4]), 1), np.log(n[:4]))
    assert (one[2] - one[0]) / 4.302653 == pytest.approx(
        math.sqrt(covariance * (rest @ rest) / 2)
    )  # t, 2 degrees, 95 %


def test_a_rate_outside_and_a_rate_too_uncertain_fail_differently():
    n = [8, 16, 32, 64]
    with pytest.raises(AssertionError, match=r"exponent -0.5.* is outside \[-1.2, -0.8\], by 0.3"):
        assert_rate(n, [m**-0.5 * (1 + 0.001 * (m % 3)) for m in n], between=(-1.2, -0.8))
    with pytest.raises(AssertionError, match=r"is not inside .*: it overlaps"):
        assert_rate(n, [1.0, 0.4, 0.6, 0.2], between=(-0.9, -0.5))
    for arguments, said in (
        (([8, 16], [1.0, 0.5]), "three different n"),
        (([8, 16, 32], [1.0, 0.5, 0.0]), "finite values > 0"),
        (([8, 16, 32], [1.0, 0.5]), "one entry each per row"),
    ):
        with pytest.raises(ValueError, match=said):
            assert_rate(*arguments, between=(-1, 0))


def test_a_loop_contracts_in_a_metric_or_in_none():
    assert torch.linalg.matrix_norm(A, 2) > 1
    found = assert_contracting([A, A], rate=0.9)
    assert found.rate <= 0.9
    with pytest.raises(AssertionError, match=r"contracts at ρ = .*, ρ = 0.5 was asked for: off by 0\.\d+"):
        assert_contracting([A], rate=0.5)
    with pytest.raises(AssertionError, match="no metric contracts the closed loop: no Θ with χ ≤ 1"):
        assert_contracting([A], condition=1)
    with pytest.raises(AssertionError, match=r"sample 1 has spectral radius 1.41"):
        assert_contracting([A, 2 * A])
    assert assert_contracting([A - torch.eye(2, dtype=F64)], kind="continuous", rate=0.2).rate >= 0.2


def test_kernels_and_twin_studies_contract_as_their_extreme_eigenvalues_say(twins):
    result = twins[0]
    H = torch.diag(torch.tensor([0.5, 2.0], dtype=F64))
    assert assert_contracting([H], lr=0.4).rate == pytest.approx(0.8, rel=1e-3)
    assert assert_contracting([H], lr=0.4, kind="continuous").rate == pytest.approx(0.5, rel=1e-3)
    expected = np.abs(1 - 0.1 * result.spectrum[:, [0, -1]]).max()
    assert assert_contracting(result).rate == pytest.approx(expected, rel=1e-9)
    slowest = result.spectrum[:, 0].min()
    assert assert_contracting(result, kind="continuous", rate=0.99 * slowest).rate == pytest.approx(slowest, rel=1e-9)
    with pytest.raises(AssertionError, match=r"λ = .* was asked for"):
        assert_contracting(result, kind="continuous", rate=1.01 * slowest)
    x, zs = torch.eye(3, dtype=F64)[[0, 1, 1]], [small_problem()[3][0]]
    zs = [type(zs[0])(0, 2 * x[0], torch.ones(1, dtype=F64))]
    repeated = train_twins(linear(3), x, torch.zeros(3, 1, dtype=F64), zs, steps=2, scale="none")
    with pytest.raises(AssertionError, match="no metric contracts"):
        assert_contracting(repeated)  # λ_min = 0: a direction that nothing contracts


def test_the_decorator_names_assumptions_it_knows():
    mark = each_assumption(only=["one_metric", "step_limit"], skip=["step_limit"])
    assert mark.mark.args == ("name", ["one_metric"])
    with pytest.raises(ValueError, match="did you mean 'one_metric'"):
        each_assumption(only=["one_metrics"])


def test_an_unused_import_of_the_module_loads_no_torch():
    import subprocess
    import sys

    program = "import sys, stability.testing; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )
