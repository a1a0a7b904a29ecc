"""The factors between measurement and bound: they telescope, they are ratios of columns, and ξ = 0 ends a chain."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.figures.waterfall import shown_n
from studies.findings.waterfall import CHAINS, ORDERED, chain_of, waterfall
from tests.studies import synthetic


@given(seed=st.integers(0, 1000), pairs=st.integers(1, 5))
def test_steps_multiply_to_the_whole(seed, pairs):
    """One group of pairs with any positive values: Σ log10 of the steps is the mean log10 of T0/measured."""
    rng = np.random.default_rng(seed)
    values = 10 ** rng.uniform(-3, 6, (pairs, 9))
    frame = pd.DataFrame(values, columns=CHAINS["l2"]).assign(n=6, mass=0.1)
    steps = waterfall(frame)
    whole = np.log10(values[:, -1] / values[:, 0]).mean()
    assert steps["log10"].sum() == pytest.approx(whole, abs=1e-9)
    assert steps["after"].iloc[-1] == pytest.approx(whole, abs=1e-9)
    np.testing.assert_allclose(steps["before"].iloc[1:], steps["after"].iloc[:-1], atol=1e-9)
    for j, row in enumerate(steps.itertuples()):
        ratios = np.log10(values[:, j + 1] / values[:, j])
        assert (row.low, row.high) == pytest.approx((ratios.min(), ratios.max()), abs=1e-9)
        assert row.factor == pytest.approx(np.exp(np.log(values[:, j + 1] / values[:, j]).mean()), rel=1e-9)


def test_groups_are_the_points_of_the_study():
    summary = synthetic.frames().summary
    steps = waterfall(summary)
    assert len(steps) == summary.groupby(["n", "width", "mass"]).ngroups * (len(chain_of(summary.columns)) - 1)
    assert (steps["pairs"] == summary.groupby(["n", "mass"]).size().iloc[0]).all()
    ordered = steps[steps["ordered"]]
    assert (ordered["low"] >= 0).all()
    assert set(zip(ordered["start"], ordered["end"], strict=True)) <= ORDERED


def test_a_vanishing_rate_ends_the_chain_for_its_pairs_alone():
    rows = {"measured_l2": [1.0, 1.0], "T4": [2.0, 8.0], "T2": [4.0, np.inf], "T0": [40.0, np.inf]}
    steps = waterfall(pd.DataFrame(rows).assign(n=6, mass=1.0)).set_index("end")
    assert steps.loc["T4", ["pairs", "left_out"]].tolist() == [2, 0]
    assert steps.loc["T4", "factor"] == pytest.approx(4.0)
    assert steps.loc["T2", ["pairs", "left_out"]].tolist() == [1, 1]
    assert steps.loc["T2", ["factor", "after"]].tolist() == pytest.approx([2.0, np.log10(4.0)])
    rows["T2"][0] = np.inf
    steps = waterfall(pd.DataFrame(rows).assign(n=6, mass=1.0)).set_index("end")
    assert steps.loc[["T2", "T0"], "factor"].isna().all()
    assert steps.loc["T0", "pairs"] == 0  # finite again after an infinite one does not count


def test_the_chains_keep_to_one_quantity():
    assert all(name not in CHAINS["sup"] for name in ("T4", "T0", "path_l2"))
    assert all(name not in CHAINS["l2"] for name in ("T5", "path_sup"))
    with pytest.raises(ValueError, match="quantity must be one of l2, sup"):
        waterfall(pd.DataFrame({"n": [6], "measured_l2": [1.0]}), "max")


def test_at_most_three_n_are_drawn():
    assert shown_n(pd.DataFrame({"n": [6, 6]})) == [6]
    assert shown_n(pd.DataFrame({"n": [48, 6, 12, 24, 30]})) == [6, 24, 48]
