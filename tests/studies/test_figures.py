"""Figures: what is drawn, what is not, that nothing global changes, and that a redraw gives the same bytes."""

import hashlib
import itertools
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from studies import figures
from studies.figures.lines import LINES, PER_SAMPLE, STACKED, drawn_lines, spread
from studies.findings.exponents import fit_exponent
from tests.studies import synthetic
from tests.thinned import thinned

MAKERS = {
    "bounds": lambda study: figures.bounds_figure(study.summary, draws=100),
    "training": lambda study: figures.training_figure(study.trajectories, study.summary),
    "constants": lambda study: figures.constants_figure(study.summary),
    "ratios": lambda study: figures.ratios_figure(study.summary),
    "confinement": lambda study: figures.confinement_figure(study.summary, study.trajectories),
    "waterfall": lambda study: figures.waterfall_figure(study.summary),
    "spectrum": lambda study: figures.spectrum_figure(study.spectra, study.summary),
}
PARTIAL = {
    "whole": {},
    "one pair": {"ns": (6,), "masses": (1.0,), "seeds": 1, "replacements": 1},
    "two n": {"ns": (6, 12), "masses": (1.0, 0.01)},
    "singular at 48": {"singular_n": (48,)},
    "all singular": {"singular_n": (6, 12, 24, 48)},
    "n = 1": {"ns": (1,), "masses": (0.1,)},
}


@pytest.fixture(scope="module")
def study():
    return synthetic.frames()


def overlaps(texts):
    """Pairs of texts whose boxes share more than a hair."""
    boxes = [(text.get_text(), text.get_window_extent().padded(-1.0)) for text in texts]
    return [(a, b) for (a, box), (b, other) in itertools.combinations(boxes, 2) if box.overlaps(other)]


@pytest.mark.parametrize(("name", "partial"), thinned(itertools.product(MAKERS, PARTIAL), 5))
def test_drawn_from_what_there_is(name, partial, recwarn):
    """Nothing fails, nothing warns, no text lies on another or leaves the page, whatever is missing."""
    figure = MAKERS[name](synthetic.frames(**PARTIAL[partial], steps=20))
    figure.draw_without_rendering()
    texts = visible_texts(figure)
    assert overlaps(texts) == []
    page = figure.bbox.padded(2)
    outside = [
        text.get_text()
        for text in texts
        if not (page.x0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= page.x1)
    ]
    assert outside == []
    assert [str(warning.message) for warning in recwarn] == []


