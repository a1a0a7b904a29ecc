"""Every drawing function that is exported: takes an Axes of anybody's, returns it, changes nothing else; every figure on
paper: width, fonts, and lines that differ without colour or with fewer colours."""

import inspect
import itertools
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from examples import paper_figure
from studies import figures
from studies.findings.confinement import by_place
from studies.findings.exponents import fit_exponent
from studies.findings.rlo import means
from studies.findings.waterfall import waterfall
from tests.studies import every_kind, synthetic
from tests.thinned import thinned

DOCS = Path(__file__).resolve().parents[2] / "docs" / "figures.md"
DRAWING = sorted(name for name in figures.__all__ if name.startswith("draw_") and name != "draw_figures")
FIGURES = sorted(
    name for name in figures.__all__ if name.endswith("_figure") and name not in ("new_figure", "save_figure")
)


def steps_of_runs() -> pd.DataFrame:
    h = np.geomspace(1.0, 0.1, 9)
    runs = {"SGD": 0.4, "Adam": 1.2}
    return pd.concat(
        pd.DataFrame({"optimizer": name, "h": h[:-1], "h_next": h[1:], "length": (h[:-1] - h[1:]) * (1 + far)}).assign(
            direction=0.1 * far * (h[:-1] - h[1:]), alignment=1 / (1 + far)
        )
        for name, far in runs.items()
    )


class Frames:
    """Made once, when first asked for."""

    def __init__(self):
        self.kinds = {kind: make() for kind, make in every_kind.KINDS.items() if kind != "twins of two widths"}
        self.study = self.kinds["twins"]
        self.rows = self.study.summary[self.study.summary["mass"] == 1.0]
        self.fits = {
            name: fit_exponent(every_kind.twins(ns=(6, 12, 24)).summary, name, draws=50) for name in ("T0", "T5")
        }
        self.calibration = pd.DataFrame({"predicted_sup": [0.2, 0.5, 0.9], "measured_sup": [0.21, 0.5, 0.95]})
        routes = pd.DataFrame(
            {"n": [6, 12, 24], "measured": [0.5, 0.3, 0.2], "T0": [50.0, 40.0, 30.0], "T5": [0.6, 0.4, 0.3]}
        )
        self.routes = (
            routes,
            {
                name: fit_exponent(routes.assign(seed=0, replaced=0, replacement=0), name, draws=50)
                for name in ("measured", "T0", "T5")
            },
        )

    def __getattr__(self, name):
        return self.kinds[name.replace("_", " ")]


CALLS = {
    "draw_alignment": lambda f: (steps_of_runs(),),
    "draw_bound": lambda f: (f.movements.steps, "wave"),
    "draw_bounds": lambda f: (f.rows,),
    "draw_budget": lambda f: (f.movements.summary, "wave", "iterations"),
    "draw_calibration": lambda f: (f.calibration, 1.1),
    "draw_constant": lambda f: (f.study.summary, "xi"),
    "draw_divergence": lambda f: (f.study.trajectories[f.study.trajectories["mass"] == 1.0],),
    "draw_excess": lambda f: (steps_of_runs(),),
    "draw_exponents": lambda f: (f.fits,),
    "draw_held_out": lambda f: (f.study.summary,),
    "draw_over_axis": lambda f: (f.loops.summary, "data.label_noise", "measured_sup", "n"),
    "draw_place": lambda f: (by_place(f.study.summary).query("place == 'measured_replaced'"),),
    "draw_predicted": lambda f: (f.prediction.summary, "replaced", "n"),
    "draw_prediction_error": lambda f: (f.prediction.summary, "others", "n", "mass"),
    "draw_ratios": lambda f: (f.study.summary, "measured_l2", ("T0", "T4", "path_l2")),
    "draw_rounds": lambda f: (figures.tuned_table(f.diffusion, "rounds"), "loss", "seconds"),
    "draw_routes": lambda f: f.routes,
    "draw_samples": lambda f: (figures.tuned_table(f.diffusion, "samples"),),
    "draw_settings": lambda f: (means(f.rlo), "loss_tail", ["rule.direction", "lr"]),
    "draw_spectrum": lambda f: (f.study.spectra[f.study.spectra["n"] == 12], 0.05),
    "draw_sweep": lambda f: (means(f.rlo), "loss_tail", "lr", ["rule.direction"]),
    "draw_trajectory": lambda f: (f.loops.trajectories, "data.label_noise", "measured_replaced"),
    "draw_waterfall": lambda f: (waterfall(f.rows, "l2"),),
}
MAKES = {
    "action_figure": lambda f: figures.action_figure(steps_of_runs()),
    "bound_figure": lambda f: figures.bound_figure(f.movements.steps),
    "bounds_figure": lambda f: figures.bounds_figure(f.study.summary, draws=50),
    "budget_figure": lambda f: figures.budget_figure(f.movements.summary),
    "calibration_figure": lambda f: figures.calibration_figure(f.calibration, 1.1),
    "confinement_figure": lambda f: figures.confinement_figure(f.study.summary, f.study.trajectories),
    "constants_figure": lambda f: figures.constants_figure(f.study.summary),
    "error_figure": lambda f: figures.error_figure(f.prediction.summary, "n", "mass"),
    "over_axis_figure": lambda f: figures.over_axis_figure(f.loops.summary, "n", {"gap": "gap", "measured_sup": "sup"}),
    "predicted_figure": lambda f: figures.predicted_figure(f.prediction.summary, "n"),
    "ratios_figure": lambda f: figures.ratios_figure(f.study.summary),
    "rounds_figure": lambda f: figures.rounds_figure(f.diffusion),
    "routes_figure": lambda f: figures.routes_figure({"one": f.routes}),
    "samples_figure": lambda f: figures.samples_figure(f.diffusion),
    "spectrum_figure": lambda f: figures.spectrum_figure(f.study.spectra, f.study.summary),
    "sweep_figure": lambda f: figures.sweep_figure(f.kinds["rlo rules"]),
    "training_figure": lambda f: figures.training_figure(f.study.trajectories, f.rows),
    "trajectory_figure": lambda f: figures.trajectory_figure(f.loops.trajectories, "n", {"measured_replaced": "at k"}),
    "waterfall_figure": lambda f: figures.waterfall_figure(f.study.summary),
}


