"""Figures and words of studies over any axis, from frames made up here."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest

from studies.figures.grid import draw_over_axis, loop_sections, over_axis_figure, twin_sections
from studies.figures.style import new_figure
from studies.findings.grid import loop_finding, loop_numbers, on_average, varied
from studies.results.frames import TABLES, Frames
from tests.studies import synthetic
from tests.studies.test_figures import overlaps, visible_texts

OPTIMIZERS = ["adam", "gradient-descent", "woodbury-momentum"]


def made(values, axis="optimizer", seeds=3):
    rows = []
    for (index, value), n, seed, k in itertools.product(enumerate(values), [6, 12], range(seeds), range(2)):
        size = (1 + index) / n * (1 + 0.1 * seed)
        rows.append(
            {"n": n, "width": 8, "mass": 1.0, axis: value, "seed": seed, "replaced": k, "replacement": 50 + k}
            | {"measured_sup": size, "measured_l2": 2 * size, "measured_replaced": size, "measured_others": size / 3}
            | {
                "measured_heldout": size / 2,
                "path_sup": 2 * size,
                "T5": 1.5 * size,
                "null_sup": 1e-12,
                "gap": 0.3 + 0.01 * seed,
            }
            | {
                "train_loss": 0.1,
                "held_out_loss": 0.4 + 0.01 * seed,
                "uniform_stability": size,
                "parameter_distance": size,
            }
            | {"removed_own": 0.1, "removed_twin": 0.4, "new_own": 0.4, "new_twin": 0.1}
        )
    summary = pd.DataFrame(rows)
    steps = [
        summary.assign(step=step, **{c: summary[c] * step / 3 for c in summary if "measured" in c}) for step in range(4)
    ]
    empty = pd.DataFrame(columns=summary.columns)
    return Frames(summary, pd.concat(steps), empty, empty, config={"grid": {"n": [6, 12], axis: list(values)}})


def test_axes_of_the_study_come_before_n():
    assert varied(made(OPTIMIZERS)) == ["optimizer", "n"]
    assert varied(made([0.1], axis="lr")) == ["n"]


@pytest.mark.parametrize(
    ("values", "axis"), [(OPTIMIZERS, "optimizer"), ([0.0, 0.1, 0.5], "data.label_noise"), ([1, 4, 16], "batch")]
)
def test_every_section_is_drawn_and_its_texts_do_not_overlap(values, axis):
    for section in loop_sections(made(values, axis)):
        figure = section.make()
        figure.draw_without_rendering()
        upright = [text for text in visible_texts(figure) if text.get_rotation() in (0.0, 90.0)]
        assert not overlaps(upright), section.name
        assert section.title
        assert section.caption


def test_points_of_a_panel_are_the_medians_and_bars_reach_from_least_to_most():
    frames = made([1, 4, 16], "batch")
    rows = frames.summary[frames.summary["n"] == 6]
    ax = draw_over_axis(new_figure(3, 3).add_subplot(), rows, "batch", "measured_sup")
    line = ax.lines[0]
    np.testing.assert_allclose(np.asarray(line.get_xdata(), float), [1, 4, 16])
    middle = rows.groupby("batch")["measured_sup"].median().to_numpy(float)
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), middle)
    bars = [np.asarray(bar, float)[:, 1] for bar in ax.containers[0].lines[2][0].get_segments()]
    ends = rows.groupby("batch")["measured_sup"].agg(["min", "max"]).to_numpy(float)
    np.testing.assert_allclose(np.array(bars), ends)


@pytest.mark.parametrize(
    ("values", "axis", "lines", "words"),
    [
        ([f"rule-{i}" for i in range(8)], "optimizer", 8, False),
        ([1, 2, 4, 8, 16, 24, 32, 64], "batch", 6, True),
        ([1, 2, 4], "batch", 3, False),
    ],
)
def test_every_word_has_a_line_and_numbers_without_one_are_counted(values, axis, lines, words):
    found = {section.name: section for section in loop_sections(made(values, axis))}["training"]
    assert len(found.make().legends[0].get_texts()) == lines
    assert (f"{lines} of {len(values)} values have a line." in found.caption) == words


def test_what_has_no_place_on_a_log_axis_is_left_out():
    frames = made(OPTIMIZERS)
    summary = frames.summary.assign(T5=np.inf)
    figure = over_axis_figure(summary, "optimizer", {"T5": "T5", "gap": "gap"})
    figure.draw_without_rendering()
    assert len(figure.axes) == 2


def test_the_finding_in_numbers():
    frames = made(OPTIMIZERS)
    said = " ".join(loop_finding(frames))
    assert "36 pairs of runs" in said
    assert "adam: " in said
    assert "T5 is 1.5 times the measured divergence in the median" in said
    assert "in 36 of 36 pairs" in said
    caption, table = loop_numbers(frames)[0]
    assert "36 pairs" in caption
    assert list(table["optimizer"].unique()) == OPTIMIZERS


def test_the_on_average_identity_is_taken_over_the_draws():
    found = on_average(made(["adam"], seeds=4).summary, ["n"])
    assert list(found["n"]) == [6, 12]
    assert found["draws"].tolist() == [4, 4]
    assert found["stability"].iloc[0].value == pytest.approx(0.3)
    assert found["gap"].iloc[0].value == pytest.approx(0.315)
    assert on_average(made(["adam"], seeds=1).summary, ["n"]).empty


@pytest.mark.parametrize(
    ("values", "axis", "places"),
    [
        ([0.0, 0.1], "data.label_noise", ["label noise 0, n = 6", "label noise 0, n = 12"]),
        ([1, 4], "batch", ["batch 1, n = 6", "batch 1, n = 12"]),
    ],
)
def test_the_identity_is_said_of_named_places(values, axis, places):
    (said,) = [words for words in loop_finding(made(values, axis)) if "replace-one" in words]
    assert "at 4 of 4 places of the grid" in said
    examples = said.partition("; for example ")[2].split("; ")
    assert [words.partition(": gap ")[0] for words in examples] == places


def test_exponents_are_said_in_words():
    said = loop_finding(made(["adam"]))[-1]  # all sizes fall as 1/n, at two n alone
    assert "Exponents" not in said
    frames = made(["adam"])
    more = pd.concat([frames.summary, frames.summary.assign(n=4 * frames.summary["n"])], ignore_index=True)
    more["measured_others"] = 1 / more["n"]
    said = loop_finding(dataclasses.replace(frames, summary=more))[-1]
    assert "intervals: divergence at the other training samples −1.00\N{NO-BREAK SPACE}[" in said
    assert "_" not in said


def test_one_place_needs_no_name():
    frames = made(["adam"])
    frames = dataclasses.replace(frames, summary=frames.summary[frames.summary["n"] == 6])
    (said,) = [words for words in loop_finding(frames) if "replace-one" in words]
    assert "; for example gap 0.3" in said


def test_twin_studies_are_drawn_along_their_width():
    one, two = (synthetic.frames(width=width) for width in (64, 128))
    tables = {name: pd.concat([getattr(one, name), getattr(two, name)]) for name in TABLES}
    frames = Frames(**tables, config=one.config)
    sections = twin_sections(frames)
    assert [section.name for section in sections] == ["across-width", "constants-width"]
    for section in sections:
        figure = section.make()
        figure.draw_without_rendering()
        assert not overlaps(visible_texts(figure)), section.name
    assert twin_sections(one) == []
    assert [values for values, _ in frames.parts()] == [{"width": 64}, {"width": 128}]
