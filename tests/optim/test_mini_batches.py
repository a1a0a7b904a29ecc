"""Index streams: what they hold, that all twins share them, and how often a row is hit."""

from itertools import islice
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.stacks.mini_batches import index_stream, twin_batch
from optim.stacks.stacked import StackedState, stacked_step
from optim.stacks.stacked_woodbury import WoodburyStep
from tests.optim.stacks import half_square, network, networks
from tests.reference import distance, trainable

sizes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(sizes, st.integers(0, 2**32), st.integers(0, 3))
def test_every_epoch_is_a_permutation(size, seed, epochs):
    (n, b), kept = size, list(index_stream(*size, seed, epochs=epochs))
    assert all(rows.dtype == torch.int64 for rows in kept)
    assert len(kept) == epochs * ceil(n / b)
    for e in range(epochs):
        epoch = kept[e * ceil(n / b) : (e + 1) * ceil(n / b)]
        assert [len(rows) for rows in epoch] == [b] * (n // b) + ([n % b] if n % b else [])
        assert sorted(torch.cat(epoch).tolist()) == list(range(n))


@given(sizes, st.integers(0, 2**32), st.integers(0, 20))
def test_dropping_leaves_out_the_short_batches_and_nothing_else(size, seed, steps):
    (n, b), dropped = size, list(index_stream(*size, seed, steps=steps, last="drop"))
    full = (rows for rows in index_stream(n, b, seed, epochs=20) if len(rows) == b)
    assert len(dropped) == steps
    assert all(map(torch.equal, dropped, islice(full, steps)))


@given(sizes, st.integers(0, 2**32), st.integers(0, 20), st.sampled_from(["permutation", "subset", "replacement"]))
def test_the_same_seed_gives_the_same_rows_and_more_steps_only_go_on(size, seed, steps, draw):
    n, b = size
    stream = list(index_stream(n, b, seed, steps=steps, draw=draw))
    again = index_stream(n, b, np.random.SeedSequence(seed), steps=steps + 5, draw=draw)
    assert all(map(torch.equal, stream, islice(again, steps)))
    assert all(0 <= i < n for rows in stream for i in rows.tolist())
    # the sizes of an epoch, whatever is drawn
    assert [len(rows) for rows in stream] == [len(rows) for rows in index_stream(n, b, seed, steps=steps)]
    assert all(len(rows) == b or (t + 1) % ceil(n / b) == 0 for t, rows in enumerate(stream))
    if draw != "replacement":
        assert all(len(set(rows.tolist())) == len(rows) for rows in stream)


def test_seeds_and_epochs_differ():
    first, second = (torch.cat(list(index_stream(50, 10, seed, epochs=2))) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:50], first[50:])


def test_the_global_random_states_stay():
    theirs, ours = repr(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    list(index_stream(9, 4, 0, epochs=3))
    assert repr(np.random.get_state()) == theirs  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), ours)


def test_editing_a_batch_does_not_reach_the_next():
    stream = index_stream(6, 2, 0, epochs=1)
    seen = set()
    for rows in stream:
        seen |= set(rows.tolist())
        rows.zero_()
    assert seen == set(range(6))


@pytest.mark.parametrize(
    ("draw", "probability"),
    [("permutation", 3 / 12), ("subset", 3 / 12), ("replacement", 1 - (11 / 12) ** 3)],
)
def test_how_often_a_row_is_hit(draw, probability):
    T = 4000
    hits = torch.stack([torch.bincount(rows, minlength=12) > 0 for rows in index_stream(12, 3, 7, steps=T, draw=draw)])
    # every row, 4.5 standard deviations of T draws
    assert (hits.double().mean(0) - probability).abs().max() < 4.5 * (probability * (1 - probability) / T) ** 0.5
    gaps = hits[:, 5].nonzero().flatten().diff()
    assert (gaps.max() <= 7) == (draw == "permutation")  # once in each four steps, or left to chance


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be an int of at least 1, got 0"),
        ({"batch": 0}, ValueError, "batch must be an int of at least 1"),
        ({"batch": 6}, ValueError, "batch must be at most n = 5, got 6"),
        ({"batch": 2.0}, ValueError, "batch must be an int"),
        ({"epochs": None}, ValueError, "give epochs or steps"),
        ({"steps": 3}, ValueError, "give epochs or steps"),
        ({"epochs": -1}, ValueError, "epochs must be an int of at least 0"),
        ({"draw": "permutations"}, ValueError, r"did you mean 'permutation'\?"),
        ({"last": "dropped"}, ValueError, r"did you mean 'drop'\?"),
        ({"seed": np.random.default_rng(0)}, TypeError, "an int or a numpy SeedSequence, got Generator"),
        ({"seed": -1}, ValueError, "must not be negative"),
    ],
)
def test_bad_requests_are_refused_at_once(change, error, message):
    with pytest.raises(error, match=message):
        index_stream(**{"n": 5, "batch": 2, "seed": 0, "epochs": 1} | change)