@pytest.fixture(scope="module")
def frames():
    return Frames()


def test_every_exported_function_is_tried_and_documented():
    assert set(CALLS) == set(DRAWING)
    assert set(MAKES) == set(FIGURES)
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in figures.__all__ if f"`{name}`" not in text] == []
    for name in (*DRAWING, *FIGURES):
        assert len(inspect.getdoc(getattr(figures, name)) or "") > 30
    for name in DRAWING:
        assert next(iter(inspect.signature(getattr(figures, name)).parameters)) == "ax"


@pytest.mark.parametrize("name", DRAWING)
def test_a_panel_on_anybodys_axes(name, frames):
    import matplotlib.pyplot as plt

    arguments = CALLS[name](frames)
    figure, axes = plt.subplots(1, 2)
    before = dict(matplotlib.rcParams)
    assert getattr(figures, name)(axes[0], *arguments) is axes[0]
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == [figure.number]
    plt.close(figure)
    assert axes[0].has_data()
    assert not axes[1].has_data()
    for label in (axes[0].get_xlabel(), axes[0].get_ylabel()):
        assert label.strip()
    figure.draw_without_rendering()
    assert lines_that_look_alike(axes[0]) == []


def test_values_come_with_their_unit(frames):
    import matplotlib.pyplot as plt

    for name in set(DRAWING) - {"draw_exponents", "draw_waterfall", "draw_samples", "draw_settings"}:
        figure, ax = plt.subplots()
        getattr(figures, name)(ax, *CALLS[name](frames))
        assert re.search(r"\[[^]]+\]", ax.get_ylabel()), (name, ax.get_ylabel())
        plt.close(figure)


def luminance(color) -> float:
    """L* of CIELAB: what grey print leaves of a colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    y = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
"""Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB."""


def as_deuteranope(color) -> np.ndarray:
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)])
    seen = np.clip(DEUTERANOPIA @ linear, 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


def lines_that_look_alike(ax) -> list[tuple[str, str]]:
    """Named lines of a panel that share dash and marker and are close in grey, or in grey as a deuteranope sees them."""
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_") and line.get_label()]
    return [
        (a.get_label(), b.get_label())
        for a, b in itertools.combinations(named, 2)
        if (a.get_linestyle(), a.get_marker()) == (b.get_linestyle(), b.get_marker())
        and min(
            abs(luminance(a.get_color()) - luminance(b.get_color())),
            abs(luminance(as_deuteranope(a.get_color())) - luminance(as_deuteranope(b.get_color()))),
        ) < 15
    ]  # fmt: skip


def test_lines_that_look_alike_are_seen():
    ax = figures.new_figure(3, 3).add_subplot()
    for color in ("#d55e00", "#009e73"):  # told apart by hue alone
        ax.plot([1, 2], [1, 2], color=color, label=color)
    assert len(lines_that_look_alike(ax)) == 1
    ax.lines[0].set_linestyle("--")
    assert lines_that_look_alike(ax) == []


@pytest.mark.parametrize("name", thinned(FIGURES, 4))
def test_a_figure_on_paper(name, frames, tmp_path):
    figure = MAKES[name](frames)
    assert figure.get_figwidth() in (figures.COLUMN, figures.PAGE)
    for ax in figure.axes:
        assert lines_that_look_alike(ax) == []
    pdf = figures.save_figure(figure, tmp_path / name)[1].read_bytes()
    wide = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1]) / 72
    assert min(abs(wide - figures.COLUMN), abs(wide - figures.PAGE)) < 0.01
    assert b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf


def test_the_example_for_a_paper(tmp_path):
    folder = synthetic.write(every_kind.twins(), tmp_path / "results")
    files = paper_figure.main(folder, tmp_path / "paper")
    assert {path.suffix for path in files} == {".svg", ".pdf", ".png"}
    wide = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", (tmp_path / "paper.pdf").read_bytes())[1]) / 72
    assert wide == pytest.approx(figures.COLUMN, abs=0.01)
