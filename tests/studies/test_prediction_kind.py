"""``kind = "prediction"``: by conjugate gradients it is the trained twin, and its page says how right it was."""

import numpy as np
import pytest

from studies import run_study
from studies.definition.config import Study
from studies.findings.predicted import agreement, prediction_finding
from studies.kinds.prediction import PLACES, run_point
from studies.report.page import write_report

SMALL = ["n=4", "mass=0.5", "width=6", "seeds=1", "replacements=3", "steps=6", "held_out=10", "hidden=1", "workers=1"]


def test_by_conjugate_gradients_the_prediction_is_the_trained_twin():
    study = Study.from_toml("prediction", [*SMALL, "method=cg"])
    rows = run_point(study, study.points()[0])["summary"]
    for place in PLACES:
        np.testing.assert_allclose(rows[f"predicted_{place}"], rows[f"measured_{place}"], rtol=1e-7)


def test_auto_is_one_over_the_number_of_layers():
    auto, number = (Study.from_toml("prediction", [*SMALL, f"lr={lr}"]) for lr in ("auto", "0.5"))  # two layers
    one, two = (run_point(study, study.points()[0])["summary"] for study in (auto, number))
    np.testing.assert_allclose(one["predicted_sup"], two["predicted_sup"], rtol=1e-12)


def test_the_page_of_a_prediction_study(tmp_path):
    study = Study.from_toml("prediction", [*SMALL, "width=6,8"])
    frames = run_study(study, tmp_path, progress=False)
    found = agreement(frames.summary)
    assert found["pairs"] == 6
    assert found["median error"] < 0.2
    assert list(frames.timing.columns) == ["n", "width", "mass", "seed", "predict_seconds", "train_seconds"]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert prediction_finding(frames)[0][:40] in page
    assert page.count("<svg") == 2


def test_agreement_in_numbers():
    import pandas as pd

    rows = pd.DataFrame({"measured_sup": np.arange(1.0, 21), "predicted_sup": np.arange(1.0, 21) * 0.8})
    found = agreement(rows)
    assert found["median error"] == pytest.approx(0.2)
    assert found["correlation"] == pytest.approx(1.0)
    assert found["factor at 90 %"] == pytest.approx(1.25)