@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from(["permutation", "replacement"]))
def test_a_twin_batch_is_the_batch_of_the_stacked_data(n, seed, draw):
    generator = torch.Generator().manual_seed(seed)
    x, new = torch.randn(n, 2, 3, generator=generator), torch.randn(4, 2, 3, generator=generator)
    replaced = torch.randint(-1, n, (4,), generator=generator)
    stacked = torch.stack([x] * 4)
    for k, row in enumerate(replaced.tolist()):
        if row >= 0:
            stacked[k, row] = new[k]
    for rows in index_stream(n, (n + 1) // 2, seed, epochs=2, draw=draw):
        assert torch.equal(twin_batch(x, rows, replaced, new), stacked[:, rows])


@pytest.mark.parametrize(
    ("replaced", "new", "message"),
    [
        ([3], torch.zeros(1, 2), r"rows 0..2, or -1 for none; got \[3\]"),
        ([-2], torch.zeros(1, 2), "or -1 for none"),
        ([0, 1], torch.zeros(1, 2), r"new \[K, 2\]; got \(2,\) and \(1, 2\)"),
        ([0], torch.zeros(1, 3), r"got \(1,\) and \(1, 3\)"),
    ],
)
def test_twin_batches_refuse_what_does_not_fit(replaced, new, message):
    with pytest.raises(ValueError, match=message):
        twin_batch(torch.zeros(3, 2), torch.tensor([0, 1]), torch.tensor(replaced), new)


def test_twins_part_when_their_row_is_drawn_and_not_before():
    """S and two twins on one stream: equal until the replaced row comes up; each of them its own separate run."""
    model, params, x, targets = networks("mlp")
    params = {n: torch.stack([p[0]] * 3) for n, p in params.items()}
    x, targets = x[0][0], targets[0]
    n, replaced = len(x), torch.tensor([-1, 1, 3])
    new, label = torch.randn(3, 3, dtype=x.dtype), torch.randn(3, 2, dtype=x.dtype)
    method = WoodburyStep(0.1, mass=0.1, momentum=0.5)
    start, state, met = params, StackedState(), [False] * 3
    stream = list(index_stream(n, 1, 3, epochs=1))
    for rows in stream:
        batch = twin_batch(x, rows, replaced, new), twin_batch(targets, rows, replaced, label)
        params, state = stacked_step(model, params, state, *batch, half_square, method)
        met = [seen or row in rows.tolist() for seen, row in zip(met, replaced.tolist(), strict=True)]
        for k in (1, 2):
            apart = max((p[0] - p[k]).norm().item() for p in params.values())
            assert apart > 1e-3 if met[k] else apart < 1e-13
    assert met == [False, True, True]
    for k in range(3):
        own_x, own_t = x.clone(), targets.clone()
        if k:
            own_x[replaced[k]], own_t[replaced[k]] = new[k], label[k]
        own, state = trainable(network(model, start, k)), StackedState()
        own = {name: p[None] for name, p in own.items()}
        for rows in stream:
            own, state = stacked_step(model, own, state, own_x[rows], own_t[rows], half_square, method, shared=True)
        assert distance({name: p[0] for name, p in own.items()}, {name: p[k] for name, p in params.items()}) < 1e-13
