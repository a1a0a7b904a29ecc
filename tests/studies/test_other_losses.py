"""A study under another loss than the squared one: what does not apply is said and not drawn; the rest stands."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from nt_kernel.errors import NumericalError
from stability.loss_ladder import NOT_APPLICABLE, QUADRATIC_ONLY
from studies import figures, run_study
from studies.definition.config import Study
from studies.figures import overview
from studies.figures.lines import drawn_lines
from studies.findings.applicable import scale_words
from studies.kinds.twins_tables import _refuse_nan
from studies.report.page import write_report
from tests.studies import synthetic

SMALL = ["n=3,6", "mass=0.1", "seeds=1", "replacements=2", "width=6", "steps=3", "workers=1", "data.held_out=5"]


@pytest.fixture(scope="module")
def study():
    """Synthetic frames as cross-entropy would leave them: the ladder of the theorem NaN, T3H above, T2H nowhere."""
    frames = synthetic.frames(ns=(6, 12, 24), steps=5)
    summary, trajectories = frames.summary.copy(), frames.trajectories.copy()
    summary[list(QUADRATIC_ONLY)] = np.nan
    trajectories["T3"] = np.nan
    summary = summary.assign(
        T2H=np.nan, T3H=3 * summary["measured_l2"], measured_H=summary["measured_l2"], rate_H=-0.3, not_applicable="why"
    )
    trajectories["T3H"] = 3 * trajectories["measured_l2"]
    return dataclasses.replace(frames, summary=summary, trajectories=trajectories)


def test_rungs_that_do_not_apply_are_not_drawn(study):
    drawn = {
        "bounds": figures.bounds_figure(study.summary, draws=50),
        "training": figures.training_figure(study.trajectories, study.summary),
        "ratios": figures.ratios_figure(study.summary),
        "waterfall": figures.waterfall_figure(study.summary),
    }
    for name, figure in drawn.items():
        labels = {label for ax in figure.axes for label in drawn_lines(ax)}
        labels |= {text.get_text() for ax in figure.axes for text in ax.get_yticklabels()}  # of a waterfall
        assert not labels & {"T0", "T1", "T1c", "T2", "T2H", "2L√n", "2L"}, name
        assert {"T4", "T5", "path"} <= labels
        assert not any("ξ = 0" in text.get_text() for ax in figure.axes for text in ax.texts), name
        legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
        assert not re.search(r"T0|T1|T2|2L", legend)
        said = [*(text.get_text() for text in figure.texts), *(sub.get_suptitle() for sub in [figure, *figure.subfigs])]
        assert any("not applicable: T0 to T3, 2L√n, 2L (they need ½‖y − a‖²)" in text for text in said), name
    assert "T3H" in drawn_lines(drawn["bounds"].axes[0])
    assert all("T0 not applicable" in ax.get_title() for ax in drawn["bounds"].axes[3:6])


def test_captions_speak_of_what_is_drawn(study):
    plain, other = (
        {drawing.name: drawing.caption for drawing in overview.drawings(frames)}
        for frames in (synthetic.frames(), study)
    )
    assert plain.keys() == other.keys()
    for words, there in ((plain, True), (other, False)):
        assert ("dotted trivial level" in words["bounds"]) == there
        assert ("with T3 (flow" in words["training"]) == there
        assert ("T0 over 2L√n, which no divergence can exceed" in words["constants"]) == there
        assert ("Rows T3 to T1, T0" in words["waterfall"]) == there
    assert "T3H" in other["bounds"]
    assert "with T3H (flow" in other["training"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"classes": 10, "outputs": 10}, "one-hot"),
        ({"classes": 0, "outputs": 3}, "regression"),
        ({"classes": 0, "outputs": 1}, "regression"),
        ({"outputs": 1}, "regression"),
        ({"outputs": 2}, "one-hot"),
        ({"n": 6}, "one-hot"),
    ],
)
def test_the_unit_of_the_outputs_is_told_by_the_classes(columns, words):
    assert words in scale_words(pd.DataFrame([columns] * 2))


def test_a_metric_rung_that_applies_in_some_pairs_says_where_it_does_not(study):
    summary = study.summary.assign(T2H=np.where(study.summary["n"] == 12, np.nan, 9 * study.summary["measured_l2"]))
    ax = figures.bounds_figure(summary, draws=50).axes[0]
    assert drawn_lines(ax)["T2H"].get_xdata().tolist() == [6, 24]
    assert "T2H not applicable\nat n = 12 (its rate is not above 0)" in ax.get_xlabel()


@pytest.mark.slow
def test_the_report_says_so_in_words(study, tmp_path):
    page = write_report(synthetic.write(study, tmp_path)).read_text(encoding="utf-8")
    assert "do not apply: they need ½‖y − a‖²" in page
    assert "T3H, a bound in the metric H⁻¹ on the flow without drift, is 3 times what it bounds." in page
    assert f"T2H is applicable in none of the {len(study.summary)} pairs: the smallest rate is −0.3" in page
    assert "ξ cannot be told from 0" not in page
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_study_of_another_loss_runs_and_judges_it(loss, tmp_path):
    study = Study.from_toml("digits", [*SMALL, f"loss={loss}"])
    found = run_study(study, tmp_path / "out", progress=False)
    nan = {name for name in found.summary if found.summary[name].isna().any()}
    assert nan <= set(NOT_APPLICABLE)
    assert ("T0" in nan) == (loss == "cross_entropy")
    assert set(found.assumptions.query("assumption == 'squared loss'")["verdict"]) == (
        {"violated"} if loss == "cross_entropy" else {"holds"}
    )


def test_nan_is_still_refused_where_nothing_says_why():
    with pytest.raises(NumericalError, match="not a number in T0"):
        _refuse_nan(pd.DataFrame({"T0": [np.nan]}))
    _refuse_nan(pd.DataFrame({"T0": [np.nan], "not_applicable": ["why"]}))
    with pytest.raises(NumericalError, match="not a number in T4"):
        _refuse_nan(pd.DataFrame({"T0": [np.nan], "T4": [np.nan], "not_applicable": ["why"]}))
