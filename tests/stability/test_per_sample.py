"""The estimate per replaced sample: its statement holds for predictions, its scales are theirs, trained twins calibrate it."""

import numpy as np
import pytest
import torch

from stability.prediction.conformal import conformal_factor
from stability.prediction.per_sample import PerSampleEstimate, uniform_per_sample
from stability.prediction.predict import predict_twins
from stability.prediction.uniform import uniform_estimate
from stability.replacement import Replacement
from tests.stability.dense import F64, small_problem

OPTIONS = {"steps": 12, "lr": 0.2, "mass": 0.1}


def pool_of(seed, size=60):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=draw, dtype=F64), torch.randn(size, 2, generator=draw, dtype=F64)


def test_scales_and_factors_are_those_of_the_predictions():
    model, x, a, _, held_out = small_problem(n=4)
    pool, answers = pool_of(0)
    found = uniform_per_sample(
        model, x, a, pool, answers, each=2, alpha=0.2, calibration=7, seed=3, held_out=held_out, **OPTIONS
    )
    draws = np.random.default_rng(3)
    k = [0, 0, 1, 1, 2, 2, 3, 3, *draws.integers(0, 4, 7).tolist()]
    z = draws.permutation(60)[:15]
    zs = [Replacement(i, pool[j], answers[j]) for i, j in zip(k, z, strict=True)]
    predicted = predict_twins(model, x, a, zs, method="strided-path", held_out=held_out, **OPTIONS)
    for name in ("sup", "others", "heldout"):
        s = predicted.column(f"predicted_{name}")
        scale = torch.stack([s[:8][2 * i : 2 * i + 2].max() for i in range(4)])
        torch.testing.assert_close(found.scales[name], scale, rtol=1e-9, atol=0)
        q = conformal_factor(s[8:], scale[k[8:]], 0.2)
        assert found.factors[name].factor == pytest.approx(q.factor)
        torch.testing.assert_close(found.upper(name), q.factor * scale, rtol=1e-9, atol=0)
    assert "P(predicted ≤ q·scale_k) ≥ 0.8" in found.guarantee
    assert "for trained twins an estimate" in found.guarantee
    with pytest.raises(ValueError, match="quantity must be one of sup, others, heldout, got 'l2'"):
        found.upper("l2")


@pytest.mark.slow
def test_it_covers_further_predictions_as_often_as_it_says():
    covered = []
    for seed in range(4):
        model, x, a, _, _ = small_problem(seed=seed, n=5)
        pool, answers = pool_of(seed, 260)
        found = uniform_per_sample(model, x, a, pool[:200], answers[:200], alpha=0.1, calibration=39, **OPTIONS)
        k = np.random.default_rng(seed).integers(0, 5, 60)
        zs = [Replacement(int(i), pool[200 + j], answers[200 + j]) for j, i in enumerate(k)]
        s = predict_twins(model, x, a, zs, method="strided-path", **OPTIONS).column("predicted_sup")
        covered.append((s <= found.upper()[torch.from_numpy(k)]).double())
    assert 0.84 <= torch.cat(covered).mean() <= 0.97  # 0.9, 240 draws, four levels of 39


def test_trained_twins_calibrate_it():
    scales = {"sup": torch.tensor([1.0, 2.0], dtype=F64), "others": torch.ones(2, dtype=F64)}
    found = PerSampleEstimate(scales, {name: conformal_factor([1.0] * 9, [1.0] * 9) for name in scales})
    trained = found.calibrated([0, 1, 1, 0], {"sup": torch.tensor([1.5, 2.0, 5.0, 0.5], dtype=F64)}, alpha=0.25)
    assert trained.factors["sup"].factor == 2.5  # the ⌈.75·5⌉ = 4th of 0.5, 1, 1.5, 2.5
    assert trained.upper().tolist() == [2.5, 5.0]
    assert list(trained.scales) == ["sup"]
    assert trained.guarantee.startswith("P(measured ≤ q·scale_k) ≥ 0.75")


def test_the_ellipsoid_along_strides_encloses_the_predictions_at_its_instants():
    model, x, a, zs, _ = small_problem(seed=3, n=5, twins=5)
    options = {"steps": 20, "lr": 0.2, "mass": 0.05, "method": "strided-path"}
    found = uniform_estimate(model, x, a, zs, **options)
    assert found.instants == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20)
    assert found.radii.shape == (14, 5)
    for at, steps in ((9, 10), (13, 20)):
        predicted = predict_twins(model, x, a, zs, **options | {"steps": steps})
        e = predicted.outputs - predicted.run_outputs
        assert (e.norm(dim=-1) <= found.radii[at] * (1 + 1e-9)).all()
    every = uniform_estimate(model, x, a, zs, **options | {"method": "parameter-path"})
    assert every.instants == tuple(range(21))
    assert found.sup < every.sup


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"each": 0}, "each must be an int >= 1, got 0"),
        ({"pool": torch.zeros(0, 3, dtype=F64)}, "at least one; got 0 and 60"),
    ],
)
def test_bad_input(changes, message):
    model, x, a, _, _ = small_problem()
    pool, answers = pool_of(0)
    given = {"pool": pool, "pool_targets": answers} | OPTIONS | changes
    with pytest.raises(ValueError, match=message):
        uniform_per_sample(model, x, a, **given)
