"""The figure of the action principle, from records of real runs, and the example that draws it."""

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stability.action_record import record_action
from studies.figures.action import action_figure, draw_alignment, draw_excess, excess_action, optimizers_of
from studies.figures.style import PAGE, new_figure
from tests.nt_kernel.cases import F64, mlp
from tests.studies.test_figures import overlaps, visible_texts

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "action.py"


def record(name, lr, steps=12):
    torch.manual_seed(0)
    model, x, a = mlp(3, 6, 2).to(F64), torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    loss = lambda y: 0.5 * (y - a).square().sum(1)  # noqa: E731
    opt = getattr(torch.optim, name)(model.parameters(), lr=lr)
    with record_action(model, x, loss, optimizer=opt, scale="none") as action:
        for _ in range(steps):
            opt.zero_grad()
            loss(model(x)).mean().backward()
            opt.step()
    return action


@pytest.fixture(scope="module")
def frame():
    runs = {"descent": record("SGD", 0.1), "Adam": record("Adam", 0.02), "ascent": record("SGD", 3.0, 2)}
    return pd.concat([action.to_frame().assign(optimizer=name) for name, action in runs.items()])


def test_the_excess_is_the_gap_over_the_descent():
    action = record("Adam", 0.02)
    found = excess_action(action.to_frame())
    assert found["excess"].iloc[-1] == pytest.approx(action.scale_free_gap / action.descent)
    assert found["across"].iloc[-1] == pytest.approx(action.total("direction") / action.descent)
    curvature = action.steps["curvature"].cumsum(0).numpy() / found["fall"]
    np.testing.assert_allclose(found["excess"], found["across"] + curvature, rtol=1e-9)
    assert found["loss"].tolist() == action.h[1:].tolist()


def test_where_the_risk_rose_there_is_no_excess():
    run = pd.DataFrame({"h": [1.0, 2.0], "h_next": [2.0, 0.5], "length": [1.0, 2.0], "direction": [2.0, 0.0]})
    found = excess_action(run)
    assert found["excess"].isna().tolist() == [True, False]
    assert found["excess"].iloc[1] == 3.0 / 0.5 - 1


def test_the_figure_shows_every_run_and_no_text_on_another(frame, recwarn):
    figure = action_figure(frame)
    figure.draw_without_rendering()
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["descent", "Adam", "ascent"]
    for name, line in zip(optimizers_of(frame), right.get_lines(), strict=True):
        run = frame[frame["optimizer"] == name]
        np.testing.assert_array_equal(line.get_xdata(), run["h"])
        np.testing.assert_array_equal(line.get_ydata(), run["alignment"])
    shown = {line.get_label(): line.get_ydata() for line in left.get_lines()}
    for name in ("descent", "Adam"):
        expected = excess_action(frame[frame["optimizer"] == name])["excess"]
        np.testing.assert_array_equal(shown[name], expected[expected > 0])
    assert left.get_xlim()[0] > left.get_xlim()[1]  # training goes to the right
    texts = visible_texts(figure)
    assert overlaps(texts) == []
    page = figure.bbox.padded(2)
    assert all(page.contains(*corner) for text in texts for corner in text.get_window_extent().corners())
    assert [str(warning.message) for warning in recwarn] == []


def test_panels_of_ones_own(frame):
    axes = new_figure(PAGE, 3).subplots(1, 2)
    assert draw_excess(axes[0], frame) is axes[0]
    assert draw_alignment(axes[1], frame) is axes[1]
    axes = new_figure(PAGE, 3).subplots(1, 2)
    assert action_figure(frame, axes) is axes[0].figure
    assert axes[0].get_legend() is not None
    assert not axes[0].figure.legends


def test_a_frame_of_something_else(frame):
    with pytest.raises(ValueError, match=r"missing: \['alignment', 'optimizer'\]"):
        action_figure(frame.drop(columns=["optimizer", "alignment"]))


def test_the_example_runs(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLE))
    run = example["run"]
    example["main"].__globals__["run"] = lambda make: run(make, samples=8, width=6, most=3)
    example["main"](tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == list(example["OPTIMIZERS"])
    assert "across 0.000, cosine 1.000 to 1.000" in lines[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"action.png", "action.svg", "action.pdf"}
