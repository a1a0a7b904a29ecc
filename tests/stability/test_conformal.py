"""Conformal factors: the order statistic, the guarantee on exchangeable draws, and a small coverage study on trained twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from stability import train_twins
from stability.prediction.conformal import conformal_factor, rank_of, smallest_calibration
from stability.prediction.coverage import Setting, coverage_study, pooled
from stability.prediction.trained import trained_divergence
from stability.replacement import Replacement
from tests.stability.dense import F64, small_problem


@given(
    ratios=st.lists(st.floats(0.01, 100), min_size=1, max_size=40),
    alpha=st.sampled_from([0.5, 0.3, 0.2, 0.1, 0.05, 0.01]),
)
def test_the_factor_is_the_order_statistic_counted_by_hand(ratios, alpha):
    m, predicted = len(ratios), np.linspace(1, 2, len(ratios))
    found = conformal_factor(np.array(ratios) * predicted, predicted, alpha)
    # The least q that covers at least (1 − α)(m + 1) of the m twins; none does where that is more than m.
    enough = [q for q in (np.array(ratios) * predicted) / predicted
              if sum(r <= q for r in (np.array(ratios) * predicted) / predicted) >= (1 - alpha) * (m + 1) - 1e-9]  # fmt: skip
    assert found.factor == (min(enough) if enough else math.inf)
    assert math.isinf(found.factor) == (m < smallest_calibration(alpha))
    assert (found.alpha, found.m) == (alpha, m)


@pytest.mark.parametrize(("m", "alpha"), [(9, 0.1), (19, 0.1), (24, 0.2), (60, 0.05), (7, 0.5)])
@pytest.mark.parametrize("law", ["lognormal", "ties", "one setting for all"])
def test_coverage_on_exchangeable_draws(m, alpha, law):
    rng, trials = np.random.default_rng(m), 4000
    scores = rng.lognormal(0, 1, (trials, m + 1))
    if law == "ties":
        scores = np.ceil(2 * scores)
    if law == "one setting for all":  # exchangeable, not independent
        scores *= rng.lognormal(0, 3, (trials, 1))
    predicted = rng.uniform(0.5, 2, (trials, m + 1))
    measured = scores * predicted
    covered = sum(
        measured[i, m]
        <= conformal_factor(measured[i, :m], predicted[i, :m], alpha).upper(predicted[i, m]) * (1 + 1e-12)
        for i in range(trials)
    )
    exact = rank_of(alpha, m) / (m + 1)  # of scores without ties
    low, high = binom.ppf([1e-6, 1 - 1e-6], trials, exact)
    assert 1 - alpha <= exact < 1 - alpha + 1 / (m + 1)
    assert low <= covered
    assert covered <= high or law == "ties"


def test_too_few_twins_give_infinity_and_say_so():
    found = conformal_factor([1.0] * 5, [1.0] * 5, alpha=0.1)
    assert found.factor == math.inf
    assert found.upper(2.0) == math.inf
    assert "5 calibration twins are too few for a coverage of 0.9, which takes at least 9" in found.guarantee
    assert [smallest_calibration(a) for a in (0.5, 0.2, 0.1, 0.05, 0.01)] == [1, 4, 9, 19, 99]


def test_the_guarantee_names_its_conditions_and_upper_takes_arrays():
    found = conformal_factor(torch.linspace(1, 2, 9), torch.ones(9), alpha=0.1)
    assert found.factor == 2.0
    assert "P(measured ≤ 2·predicted) ≥ 0.9" in found.guarantee
    assert "exchangeable" in found.guarantee
    assert "marginal" in found.guarantee
    assert torch.equal(found.upper(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 6.0]))
    assert conformal_factor([0.0, 1.0, 0.0], [0.0, 0.0, 0.0], alpha=0.5).factor == 1.0
    assert conformal_factor([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], alpha=0.5).factor == math.inf


@pytest.mark.parametrize(
    ("measured", "predicted", "alpha", "message"),
    [
        ([1.0], [1.0, 2.0], 0.1, "got 1 and 2"),
        ([], [], 0.1, "got 0 and 0"),
        ([-1.0], [1.0], 0.1, "measured must hold finite numbers >= 0, got -1.0"),
        ([1.0], [math.nan], 0.1, "predicted must hold finite numbers >= 0, got nan"),
        ([math.inf], [1.0], 0.1, "measured must hold finite numbers"),
        ([1.0], [1.0], 0.0, "alpha must be a number between 0 and 1, got 0.0"),
        ([1.0], [1.0], True, "got True"),
    ],
)
def test_bad_input(measured, predicted, alpha, message):
    with pytest.raises(ValueError, match=message):
        conformal_factor(measured, predicted, alpha)


def test_trained_divergence_is_that_of_train_twins():
    model, x, a, zs, held_out = small_problem(seed=1, n=5, twins=5)
    given_ = {"held_out": held_out, "steps": 12, "lr": 0.2, "mass": 0.1}
    found, true = trained_divergence(model, x, a, zs, group=2, **given_), train_twins(model, x, a, zs, **given_).pairs
    for name in ("sup", "l2", "replaced", "others", "heldout"):
        expected = [pair[f"measured_{name}"] for pair in true]
        np.testing.assert_allclose(found[f"measured_{name}"], expected, rtol=1e-9)


@pytest.mark.slow
def test_a_reduced_coverage_study():
    settings = []
    for seed in range(6):
        model, x, a, _, held_out = small_problem(seed=seed, n=6, p=2, width=12)
        draw = torch.Generator().manual_seed(100 + seed)
        zs = [
            Replacement(k, torch.randn(3, generator=draw, dtype=F64), torch.randn(2, generator=draw, dtype=F64))
            for k in torch.randint(6, (14,), generator=draw).tolist()
        ]  # fmt: skip
        settings.append(Setting(f"seed {seed}", model, x, a, zs, held_out, {"steps": 15, "lr": 0.2, "mass": 0.1}))
    rows = coverage_study(settings, calibration=4, alpha=0.2, method="parameter-path")
    assert len(rows) == 18
    total = pooled(rows, "sup")
    assert total["tested"] == 60
    assert total["coverage"] >= binom.ppf(1e-3, 60, 0.8) / 60 - 0.1  # tests of one setting share its q
    assert 0.99 < total["overestimate"] < 1.2
    assert total["factor"] == pytest.approx(1, abs=0.1)
    assert np.median([row["correlation"] for row in rows]) > 0.99
    assert np.median([row["error"] for row in rows]) < 0.05
    with pytest.raises(ValueError, match=r"'seed 0' has 14 twins, 14 of them to calibrate on: none is left"):
        coverage_study(settings, calibration=14)
