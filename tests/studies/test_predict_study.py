"""``stability predict``: its numbers are those of predict_twins and of trained twins, its page stands by itself."""

import numpy as np
import pandas as pd
import pytest

from stability import Replacement, predict_twins, trained_divergence
from studies.cli import main
from studies.definition.config import Study
from studies.sensitivity.predict import chosen, predict_study

SMALL = ["n=4", "mass=0.5", "width=8", "steps=12", "held_out=20", "seeds=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted")
    assert main(["predict", "digits", "--each", "2", "--out", str(out), *SMALL]) == 0
    return out


def test_the_tables_are_the_predictions_and_the_trained_twins(folder):
    table, trained = pd.read_parquet(folder / "sensitivity.parquet"), pd.read_parquet(folder / "calibration.parquet")
    (found,) = predict_study("digits", None, SMALL, each=2)
    pd.testing.assert_frame_equal(table.drop(columns=["n", "width", "mass", "seed"]), found.candidates)
    assert table["replaced"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(trained) == 9
    drawn, rows = found.drawn, found.drawn.replacement_rows
    assert len(set(table["replacement"]) | set(trained["replacement"])) == 17  # each z' once, where there are enough

    def candidates(frame):
        where = [rows.index(row) for row in frame["replacement"]]
        return [
            Replacement(int(k), drawn.replacement_x[j], drawn.replacement_targets[j])
            for k, j in zip(frame["replaced"], where, strict=True)
        ]

    run, data = {"steps": 12, "lr": 0.1, "mass": 0.5, "held_out": drawn.held_out}, (drawn.model, drawn.x, drawn.targets)
    again = predict_twins(*data, candidates(table), **run)
    measured = trained_divergence(*data, candidates(trained), **run)
    for of in ("sup", "others", "heldout"):
        np.testing.assert_allclose(table[f"predicted_{of}"], again.column(f"predicted_{of}"), rtol=0.02)
        np.testing.assert_allclose(trained[f"measured_{of}"], measured[f"measured_{of}"], rtol=1e-9)
        q = np.sort(trained[f"measured_{of}"] / trained[f"predicted_{of}"])[8]  # α = .1: the 9th of 9
        np.testing.assert_allclose(table[f"upper_{of}"], q * table[f"predicted_{of}"], rtol=1e-12)


def test_the_ranking_is_by_the_median_over_the_replacements():
    (found,) = predict_study("digits", None, SMALL, each=2)
    ranking, table = found.ranking(), found.candidates
    assert ranking["median"].is_monotonic_decreasing
    first = table[table["replaced"] == ranking["replaced"][0]]
    assert ranking["median"][0] == pytest.approx(first["predicted_sup"].mean())
    assert ranking["upper"][0] == first["upper_sup"].max()
    assert ranking["worst"][0] == first["replacement"][first["predicted_sup"].idxmax()]


def test_the_page_stands_by_itself(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", "")  # names of the SVG dialects
    assert "<script" not in page
    assert page.count('class="sample"') == 8  # four samples, and the z' that moves each most
    assert page.count("data:image/png;base64,") == 8
    assert "P(measured ≤" in page
    assert "for one further twin" in page
    assert "sensitivity.parquet" in page


def test_any_table_of_numbers_without_pictures(tmp_path):
    overrides = ["data.name=diabetes", *SMALL]
    (found,) = predict_study("digits", tmp_path, overrides, each=1)
    assert found.drawn.targets.shape == (4, 1)
    assert 'class="sample"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_mass_at_the_largest_n_and_width():
    study = Study.from_toml("digits", ["n=4,6", "mass=1,0.5", "width=8,16"])
    assert [(p.n, p.width, p.mass, p.seed) for p in chosen(study)] == [(6, 16, 1.0, 0), (6, 16, 0.5, 0)]


def test_bad_input_is_one_line(capsys, tmp_path):
    assert main(["predict", "digits", "nn=3", "--out", str(tmp_path)]) == 2
    assert "unknown key nn = 3" in capsys.readouterr().err
    assert main(["predict", "digits", "--each", "0", "--out", str(tmp_path), *SMALL]) == 2
    assert "each must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert main(["predict", "digits", "--alpha", "2", "--out", str(tmp_path), *SMALL]) == 2
    assert "alpha must be a number between 0 and 1, got 2.0" in capsys.readouterr().err
