"""The page: self-contained, whole or absent, readable on a phone, the same bytes on a redraw."""

import contextlib
import re
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from studies.report.page import inline_svg, write_report
from studies.report.tables import MEANING, assumption_table, flag_list, meanings, median_tables
from tests.studies import page_faults, synthetic

CONFIG = """
title = "Twins on digits <&>"
question = "How far apart?"
optimizer = "woodbury"
lr = 0.1
[grid]
n = [6, 12, 24]
[provenance]
command = "stability run digits --out results/digits"
commit = "0123abc"
date = "2026-01-01T00:00:00+00:00"
host = "a-machine-name"
torch = "2.13.0"
"""


class Page(page_faults.Page):
    """Elements with their attributes; complains about tags that do not nest."""

    def __init__(self, text):
        super().__init__(text)
        assert self.astray == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Drawn by the first process of a parallel run that asks for it, read by all: nothing may be written there."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if hasattr(request.config, "workerinput") else own) / "drawn-digits"
    if not shared.exists():
        out = tmp_path_factory.mktemp("here") / shared.name
        synthetic.write(synthetic.frames(ns=(6, 12, 24), singular_n=(24,), steps=20), out, CONFIG)
        write_report(out)
        with contextlib.suppress(OSError):  # another process was here first
            out.rename(shared)
    return shared


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_figures_lie_beside_it(folder):
    kinds = Counter(path.suffix for path in (folder / "figures").iterdir())
    assert kinds == {".svg": 7, ".pdf": 7, ".png": 7}
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


def test_self_contained(text, page):
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    sources = [
        attributes[key]
        for _, attributes in page.elements
        for key in ("src", "href", "xlink:href", "data")
        if key in attributes
    ]
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert "@import" not in text
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", text))
    policy = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy[0].startswith("default-src 'none'")


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    targets = {
        attributes[key][1:]
        for _, attributes in page.elements
        for key in ("href", "xlink:href")
        if attributes.get(key, "").startswith("#")
    }
    assert targets <= set(ids)


def test_references_inside_figures_stay_inside(text):
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ids = set(re.findall(r'\bid="([^"]*)"', svg))
        assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) <= ids
        assert "aria-label=" in svg[: svg.index(">")]
        assert "<style" not in svg or re.search(r"<style[^>]*>\s*#", svg)


def test_opens_with_the_finding_then_contents(page, text):
    order = [
        attributes["id"]
        for _, attributes in page.elements
        if attributes.get("id") in ("finding", "lines", "assumptions", "bounds", "numbers", "flags", "again")
    ]
    assert order == ["finding", "lines", "assumptions", "bounds", "numbers", "flags", "again"]
    assert text.index('class="finding"') < text.index("<nav") < text.index('id="lines"')


def test_title_is_escaped_and_machine_is_not_named(text):
    assert "Twins on digits &lt;&amp;&gt;" in text
    assert "a-machine-name" not in text
    assert "stability run digits --out results/digits" in text
    assert "0123abc" in text
    assert "torch 2.13.0" in text


def test_flags_are_listed(page):
    assert any("xi=0: rows 3 and 5 of S are equal" in words for words in page.words)


def test_no_nan_reaches_the_reader(page):
    assert not [words for words in page.words if re.search(r"\bnan\b", words)]


@pytest.mark.slow
def test_a_redraw_gives_the_same_page(folder, text, tmp_path):
    again = shutil.copytree(folder, tmp_path / folder.name)
    write_report(again)
    assert (again / "report.html").read_text(encoding="utf-8") == text


