"""The paragraph says what the numbers say: each claim is tested where it is true and where it is not."""

import re

import numpy as np
import pytest

from studies.findings.confinement import by_place, change_with_mass, equal_loss
from studies.findings.numbers import broken, enclosure, informative, null_twin, paper_bound
from studies.report.paragraph import details, headline
from tests.studies import synthetic


def told(study):
    """Everything the report opens with: the headline and what it rests on."""
    return " ".join([headline(study), *(sentences for _, sentences in details(study))])


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
    assert "In 36 of the 144 pairs ξ cannot be told from 0 and T0 is infinite." in told(study)


def test_all_infinite():
    text = told(synthetic.frames(singular_n=(6, 12, 24, 48)))
    assert "T0 makes no statement: ξ cannot be told from 0 in all 144 pairs." in text
    assert "nan" not in text


def test_a_broken_bound_is_said(study):
    text = told(changed(study, T3=lambda s: 0.5 * s["measured_l2"]))
    assert "the measurement exceeds T3 in all 144 pairs" in text
    assert "exceeds" not in told(study)
    text = told(changed(study, T0=lambda s: 0.5 * s["measured_sup"]))
    assert "The measurement exceeds T0 in all 144 pairs." in text
    assert "constants of this study need checking" in text
    assert "says nothing about these runs" not in text


def test_rounding_does_not_break_a_bound(study):
    summary = study.summary.assign(T3=study.summary["measured_l2"] * (1 - 1e-12))
    assert broken(summary, "T3") == 0


@pytest.mark.parametrize(
    ("factor", "said", "unsaid"),
    [
        (0.97, "below it by more than 2 % in all 144 pairs, where contraction explains part", "explains nothing"),
        (0.99, "within 2 % of it in all 144 pairs.", "explains part"),
        (1.01, "within 2 % of it in all 144 pairs.", "explains part"),
        (1.1, "above it by more than 2 % in all 144 pairs, where contraction explains nothing", "explains part"),
    ],
)
def test_enclosure_against_path(study, factor, said, unsaid):
    text = told(changed(study, T5=lambda s: factor * s["path_sup"]))
    assert said in text
    assert unsaid not in text


def test_enclosure_in_three_classes(study):
    factors = {0: 1.5, 1: 1.0, 2: 0.5}
    mixed = changed(study, T5=lambda s: s["path_sup"] * s["seed"].map(factors))
    found = enclosure(mixed.summary)
    assert (found.below, found.within, found.above) == (48, 48, 48)
    assert "clearly below the theory-free path length in 48 pairs: elsewhere" in headline(mixed)


def test_stacked_enclosure_against_its_path(study):
    text = told(changed(study, T4=lambda s: 2 * s["path_l2"]))
    assert "T4 is 2 times the path length of ‖e‖, in no pair below it." in text
    assert "T4 is 0.5 times the path length of ‖e‖." in told(changed(study, T4=lambda s: 0.5 * s["path_l2"]))


def test_the_headline_is_short_and_the_rest_is_a_list(study):
    assert len(headline(study).split()) <= 160
    leads = [lead for lead, _ in details(study)]
    assert leads == [
        "The paper's bound",
        "Exponents of n",
        "Bounds under assumptions",
        "Enclosures",
        "Kernel drift",
        "Confinement",
        "Held-out points",
        "Rounding",
    ]


def test_drift_is_called_small_only_when_it_is(study):
    assert "is not small" in told(study)
    linear = told(changed(study, drift_share=0.0))
    assert "small in the median" in linear
    assert "is not small" not in linear


def test_trivial_level(study):
    assert informative(study.summary)["T0"] == 0
    none = changed(study, **dict.fromkeys(("T0", "T1", "T1c", "T2", "T3"), 1e6))
    assert "No bound under assumptions is below the trivial level" in told(none)


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
    assert said in told(type(study)(summary, empty, study.spectra, study.assumptions))


