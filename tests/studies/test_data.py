import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.data.datasets import dataset
from studies.data.subsets import check_data, draw, subset_plan
from studies.definition.config import Study

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True)


def plan(rows, ns, replacements, held_out, seed):
    return subset_plan(rows, ns, replacements, held_out, *np.random.SeedSequence(seed).spawn(2))


@settings(deadline=None)
@given(ns=sizes, replacements=st.integers(1, 8), held_out=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_plan_is_disjoint_and_complete(ns, replacements, held_out, seed):
    p = plan(100, ns, replacements, held_out, seed)
    rows = [*p.train, *p.replacements, *p.held_out]
    assert len(set(rows)) == len(rows) == max(ns) + replacements + held_out
    assert min(rows) >= 0
    assert max(rows) < 100
    assert set(p.replaced) <= set(range(min(ns)))
    assert len(set(p.replaced)) == min(replacements, min(ns))


@settings(deadline=None)
@given(ns=sizes, extra=st.integers(1, 40), replacements=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_a_larger_n_and_more_replacements_extend_and_do_not_reshuffle(ns, extra, replacements, seed):
    small, large = plan(200, ns, replacements, 20, seed), plan(200, [*ns, max(ns) + extra], replacements + 1, 20, seed)
    np.testing.assert_array_equal(small.train, large.train[: max(ns)])  # nested subsets
    np.testing.assert_array_equal(small.replaced, large.replaced[:replacements])  # paired replacements
    np.testing.assert_array_equal(small.replacements, large.replacements[:replacements])
    np.testing.assert_array_equal(small.held_out, large.held_out)


@settings(deadline=None)
@given(ns=sizes, smaller=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_a_smaller_n_draws_the_replaced_anew_and_nothing_else(ns, smaller, seed):
    before, after = plan(100, ns, 4, 20, seed), plan(100, [*ns, min(smaller, max(ns))], 4, 20, seed)
    assert after.replaced.max() < smaller
    for name in ("train", "replacements", "held_out"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


@settings(deadline=None)
@given(ns=sizes, seed=st.integers(0, 2**32))
def test_the_order_of_sizes_does_not_matter_and_held_out_rows_do_not_depend_on_the_seed(ns, seed):
    forward, backward = plan(100, ns, 4, 20, seed), plan(100, ns[::-1], 4, 20, seed)
    for name in ("train", "replaced", "replacements", "held_out"):
        np.testing.assert_array_equal(getattr(forward, name), getattr(backward, name))
    np.testing.assert_array_equal(forward.held_out, plan(100, ns, 4, 20, seed + 1).held_out)


def test_streams_are_independent():
    data, other, swaps, other_swaps = np.random.SeedSequence(0).spawn(4)
    a, b = subset_plan(100, [20], 4, 20, data, swaps), subset_plan(100, [20], 4, 20, data, other_swaps)
    np.testing.assert_array_equal(a.train, b.train)
    assert not np.array_equal(a.replaced, b.replaced)
    assert not np.array_equal(a.train, subset_plan(100, [20], 4, 20, other, swaps).train)


def test_too_few_rows():
    assert len(plan(100, [76], 4, 20, 0).train) == 76
    with pytest.raises(ValueError, match=r"100 rows, but n=77 .* needs 101; write n=76 or less"):
        plan(100, [6, 77], 4, 20, 0)
    with pytest.raises(ValueError, match="needs 121; write fewer replacements or held_out"):
        plan(100, [1], 100, 20, 0)
    check_data(Study.from_toml("digits", ["n=1593"]))
    with pytest.raises(ValueError, match="1797 rows"):
        check_data(Study.from_toml("digits", ["n=6,1594"]))


def test_digits():
    inputs, targets = dataset("digits")
    np.testing.assert_allclose(np.linalg.norm(inputs, axis=1), np.sqrt(8))
    np.testing.assert_array_equal(targets.sum(1), 1)
    assert set(targets.ravel()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="read-only"):
        inputs[0, 0] = 1


def draws(*overrides):
    study = Study.from_toml("digits", overrides)
    return {(p.n, p.width, p.mass, p.seed): draw(study, p) for p in study.points()}


def parameters(drawn):
    return torch.cat([p.flatten() for p in drawn.model.parameters()])


def test_a_seed_is_paired_over_n_mass_and_width():
    drawn = draws("n=6,12", "mass=1,0.1", "width=16,32", "seeds=2")
    reference = drawn[6, 16, 1.0, 0]
    inputs, targets = dataset("digits")
    for (n, width, _, seed), d in drawn.items():
        assert d.x.shape == (n, 64)
        assert d.x.dtype == torch.float64
        assert d.targets.shape == (n, 10)
        assert d.held_out.shape == (200, 64)
        assert torch.equal(d.held_out, reference.held_out)
        assert len(set(d.replaced)) == 4
        assert max(d.replaced) < 6
        assert torch.equal(d.replacement_x, torch.tensor(inputs[d.replacement_rows]))
        assert torch.equal(d.replacement_targets, torch.tensor(targets[d.replacement_rows]))
        assert (seed == 0) == torch.equal(d.x[:6], reference.x)
        assert (seed == 0) == (d.replacement_rows == reference.replacement_rows)
        assert torch.equal(parameters(d), parameters(drawn[6, width, 1.0, seed]))
    assert drawn[6, 16, 1.0, 0].replaced == drawn[12, 32, 0.1, 0].replaced
    assert not torch.equal(parameters(reference), parameters(drawn[6, 16, 1.0, 1]))


def test_seed_shifts_data_initialisation_and_replacements():
    one, shifted = draws("n=6", "mass=1", "seeds=2", "width=8"), draws("n=6", "mass=1", "seeds=1", "seed=1", "width=8")
    a, b = one[6, 8, 1.0, 1], shifted[6, 8, 1.0, 1]
    assert torch.equal(a.x, b.x)
    assert torch.equal(parameters(a), parameters(b))
    assert (a.replaced, a.replacement_rows) == (b.replaced, b.replacement_rows)


def test_one_sample_can_be_replaced_four_times():
    (drawn,) = draws("n=1", "mass=1", "seeds=1", "width=8").values()
    assert drawn.replaced == [0, 0, 0, 0]
    assert len(set(drawn.replacement_rows)) == 4


def test_no_global_random_state_is_touched_and_the_dtype_is_the_studys():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    (drawn,) = draws("n=6", "mass=1", "seeds=1", "width=8", "dtype=float32").values()
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert drawn.x.dtype == parameters(drawn).dtype == torch.float32
    (double,) = draws("n=6", "mass=1", "seeds=1", "width=8").values()
    torch.testing.assert_close(parameters(drawn).double(), parameters(double), rtol=1e-6, atol=0)