def test_a_failed_redraw_leaves_the_old_page(folder, text, monkeypatch, tmp_path):
    again = shutil.copytree(folder, tmp_path / folder.name)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(again)
    assert (again / "report.html").read_text(encoding="utf-8") == text
    assert {path.name for path in again.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.slow
def test_a_single_point_without_config_or_other_tables(tmp_path):
    study = synthetic.frames(ns=(6,), masses=(1.0,), seeds=1, replacements=1, steps=5)
    synthetic.write(study, tmp_path)
    for name in ("trajectories", "spectra", "assumptions"):
        (tmp_path / f"{name}.parquet").unlink()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    Page(text)
    assert "No assumptions table in this folder." in text
    assert "needs at least three n" in text
    assert not re.search("id=.exponents|href=.#exponents", text)


@pytest.mark.slow
def test_two_widths_get_a_part_each(tmp_path):
    small = synthetic.frames(ns=(6,), masses=(1.0,), seeds=1, steps=5)
    wide = synthetic.frames(ns=(6,), masses=(1.0,), seeds=1, steps=5, width=256)
    both = type(small)(
        *(
            pd.concat([getattr(small, name), getattr(wide, name)])
            for name in ("summary", "trajectories", "spectra", "assumptions")
        )
    )
    page = Page(write_report(synthetic.write(both, tmp_path)).read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"bounds-width128", "bounds-width256"} <= set(ids)
    assert (tmp_path / "figures" / "bounds-width256.pdf").is_file()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "summary.parquet").unlink(), "no summary.parquet in"),
        (lambda out: synthetic.frames().summary.iloc[:0].to_parquet(out / "summary.parquet"), "has no rows"),
        (
            lambda out: synthetic.frames().summary.drop(columns="mass").to_parquet(out / "summary.parquet"),
            "has no column mass",
        ),
        (lambda out: (out / "config.toml").write_text("title = ["), "is not TOML"),
    ],
)
def test_bad_folders(tmp_path, spoil, message):
    synthetic.write(synthetic.frames(ns=(6,), masses=(1.0,), seeds=1, steps=5), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_assumptions_show_the_worst():
    study = synthetic.frames(ns=(6, 12), singular_n=(12,), masses=(1.0,), steps=5)
    table = assumption_table(study.assumptions)
    rate = next(row for row in table.rows if row[0] == "positive rate")
    assert rate[:6] == ["positive rate", "1", "runs", "3", "3", "0"]
    assert rate[-1] == "rows 3 and 5 are equal"
    drift = next(row for row in table.rows if row[0] == "no kernel drift")
    largest = study.assumptions.query("assumption == 'no kernel drift'")["value"].max()
    assert float(drift[6]) == pytest.approx(largest, rel=1e-2)


def test_every_assumption_of_a_study_has_its_words():
    names = set(synthetic.frames(ns=(6,), masses=(1.0,), seeds=1, steps=5).assumptions["assumption"])
    assert len(names) > 3
    assert names <= set(MEANING)
    assert all(len(meaning) > 20 for meaning in MEANING.values())


def test_an_unknown_assumption_still_has_its_quantity():
    rows = synthetic.frames(ns=(6,), masses=(1.0,), seeds=1, steps=5).assumptions.assign(assumption="something new")
    assert meanings(rows)[0][:3] == ("something new", "", "ξ = inf λ_min(H)")
    assert assumption_table(rows).rows


def test_medians_and_flags():
    study = synthetic.frames(ns=(6, 12), masses=(1.0, 0.1), singular_n=(12,), steps=5)
    bounds = median_tables(study.summary)[0]
    assert [row[:3] for row in bounds.rows] == [
        ["6", "1", "12"],
        ["6", "0.1", "12"],
        ["12", "1", "12"],
        ["12", "0.1", "12"],
    ]
    assert bounds.rows[2][3] == "∞"
    summary = study.summary.assign(flags=np.where(study.summary["n"] == 6, "a; b", ""))
    assert [(flag, count) for flag, count, _ in flag_list(summary)] == [("a", 24), ("b", 24)]
    assert flag_list(summary.assign(flags="")) == []


def test_inline_svg_drops_prologue_and_metadata(folder):
    svg = inline_svg(folder / "figures" / "ratios.svg", "x", "A <title>")
    assert svg.startswith("<svg")
    assert "<metadata" not in svg
    assert 'aria-label="A &lt;title&gt;"' in svg
    assert 'id="x-svg"' in svg
