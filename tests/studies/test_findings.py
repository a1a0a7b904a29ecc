"""The paragraph says what the numbers say: each claim is tested where it is true and where it is not."""

import numpy as np
import pytest

from studies.confinement import by_place, change_with_mass, equal_loss
from studies.findings import broken, enclosure, informative, null_twin, paper_bound
from studies.paragraph import paragraph
from tests.studies import synthetic


@pytest.fixture(scope="module")
def study():
    return synthetic.frames()


def changed(study, **columns):
    """The study with columns of its summary replaced; functions of the summary are applied."""
    new = {name: value(study.summary) if callable(value) else value for name, value in columns.items()}
    return type(study)(study.summary.assign(**new), study.trajectories, study.spectra, study.assumptions, study.config)


def test_paper_bound(study):
    found, summary = paper_bound(study.summary), study.summary
    assert found.over_measured.high == pytest.approx((summary["T0"] / summary["measured_sup"]).max())
    assert found.over_floor.low == pytest.approx((summary["T0"] / summary["vacuity_floor"]).min())
    assert (found.not_applicable, found.broken) == (0, 0)


def test_infinite_bounds_are_counted_and_not_averaged():
    study = synthetic.frames(singular_n=(48,))
    found = paper_bound(study.summary)
    assert np.isfinite(found.over_measured.high)
    assert found.not_applicable == 36
    assert "In 36 of the 144 pairs ξ cannot be told from 0 and T0 is infinite." in paragraph(study)


def test_all_infinite():
    text = paragraph(synthetic.frames(singular_n=(6, 12, 24, 48)))
    assert "T0 makes no statement: ξ cannot be told from 0 in all 144 pairs." in text
    assert "nan" not in text


def test_a_broken_bound_is_said(study):
    text = paragraph(changed(study, T3=lambda s: 0.5 * s["measured_l2"]))
    assert "the measurement exceeds T3 in all 144 pairs" in text
    assert "exceeds" not in paragraph(study)
    text = paragraph(changed(study, T0=lambda s: 0.5 * s["measured_sup"]))
    assert "The measurement exceeds T0 in all 144 pairs." in text
    assert "constants of this study need checking" in text
    assert "says nothing about these runs" not in text


def test_rounding_does_not_break_a_bound(study):
    summary = study.summary.assign(T3=study.summary["measured_l2"] * (1 - 1e-12))
    assert broken(summary, "T3") == 0


@pytest.mark.parametrize(
    ("factor", "said", "unsaid"),
    [
        (0.9, "at or below it in all 144 pairs, so contraction explains part", "nothing that the path length does not"),
        (1.1, "above it in all 144 pairs, so here contraction explains nothing", "explains part"),
    ],
)
def test_enclosure_against_path(study, factor, said, unsaid):
    text = paragraph(changed(study, T5=lambda s: factor * s["path_sup"]))
    assert said in text
    assert unsaid not in text


def test_enclosure_above_path_in_some_pairs(study):
    half = changed(study, T5=lambda s: s["path_sup"] * np.where(s["seed"] == 0, 1.5, 0.5))
    assert enclosure(half.summary).above == 48
    assert "above it in 48 of the 144 pairs" in paragraph(half)
    assert enclosure(half.summary).medians.shape == (4, 3)


def test_drift_is_called_small_only_when_it_is(study):
    assert "is not small" in paragraph(study)
    linear = paragraph(changed(study, drift_share=0.0))
    assert "small in the median" in linear
    assert "is not small" not in linear


def test_trivial_level(study):
    assert informative(study.summary)["T0"] == 0
    none = changed(study, **dict.fromkeys(("T0", "T1", "T1c", "T2", "T3"), 1e6))
    assert "No bound under assumptions is below the trivial level" in paragraph(none)


