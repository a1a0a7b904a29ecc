"""The pages about predictions: their bands against simulation, their parts on small studies, the coverage that they claim."""

import numpy as np
import pytest
import torch

from benchmarks import coverage, influence
from benchmarks.prediction_data import DATASETS, draw_study, network
from benchmarks.timing import Settings
from stability.influence_functions import influence as influence_functions


def test_the_exact_band_is_that_of_simulated_calibrations():
    draw, m, tests, settings = np.random.default_rng(0), 19, 30, 5
    q = np.sort(draw.random((20_000, settings, m)), axis=-1)[..., 17]  # the 18th of 19 uniform scores: α = 0.1
    shares = draw.binomial(tests, q).sum(1) / (settings * tests)
    found = coverage.pooled_band([tests] * settings, m, 0.1)
    assert found == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.01)
    assert coverage.binomial_band(150, 0.9)[0] > found[0]  # tests that share a q scatter more


@pytest.mark.parametrize("name", DATASETS)
def test_data_sets(name):
    x, a, zs, held_out = draw_study(name, 6, 9, 4, seed=0)
    rows = torch.cat([x, torch.stack([z.x for z in zs]), held_out])
    assert len(torch.unique(rows, dim=0)) == 19  # no row twice, neither trained on and held out
    assert a.shape[1] == {"digits": 10, "wine": 3, "breast cancer": 2, "diabetes": 1}[name]
    with pytest.raises(ValueError, match="unknown data set 'iris'"):
        draw_study("iris", 6, 9, 4, seed=0)


def test_one_row_of_the_coverage_page():
    row = coverage.study("wine", 6, 0.1, Settings(), tested=4, steps=6)
    assert row["strided-path"]["tested"] == 4
    assert row["strided-path"]["correlation"] > 0.99
    assert row["strided-path"]["error"] < row["kernel-path"]["error"]
    assert len(row["per sample"]) == coverage.CALIBRATION + 4
    assert bool((row["ellipsoid"] >= 1).all())
    text = coverage.summary([row]) + coverage.table([row])
    assert "| conformal, strided-path | 4 |" in text


def test_the_rivals_on_a_small_study():
    x, a, zs, _ = draw_study("wine", 6, 5, 0, seed=0)
    task = influence.Task(network((13, 12, 3)), x, a, zs, 0.5, 10)
    rows, panels = influence.compete(task)
    assert len(rows) == len(influence.METHODS)
    assert np.corrcoef(*panels["strided-path"])[0, 1] > 0.999
    *_, end = task.run()
    left = influence.left_out(task)
    assert left.shape == (5, 6, 3)
    assert left.abs().max() > 1e-3
    assert torch.equal(left[0], left[1]) == (zs[0].index == zs[1].index)
    found = influence.influenced(task)
    own = influence_functions(end, x, a, *task.others, damping=0.5 / 1.0).replaced(zs[2].index, 2)[:6]
    torch.testing.assert_close(found[2], own)


def test_kronfluence_is_asked_the_right_question():
    """For one linear layer K-FAC is the Gauss–Newton matrix, up to the targets it draws."""
    pytest.importorskip("kronfluence")
    from benchmarks.kronfluence_peer import output_effects

    draw = torch.Generator().manual_seed(0)
    x, z = (torch.randn(size, 3, generator=draw, dtype=torch.float64) for size in (400, 2))
    a, b = (torch.randn(size, 2, generator=draw, dtype=torch.float64) for size in (400, 2))
    model = network((3, 2))
    found = output_effects(model, x, torch.cat([x, z]), torch.cat([a, b]), damping=0.1)[400:, :5]
    true = -400 * influence_functions(model, x, a, z, b, damping=0.1).per_sample[400:, :5]
    assert (found - true).norm() / true.norm() < 0.15


@pytest.mark.slow
def test_coverage_over_four_data_sets():
    rows = [
        coverage.study(name, n, mass, Settings(), tested=20, steps=30)
        for name, n, mass in (("wine", 8, 1.0), ("breast cancer", 10, 0.1), ("diabetes", 12, 0.01), ("digits", 6, 0.1))
    ]
    low, high = coverage.pooled_band([20] * 4, coverage.CALIBRATION, coverage.ALPHA)
    for method in coverage.METHODS:
        share = sum(row[method]["covered"] for row in rows) / 80
        assert low - 0.05 <= share <= high + 0.05
        assert torch.cat([row[method]["overestimates"] for row in rows]).median() <= 1.25
    ratios = torch.cat([row["per sample"] for row in rows])
    assert (ratios >= 1).double().mean() >= 0.9
    assert ratios.median() <= 3