def test_both_readings_are_given_where_they_disagree(study):
    summary = study.summary.assign(measured_others=0.1, measured_heldout=0.1)
    text = told(type(study)(summary, study.trajectories, study.spectra, study.assumptions))
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
    assert not rows["starts_below"].any()
    assert rows["step"].max() == study.trajectories["step"].max()  # the level is the lowest such
    assert level == study.trajectories.groupby(synthetic.KEY)["train_loss"].min().max()


def test_equal_loss_interpolates_in_log_loss(study):
    """Against numpy.interp run by run: the losses of a run fall, so log(loss) is a coordinate along it."""
    level, rows = equal_loss(study.trajectories)
    runs = dict(iter(study.trajectories.groupby(synthetic.KEY)))
    for row in rows.to_dict("records"):
        run = runs[tuple(row[name] for name in synthetic.KEY)]
        for name in ("step", "measured_replaced", "measured_others", "measured_heldout"):
            expected = np.interp(-np.log(level), -np.log(run["train_loss"]), run[name])
            assert row[name] == pytest.approx(expected, rel=1e-9)


def test_a_run_that_starts_below_the_level_is_said(study):
    """Its training loss is already there: the row is the start, where twins do not differ."""
    trained = study.trajectories.copy()
    trained.loc[(trained["seed"] == 0) & (trained["mass"] == 0.01), "train_loss"] *= 1e-3
    _, rows = equal_loss(trained)
    assert rows["starts_below"].sum() == 16
    assert (rows.loc[rows["starts_below"], "step"] == 0).all()
    text = told(type(study)(study.summary, trained, study.spectra, study.assumptions))
    assert "In 16 pairs the run starts at or below that loss." in text


def test_a_training_loss_of_zero_has_a_place(study):
    trained = study.trajectories.copy()
    trained.loc[trained["step"] == trained["step"].max(), "train_loss"] = 0.0
    level, rows = equal_loss(trained)
    assert level == 0
    assert np.isfinite(rows["measured_replaced"]).all()


def test_null_twin(study):
    assert "below every measured divergence" in told(study)
    drowned = changed(study, measured_sup=lambda s: np.where(s["seed"] == 0, 0.0, s["measured_sup"]))
    assert null_twin(drowned.summary)[1] == 48
    assert "in 48 of the 144 pairs the divergence is not above its null twin's" in told(drowned)


def test_exponents_of_the_mass_where_there_is_one_n():
    study = synthetic.frames(ns=(12,))
    study.summary["T0"] = study.summary["mass"] ** -1.5 * (1 + 1e-3 * study.summary["seed"])
    text = told(study)
    assert "Exponents of the mass" in [lead for lead, _ in details(study)]
    assert "of T0 −1.50\u00a0[−1.50,\u00a0−1.50]" in text
    assert "exponent of n" not in text.lower()


@pytest.mark.parametrize(
    "partial",
    [
        {"ns": (6,), "masses": (1.0,), "seeds": 1, "replacements": 1},
        {"ns": (6, 12), "masses": (0.1,), "seeds": 2},
        {"ns": (1,), "seeds": 1},
    ],
)
def test_partial_results(partial):
    text = told(synthetic.frames(**partial))
    assert re.search("needs at least three (n|masses)", text) or "T0 carries 1/mass" in text
    assert "nan" not in text
    assert "∞" not in text


def test_one_mass_gives_no_answer():
    assert "With one mass the study does not say" in told(synthetic.frames(masses=(1.0,)))


def test_replacement_equal_to_the_original(study):
    """Divergence exactly 0 everywhere: no ratios, no division, no claim of a bound over it."""
    zero = dict.fromkeys((name for name in study.summary if name.startswith(("measured", "path", "final"))), 0.0)
    still = changed(study, **zero, T3=0.0, T4=0.0, T5=0.0, null_sup=0.0)
    text = told(type(study)(still.summary, study.trajectories.iloc[:0], study.spectra, study.assumptions))
    assert "nan" not in text
    assert "moved apart by 0 on the worst" in text


def test_by_place_skips_what_is_not_there():
    study = synthetic.frames(ns=(1,), masses=(1.0,))
    table = by_place(study.summary.assign(measured_others=np.nan))
    assert set(table["place"]) == {"measured_replaced", "measured_heldout"}