@pytest.mark.parametrize(
    ("others", "heldout", "said"),
    [
        (0.1, 0.1, "So it is confined, on held-out points too."),
        (0.1, 2.0, "confined on the training set only: on held-out points the divergence is larger"),
        (0.7, 0.4, "So it is not confined: at the other training samples the divergence is lower, by less than half"),
        (0.1, 1.0, "on held-out points the divergence is the same within a factor 1.25"),
        (
            1.0,
            0.1,
            "at the other training samples the divergence is the same within a factor 1.25, on held-out points less",
        ),
        (
            3.0,
            3.0,
            "So it is not confined: at the other training samples the divergence is larger, on held-out points larger.",
        ),
    ],
)
def test_confinement_follows_the_numbers(study, others, heldout, said):
    light = study.summary["mass"] == 0.01
    summary = study.summary.assign(
        measured_others=np.where(light, others, 1.0) * 0.1, measured_heldout=np.where(light, heldout, 1.0) * 0.1
    )
    empty = study.trajectories.iloc[:0]
    assert said in paragraph(type(study)(summary, empty, study.spectra, study.assumptions))


def test_both_readings_are_given_where_they_disagree(study):
    summary = study.summary.assign(measured_others=0.1, measured_heldout=0.1)
    text = paragraph(type(study)(summary, study.trajectories, study.spectra, study.assumptions))
    assert "So, over training, it is not confined" in text
    assert "at equal loss it is" in text


def test_pairs_are_compared_with_their_own(study):
    """The median of the ratios of pairs, not the ratio of medians."""
    summary = study.summary
    table = change_with_mass(summary).set_index(["place", "n"])
    key = ["n", "seed", "replaced", "replacement"]
    wide = summary.pivot_table(index=key, columns="mass", values="measured_others")
    expected = (wide[0.01] / wide[1.0]).groupby("n").median()
    assert table.loc[("measured_others", 48), "ratio"] == pytest.approx(expected[48])
    assert table.loc[("measured_others", 48), "pairs"] == 12


def test_equal_loss_is_a_level_that_every_run_reaches(study):
    level, rows = equal_loss(study.trajectories)
    assert len(rows) == len(study.summary)
    assert (rows["train_loss"] <= level).all()
    before = study.trajectories.merge(
        rows.assign(step=rows["step"] - 1)[[*synthetic.KEY, "step"]], on=[*synthetic.KEY, "step"]
    )
    assert (before["train_loss"] > level).all()
    assert rows["step"].max() == study.trajectories["step"].max()  # the level is the lowest such


def test_null_twin(study):
    assert "below every measured divergence" in paragraph(study)
    drowned = changed(study, measured_sup=lambda s: np.where(s["seed"] == 0, 0.0, s["measured_sup"]))
    assert null_twin(drowned.summary)[1] == 48
    assert "in 48 of the 144 pairs the divergence is not above its null twin's" in paragraph(drowned)


@pytest.mark.parametrize(
    "partial",
    [
        {"ns": (6,), "masses": (1.0,), "seeds": 1, "replacements": 1},
        {"ns": (6, 12), "masses": (0.1,), "seeds": 2},
        {"ns": (1,), "seeds": 1},
    ],
)
def test_partial_results(partial):
    text = paragraph(synthetic.frames(**partial))
    assert "needs at least three n" in text
    assert "nan" not in text
    assert "∞" not in text


def test_one_mass_gives_no_answer():
    assert "With one mass the study does not say" in paragraph(synthetic.frames(masses=(1.0,)))


def test_replacement_equal_to_the_original(study):
    """Divergence exactly 0 everywhere: no ratios, no division, no claim of a bound over it."""
    zero = dict.fromkeys((name for name in study.summary if name.startswith(("measured", "path", "final"))), 0.0)
    still = changed(study, **zero, T3=0.0, T4=0.0, T5=0.0, null_sup=0.0)
    text = paragraph(type(study)(still.summary, study.trajectories.iloc[:0], study.spectra, study.assumptions))
    assert "nan" not in text
    assert "moved apart by 0," in text


def test_by_place_skips_what_is_not_there():
    study = synthetic.frames(ns=(1,), masses=(1.0,))
    table = by_place(study.summary.assign(measured_others=np.nan))
    assert set(table["place"]) == {"measured_replaced", "measured_heldout"}
