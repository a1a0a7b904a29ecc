"""Exponents against power laws that are known, and intervals that cover as often as they say."""

import numpy as np
import pandas as pd
import pytest

from studies.findings.exponents import fit_exponent, slopes
from tests.thinned import thinned

NS = (6, 12, 24, 48)


def power_law(exponent, *, seeds=3, replacements=4, between=0.0, within=0.0, ns=NS, rng=None):
    """q = n^b with Gaussian scatter of the exponent: between seeds, and between the replaced samples of a seed."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        of_seed = exponent + between * rng.standard_normal()
        for k in range(replacements):
            b, level = of_seed + within * rng.standard_normal(), np.exp(rng.standard_normal())
            rows += [(n, seed, k, 100 + k, level * n**b) for n in ns]
    return pd.DataFrame(rows, columns=["n", "seed", "replaced", "replacement", "q"])


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 2.1])
def test_exact_power_law(exponent):
    fit = fit_exponent(power_law(exponent), "q")
    assert fit.slope == pytest.approx(exponent, abs=1e-12)
    assert fit.values == NS
    assert fit.clusters == 3


def test_slope_is_least_squares():
    frame = power_law(-0.5, between=0.2, within=0.3)
    expected = np.polyfit(np.log(frame["n"]), np.log(frame["q"]), 1)[0]
    assert fit_exponent(frame, "q").slope == pytest.approx(expected, abs=1e-12)


def test_weighted_slopes_are_those_of_repeated_clusters():
    rng = np.random.default_rng(1)
    x, y, cluster = rng.standard_normal(30), rng.standard_normal(30), np.arange(30) % 3
    weights = np.array([[2, 1, 0], [0, 0, 3], [1, 1, 1]])
    for weight, slope in zip(weights, slopes(x, y, cluster, weights), strict=True):
        repeat = weight[cluster]
        assert slope == pytest.approx(np.polyfit(np.repeat(x, repeat), np.repeat(y, repeat), 1)[0], abs=1e-12)


@pytest.mark.parametrize(
    ("seeds", "between", "within"),
    thinned([(3, 0.15, 0.15), (8, 0.15, 0.15), (3, 0.2, 0.0), (8, 0.2, 0.0), (3, 0.0, 0.2), (8, 0.0, 0.2)], 5),
)
def test_intervals_cover_the_truth_as_often_as_they_say(between, within, seeds):
    """95 % intervals over 300 studies: at least 91 % cover (binomial: 2.5 sd below 95 %), whatever scatters, even
    with 3 seeds."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(300):
        fit = fit_exponent(power_law(-0.5, seeds=seeds, between=between, within=within, rng=rng), "q", draws=300)
        hits += fit.low <= -0.5 <= fit.high
    assert hits / 300 >= 0.91


def test_intervals_are_reproducible_and_leave_the_global_generator_alone():
    frame = power_law(-0.5, between=0.2)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 (the generator that must not be touched)
    assert fit_exponent(frame, "q") == fit_exponent(frame, "q")
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


@pytest.mark.parametrize("ns", [(6,), (6, 12)])
def test_two_n_are_not_enough(ns):
    fit = fit_exponent(power_law(-0.5, ns=ns), "q")
    assert not fit.fitted
    assert str(fit) == "needs at least three n"


def test_an_n_with_an_infinite_value_does_not_count():
    frame = power_law(-0.5)
    frame.loc[(frame["n"] == 48) & (frame["seed"] == 0) & (frame["replaced"] == 0), "q"] = np.inf
    fit = fit_exponent(frame, "q")
    assert fit.values == (6, 12, 24)
    assert fit.slope == pytest.approx(-0.5)
    assert "n = 48" in fit.note
    frame.loc[frame["n"] == 24, "q"] = 0.0  # ξ = 0 there
    assert not fit_exponent(frame, "q").fitted


def test_a_replacement_equal_to_the_original_is_left_out():
    frame = power_law(-0.5)
    frame.loc[frame["replaced"] == 2, "q"] = 0.0
    fit = fit_exponent(frame, "q")
    assert fit.slope == pytest.approx(-0.5)
    assert fit.values == NS
    assert "0 at every n" in fit.note
    frame["q"] = 0.0
    assert not fit_exponent(frame, "q").fitted


def test_one_seed_says_what_its_interval_covers():
    fit = fit_exponent(power_law(-0.5, seeds=1, within=0.1), "q")
    assert np.isfinite(fit.low)
    assert "one seed" in fit.note
    single = fit_exponent(power_law(-0.5, seeds=1, replacements=1), "q")
    assert single.fitted
    assert np.isnan(single.low)
    assert "no interval" in str(single)


def test_bad_input():
    with pytest.raises(ValueError, match="level=95"):
        fit_exponent(power_law(-0.5), "q", level=95)
    with pytest.raises(ValueError, match="no column 'p'"):
        fit_exponent(power_law(-0.5), "p")
