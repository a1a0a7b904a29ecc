"""The on-average identity, enumerated to the last digit on ridge regression; the coverage of the intervals; bad input."""

from itertools import product

import numpy as np
import pytest
import torch

from stability import Replacement, predict_twins
from stability.on_average import Interval, bootstrap_mean, on_average_gap, replace_one_losses
from tests.stability.dense import DenseRun, small_problem, twin_data

POPULATION = [(1.0, 0.5), (-0.7, 1.2), (2.0, -0.3), (0.4, 0.9)]  # (x, a)


def ridge(S, decay=0.2):
    """argmin (1/2n)Σ(wx − a)² + ½·decay·w²."""
    x, a = np.array(S).T
    return (x * a).mean() / ((x * x).mean() + decay)


def loss(w, z):
    return 0.5 * (w * z[0] - z[1]) ** 2


def enumerated(draws):
    """All losses of all equally likely (S, z'), all k as twins of one draw: arguments of on_average_gap."""
    columns = {name: [] for name in ("own_removed", "twin_removed", "own_new", "twin_new", "train", "held_out")}
    for S, new, fresh in draws:
        w = ridge(S)
        twins = [ridge([*S[:k], new, *S[k + 1 :]]) for k in range(len(S))]
        columns["own_removed"].append([loss(w, z) for z in S])
        columns["twin_removed"].append([loss(v, z) for v, z in zip(twins, S, strict=True)])
        columns["own_new"].append([loss(w, new)] * len(S))
        columns["twin_new"].append([loss(v, new) for v in twins])
        columns["train"].append(np.mean([loss(w, z) for z in S]))
        columns["held_out"].append(np.mean([loss(w, z) for z in fresh]))
    return columns


def with_replacement(n):
    for *S, new in product(POPULATION, repeat=n + 1):
        yield S, new, POPULATION


def without_replacement(n):
    """S, z' and the held-out points are different members of one finite population, as rows of a data set are."""
    for picks in product(range(len(POPULATION)), repeat=n + 1):
        if len(set(picks)) == n + 1:
            S, new = [POPULATION[i] for i in picks[:-1]], POPULATION[picks[-1]]
            yield S, new, [z for i, z in enumerate(POPULATION) if i not in picks[:-1]]


@pytest.mark.parametrize("reading", ["removed", "new", "both"])
@pytest.mark.parametrize("draws", [with_replacement, without_replacement])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_identity_is_exact_in_expectation(reading, draws, n):
    found = on_average_gap(**enumerated(draws(n)), reading=reading)
    assert found.gap.value > 0.01
    assert found.stability.value == pytest.approx(found.gap.value, rel=1e-12)
    assert found.difference.value == pytest.approx(0, abs=1e-12)
    assert found.agree
    assert found.twins == n


def test_the_two_readings_differ_draw_by_draw():
    one = enumerated(with_replacement(2))
    removed = np.array(one["twin_removed"]) - np.array(one["own_removed"])
    new = np.array(one["own_new"]) - np.array(one["twin_new"])
    assert np.abs(removed - new).max() > 0.1
    assert removed.mean() == pytest.approx(new.mean())


def sampled(rng, G, n=5, held_out=4):
    def draw():
        for _ in range(G):
            x = rng.standard_normal(n + 1 + held_out)
            z = list(zip(x, 0.8 * x + 0.5 * rng.standard_normal(len(x)), strict=True))
            yield z[:n], z[n], z[n + 1 :]

    return enumerated(draw())


@pytest.mark.slow
def test_intervals_cover_and_disagreement_is_seen():
    rng = np.random.default_rng(0)
    truth = on_average_gap(**sampled(rng, 8_000)).gap.value
    covered, agreed, refused = [], [], []
    for seed in range(100):
        data = sampled(rng, 25)
        found = on_average_gap(**data, resamples=500, seed=seed)
        covered.append([found.gap.holds(truth), found.stability.holds(truth)])
        agreed.append(found.agree)
        data["train"] = np.array(data["train"]) - 5 * truth
        refused.append(not on_average_gap(**data, resamples=500, seed=seed).agree)
    assert np.mean(covered, 0).min() > 0.87  # nominally 0.95, of 25 skewed values, seen 100 times
    assert np.mean(agreed) > 0.88
    assert np.mean(refused) > 0.9


def test_the_interval_of_tame_values_is_students_and_of_skewed_ones_leans():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(400)
    found = bootstrap_mean(values, resamples=8000)
    half = 1.966 * values.std(ddof=1) / 20  # t of 399 degrees of freedom
    assert found.value == pytest.approx(values.mean())
    assert half * (1 - 1e-4) <= found.high - found.value <= 1.1 * half
    assert half * (1 - 1e-4) <= found.value - found.low <= 1.1 * half
    two = bootstrap_mean([0.0, 1.0])  # t of one degree of freedom, 12.706 standard errors of ½
    assert (two.high - 0.5, 0.5 - two.low) == pytest.approx((12.706 / 2, 12.706 / 2), rel=1e-4)
    skewed = bootstrap_mean(rng.exponential(size=30) ** 2)
    assert skewed.high - skewed.value > 1.3 * (skewed.value - skewed.low)
    assert bootstrap_mean([0.3, 0.3, 0.3]) == Interval(*[pytest.approx(0.3)] * 3)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert found.high - found.low > bootstrap_mean(values, level=0.5).high - bootstrap_mean(values, level=0.5).low
    assert str(Interval(1.0, 0.5, 2.0)) == "1 [0.5, 2]"