def visible_texts(figure):
    """Every text a reader sees; tick labels beyond the limits exist but are not drawn."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def test_panels_take_an_axes_and_return_it(study):
    rows = study.summary[study.summary["mass"] == 1.0]
    figure = figures.new_figure(figures.COLUMN, 3)
    calls = [
        (figures.draw_bounds, (rows,)),
        (figures.draw_exponents, ({},)),
        (figures.draw_divergence, (study.trajectories,)),
        (figures.draw_constant, (study.summary, "xi")),
        (figures.draw_ratios, (study.summary, "measured_sup", ("T5",))),
        (figures.draw_held_out, (rows,)),
        (figures.draw_spectrum, (study.spectra, 0.01)),
    ]
    for draw, arguments in calls:
        ax = figure.add_subplot()
        assert draw(ax, *arguments) is ax
        ax.remove()


def test_like_is_compared_with_like():
    """No panel holds bounds on the stack and bounds on a single sample; T0 is stated for one and proved for the
    other."""
    assert set(STACKED) & set(PER_SAMPLE) == {"T0"}
    assert not {"T5", "path_sup", "trivial_sup", "measured_sup"} & set(STACKED)
    assert not {"T4", "path_l2", "vacuity_floor", "measured_l2"} & set(PER_SAMPLE)


def test_the_lines_are_the_medians(study):
    ax = figures.bounds_figure(study.summary, draws=100).axes[0]  # mass 1, stacked
    drawn = drawn_lines(ax)
    assert set(drawn) == {LINES[column].label for column in STACKED if column in study.summary}
    expected = study.summary[study.summary["mass"] == 1.0].groupby("n")["T4"].median()
    np.testing.assert_allclose(drawn["T4"].get_ydata(), expected)


def test_infinite_bounds_are_named_and_not_drawn():
    figure = figures.bounds_figure(synthetic.frames(singular_n=(48,)).summary, draws=100)
    drawn = drawn_lines(figure.axes[0])
    assert 48 not in drawn["T0"].get_xdata()
    assert 48 in drawn["T3"].get_xdata()
    assert "T0, T1, T1c, T2 not applicable\nat n = 48 (ξ = 0)" in figure.axes[0].get_xlabel()
    assert "(none at n = 48: ξ = 0)" in figure.axes[3].get_title()


def test_one_infinite_pair_is_enough(study):
    """A median over the finite pairs would be a choice of the favourable ones."""
    summary = study.summary.copy()
    summary.loc[summary.index[0], "T0"] = np.inf
    figure = figures.bounds_figure(summary, draws=100)
    assert 6 not in drawn_lines(figure.axes[0])["T0"].get_xdata()


@pytest.mark.parametrize("name", ["bounds", "training", "ratios"])
def test_every_line_is_in_the_legend_with_its_kind_and_named_in_its_row(name, study):
    """At the right-most panel of a row, which has the same lines as the others; every panel of its own otherwise."""
    figure = MAKERS[name](study)
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    named = {"bounds": figure.axes[2:6:3], "training": figure.axes[2::3], "ratios": figure.axes[:3]}[name]
    for ax in named:
        written = {text.get_text() for text in ax.texts}
        for label, line in drawn_lines(ax).items():
            assert line.get_label().removeprefix(f"{label}: ") in legend
            assert label in written
    if name != "ratios":
        rows = [figure.axes[:3], figure.axes[3:6]]
        assert all(set(drawn_lines(ax)) == set(drawn_lines(row[-1])) for row in rows for ax in row)


def test_bounds_at_the_replaced_sample_and_away_from_it(study):
    """Each over its own measurement; held-out points have no bound, and the panel says so."""
    figure = MAKERS["ratios"](study)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[1:] == ["replaced sample k", "other training samples, i ≠ k", "held-out points"]
    at = study.summary[(study.summary["n"] == 48)]
    for ax, column, measured in zip(
        figure.axes[1:3], ("T5", "T5_others"), ("measured_replaced", "measured_others"), strict=True
    ):
        expected = (at[column] / at[measured]).groupby(at["mass"]).median()
        np.testing.assert_allclose(drawn_lines(ax)["T5"].get_ydata(), expected)
    share = (at["measured_heldout"] / at["measured_replaced"]).groupby(at["mass"]).median()
    held_out = figure.axes[3]
    np.testing.assert_allclose(drawn_lines(held_out)["measured"].get_ydata(), share)
    assert set(drawn_lines(held_out)) == {"measured"}
    assert any("No bound of the theory" in text.get_text() for text in held_out.texts)


def test_constants_are_medians_with_bars_from_the_smallest_to_the_largest(study):
    ax = figures.draw_constant(figures.new_figure(3, 3).add_subplot(), study.summary, "h")
    heavy = study.summary[study.summary["mass"] == 1.0].groupby("n")["h"]
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), heavy.median())
    low, high = zip(*(path[:, 1] for path in ax.collections[0].get_segments()), strict=True)
    np.testing.assert_allclose(low, heavy.min())
    np.testing.assert_allclose(high, heavy.max())


@pytest.mark.slow
def test_type_is_large_enough(study):
    """6.5 points on the page, exponents included."""
    for make in MAKERS.values():
        assert min(text.get_fontsize() for text in visible_texts(make(study))) >= 6.5


def test_lines_differ_without_colour():
    """Grey print: dash and marker alone tell the lines of a panel apart."""
    for columns in (STACKED, PER_SAMPLE):
        looks = [(LINES[column].dash, LINES[column].marker) for column in columns]
        assert len(set(looks)) == len(looks)


def test_no_exponent_from_two_n():
    ax = figures.draw_exponents(
        figures.new_figure(3, 3).add_subplot(), {"T0": fit_exponent(synthetic.frames(ns=(6, 12)).summary, "T0")}
    )
    assert any("needs at least three n" in text.get_text() for text in ax.texts)
    figure = figures.bounds_figure(synthetic.frames(ns=(6, 12)).summary)
    assert len(figure.axes) == 2 * 3  # no row of exponents that says nothing


def test_a_study_of_one_n_runs_along_the_mass():
    study = synthetic.frames(ns=(12,), masses=(1.0, 0.1, 0.01))
    figure = figures.bounds_figure(study.summary, draws=100)
    stacked, single, exponents = figure.axes
    np.testing.assert_allclose(drawn_lines(stacked)["T4"].get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_allclose(
        drawn_lines(stacked)["T4"].get_ydata(), study.summary.groupby("mass")["T4"].median().to_numpy()
    )
    assert stacked.get_title() == "n = 12"
    assert single.get_xlabel() == "mass [no unit]"
    assert exponents.get_xlabel() == "exponent of mass, 95 % interval"
    expected = str(fit_exponent(study.summary, "T0", along="mass", draws=100))
    assert expected in [text.get_text() for text in exponents.texts]
    constants = figures.constants_figure(study.summary)
    np.testing.assert_allclose(constants.axes[0].get_lines()[0].get_xdata(), [0.01, 0.1, 1.0])
    assert [text.get_text() for text in constants.legends[0].get_texts()] == ["measured, n = 12"]


def test_bounds_along_a_width_and_the_place_of_an_infinite_one():
    parts = []
    for width in (16, 32, 64):
        one = synthetic.frames(ns=(12,), masses=(1.0,)).summary
        parts.append(one.assign(width=width, T0=one["T0"] * width if width < 64 else np.inf))
    summary = pd.concat(parts)
    ax = figures.draw_bounds(figures.new_figure(3, 3).add_subplot(), summary, ("T0", "measured_l2"), along="width")
    drawn = drawn_lines(ax)
    np.testing.assert_allclose(drawn["T0"].get_xdata(), [16, 32])
    np.testing.assert_allclose(drawn["T0"].get_ydata()[1] / drawn["T0"].get_ydata()[0], 2)
    assert "T0 not applicable\nat width 64" in ax.get_xlabel()
    fit = fit_exponent(summary.assign(q=summary["width"] ** -2.0), "q", along="width")
    assert fit.slope == pytest.approx(-2)
    assert fit.values == (16, 32, 64)


def test_axes_of_a_row_are_shared(study):
    axes = figures.bounds_figure(study.summary, draws=100).axes
    assert len({ax.get_ylim() for ax in axes[:3]}) == 1


def test_nothing_global_changes(study, tmp_path):
    before = dict(matplotlib.rcParams)
    figures.save_figure(MAKERS["ratios"](study), tmp_path / "ratios")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_pyplot_holds_no_figure():
    """seaborn imports pyplot; no figure may be left in its care, and importing must change no setting."""
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams.copy())\n"
        "from tests.studies import synthetic; from studies.figures import constants_figure\n"
        "constants_figure(synthetic.frames(ns=(6,)).summary)\n"
        "import matplotlib.pyplot as plt; assert plt.get_fignums() == []\n"
        "after = dict(matplotlib.rcParams.copy())\n"
        "assert {k: v for k, v in after.items() if k != 'backend'} == "
        "{k: v for k, v in before.items() if k != 'backend'}"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_drawing_imports_seaborn():
    code = "import sys; import studies.figures, studies.report, studies.report.paragraph; sys.exit('seaborn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_redraw_gives_the_same_bytes(tmp_path):
    """In two processes with different hash seeds and at different times."""
    code = (
        "import sys; from pathlib import Path; from tests.studies import synthetic; from studies import figures\n"
        "study = synthetic.frames(ns=(6, 12, 24), steps=20)\n"
        "list(figures.draw_figures(study, Path(sys.argv[1])))"
    )
    digests = []
    for run in ("1", "2"):
        folder = tmp_path / run
        environment = {"PYTHONHASHSEED": run, "OMP_NUM_THREADS": "1", "PATH": ""}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())})
    assert len(digests[0]) == 21
    assert digests[0] == digests[1]


def test_figures_without_their_table_are_left_out(study):
    bare = type(study)(study.summary, study.trajectories.iloc[:0], study.spectra.iloc[:0], study.assumptions.iloc[:0])
    kept = ["bounds", "constants", "waterfall", "ratios", "confinement"]
    assert [drawing.name for drawing in figures.drawings(bare)] == kept
    assert "equal training loss" not in next(d.caption for d in figures.drawings(bare) if d.name == "confinement")
    MAKERS["confinement"](bare)


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_and_gap(seed):
    rng = np.random.default_rng(seed)
    places = rng.random(9)
    moved = spread(places, 0.08)
    assert (np.argsort(moved) == np.argsort(places)).all()
    assert (np.diff(np.sort(moved)) >= 0.08 - 1e-9).all()
    assert moved.min() >= -1e-9
    assert moved.max() <= 1 + 1e-9


def test_spread_leaves_alone_what_does_not_touch():
    np.testing.assert_allclose(spread([0.9, 0.1, 0.5], 0.1), [0.9, 0.1, 0.5])
    assert spread([], 0.1).size == 0


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda ax, f: figures.draw_bounds(ax, f.summary, ("T9",)), "unknown column that is drawn as a line 'T9'"),
        (
            lambda ax, f: figures.draw_bounds(ax, f.summary, ("T5",), along="lr2"),
            "has no column 'lr2'; it has n, width",
        ),
        (lambda ax, f: figures.draw_divergence(ax, f.trajectories, ("T9",)), "line 'T9'; known are"),
        (
            lambda ax, f: figures.draw_over_axis(ax, f.summary, "n", "gapp"),
            "draw_over_axis: the table has no column 'gapp'",
        ),
        (lambda ax, f: figures.draw_trajectory(ax, f.trajectories, "n", "gapp"), "has no column 'gapp'"),
        (lambda ax, f: figures.draw_constant(ax, f.summary, "chi"), "has no column 'chi'"),
        (lambda ax, f: figures.draw_constant(ax, f.summary[:0], "xi"), "draw_constant was given a table without rows"),
    ],
)
def test_what_a_panel_cannot_draw_is_named(draw, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        draw(figures.new_figure(3, 2).subplots(), synthetic.frames())