def test_each_argument_enters_where_it_should():
    zero = np.zeros((2, 3))
    base = {
        "own_removed": zero,
        "twin_removed": zero,
        "own_new": zero,
        "twin_new": zero,
        "train": [0, 0],
        "held_out": [0, 0],
    }
    signs = {"own_removed": -0.5, "twin_removed": 0.5, "own_new": 0.5, "twin_new": -0.5}
    for name, sign in signs.items():
        found = on_average_gap(**base | {name: zero + 1})
        assert (found.stability.value, found.gap.value, found.difference.value) == (sign, 0, -sign)
    assert on_average_gap(**base | {"train": [1, 1]}).gap.value == -1
    assert on_average_gap(**base | {"held_out": [1, 1]}).gap.value == 1


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "logistic"])
def test_losses_of_twins_are_read_where_they_belong(loss):
    """Twin r at z_k from its outputs on S, at z' from those at its own z'; the losses written with torch's own."""
    own = {
        "squared": lambda y, a: 0.5 * torch.nn.functional.mse_loss(y, a, reduction="sum"),
        "cross_entropy": lambda y, a: torch.nn.functional.cross_entropy(y[None], a[None]),
        "logistic": lambda y, a: torch.nn.functional.binary_cross_entropy_with_logits(y, a, reduction="sum"),
    }[loss]
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    draw = torch.Generator().manual_seed(0)
    targets, aims = randn(4, 3).softmax(1), randn(2, 3).softmax(1)
    zs = [Replacement(k, randn(2), a) for k, a in zip((2, 0), aims, strict=True)]
    run_S, run_new, twins_S, twins_new = randn(4, 3), randn(2, 3), randn(2, 4, 3), randn(2, 3)
    found = replace_one_losses(run_S, run_new, twins_S, twins_new, targets, zs, loss=loss)
    for r, z in enumerate(zs):
        expected = (
            own(run_S[z.index], targets[z.index]), own(twins_S[r, z.index], targets[z.index]),
            own(run_new[r], z.target), own(twins_new[r], z.target),
        )  # fmt: skip
        names = ("own_removed", "twin_removed", "own_new", "twin_new")
        assert [found[name][r] for name in names] == pytest.approx([value.item() for value in expected])
    with pytest.raises(ValueError, match="did you mean 'logistic'"):
        replace_one_losses(run_S, run_new, twins_S, twins_new, targets, zs, loss="logistics")
    with pytest.raises(ValueError, match=r"twins_new has shape \(1, 3\), expected \(2, 3\)"):
        replace_one_losses(run_S, run_new, twins_S, twins_new[:1], targets, zs)


def test_predicted_twins_give_the_losses_of_twins_trained_the_slow_way():
    model, x, a, zs, _ = small_problem()
    found = predict_twins(model, x, a, zs, steps=15, lr=0.1, mass=0.5, method="cg")
    outputs = (found.run_outputs, found.run_own_outputs, found.outputs, found.own_outputs)
    losses = replace_one_losses(*outputs, a, zs)
    for r, z in enumerate(zs):
        runs = [DenseRun(model, *data, mass=0.5, c=1 / len(x)) for data in ((x, a), twin_data(x, a, z))]
        for run in runs:
            for _ in range(15):
                run.step(0.1)
        at = lambda run, point, aim: 0.5 * (run.outputs(point[None])[0] - aim).square().sum().item()  # noqa: E731
        removed, new = ([at(run, *point) for run in runs] for point in ((x[z.index], a[z.index]), (z.x, z.target)))
        assert [losses[n][r] for n in ("own_removed", "twin_removed")] == pytest.approx(removed, rel=1e-7)
        assert [losses[n][r] for n in ("own_new", "twin_new")] == pytest.approx(new, rel=1e-7)


def test_bad_input():
    good = enumerated(list(with_replacement(2))[:4])
    with pytest.raises(ValueError, match="reading must be one of"):
        on_average_gap(**good, reading="old")
    with pytest.raises(ValueError, match="twin_new has shape"):
        on_average_gap(**good | {"twin_new": np.zeros((4, 3))})
    with pytest.raises(ValueError, match="train must have 1 dimension"):
        on_average_gap(**good | {"train": np.zeros((4, 2))})
    with pytest.raises(ValueError, match="held_out has shape"):
        on_average_gap(**good | {"held_out": np.zeros(3)})
    with pytest.raises(ValueError, match="own_new holds NaN"):
        on_average_gap(**good | {"own_new": np.full((4, 2), np.nan)})
    with pytest.raises(ValueError, match="at least 2 independent draws"):
        on_average_gap(**{name: np.array(values)[:1] for name, values in good.items()})
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean([1.0, 2.0], level=95)
