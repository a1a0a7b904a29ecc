"""Frames of every kind of study, made up here, and the pages that come of them: no training."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context

from studies import Study
from studies.definition.points import Point
from studies.figures.style import STYLE
from studies.report.page import render
from studies.results.frames import TABLES, Frames
from tests.studies import synthetic

PROVENANCE = {
    "command": "stability run STUDY --quick --out results/STUDY",
    "commit": "0123abc",
    "host": "a-machine-name",
}
PLACES = ("sup", "l2", "replaced", "others", "heldout")
SOLVERS = ("SGD", "SGD, momentum", "Adam", "Gauss–Newton")


def frames_of(kind: str, summary: list[dict], config: dict, **others: list[dict]) -> Frames:
    empty = pd.DataFrame()
    tables = {name: pd.DataFrame(rows) for name, rows in others.items()}
    trajectories = tables.pop("trajectories", empty)
    config = {"kind": kind, "title": f"A study of {kind}", "question": "What comes out?"} | config
    config["provenance"] = PROVENANCE
    return Frames(pd.DataFrame(summary), trajectories, empty, empty, config=config, others=tables)


def twins(**options) -> Frames:
    made = synthetic.frames(
        **{"ns": (6, 12), "masses": (1.0, 0.1), "steps": 12, "seeds": 2, "replacements": 1} | options
    )
    made.config.update({"title": "Twins", "question": "How far?", "grid": {"n": [6, 12]}, "provenance": PROVENANCE})
    return made


def twins_of_two_widths() -> Frames:
    both = [twins(ns=(6,), masses=(1.0,), seeds=1, width=width) for width in (64, 128)]
    return Frames(**{name: pd.concat([getattr(one, name) for one in both]) for name in TABLES}, config=both[0].config)


def loops() -> Frames:
    rows, series = [], []
    for (i, noise), n, seed, k in itertools.product(enumerate([0.0, 0.25, 0.5]), [6, 12], range(3), range(2)):
        size = (1 + i) / n * (1 + 0.1 * seed)
        key = {"n": n, "width": 8, "mass": 1.0, "data.label_noise": noise, "seed": seed, "replaced": k}
        key |= {"replacement": 50 + k}
        sizes = {"measured_sup": size, "measured_l2": 2 * size, "measured_replaced": size, "measured_others": size / 3}
        sizes |= {"measured_heldout": size / 2, "path_sup": 2 * size, "T5": 1.5 * size, "uniform_stability": size}
        losses = {"train_loss": 0.1, "held_out_loss": 0.4 + 0.01 * seed, "gap": 0.3 + 0.01 * seed}
        more = {"null_sup": 1e-12, "parameter_distance": size, "removed_own": 0.1, "removed_twin": 0.4}
        rows.append(key | sizes | losses | more | {"new_own": 0.4, "new_twin": 0.1})
        series += [key | {"step": t} | {c: v * t / 12 for c, v in sizes.items()} for t in range(13)]
    config = {"grid": {"n": [6, 12], "data.label_noise": [0.0, 0.25, 0.5]}}
    return frames_of("loops", rows, config, trajectories=series)


def movements() -> Frames:
    summary, steps, cases, sigma = [], [], [], []
    for problem, (i, solver), seed in itertools.product(("wave", "diabetes"), enumerate(SOLVERS), range(2)):
        key, lr = {"problem": problem, "solver": solver, "seed": seed}, 0.1 * (i < 3)
        for budget, values in {"iterations": (2, 10, 50), "seconds": (0.02, 0.1), "delta": (0.1,)}.items():
            for at in values:
                error = 10.0 ** (-i - np.log10(at + 1)) * (1 + 0.1 * seed)
                row = {
                    "budget": budget,
                    "per_step": at,
                    "lr": lr,
                    "tracking": error,
                    "bound": 2 * error,
                    "violated": "",
                }
                summary.append(
                    key | row | {"reached": 3, "outer_steps": 3, "iterations": 40 - 9 * i, "seconds": 0.2 / (i + 1)}
                )
        steps += [
            key | {"lr": lr, "step": t, "tracking": 0.1 * t / (i + 1), "tracking_bound": 0.12 * t / (i + 1)}
            for t in (1, 2, 3)
        ]
    for problem, case in itertools.product(("wave", "diabetes"), ("width 8", "an input twice")):
        words = dict.fromkeys(
            ("non-degenerate", "iterates inside", "budget inside"), "violated" if "twice" in case else "holds"
        )
        cases.append(
            {
                "problem": problem,
                "solver": "Gauss–Newton",
                "seed": 0,
                "case": case,
                **words,
                "reason": "",
                "sigma_least": 0.06,
            }
        )
        place = {"problem": problem, "solver": "Gauss–Newton", "seed": 0, "case": case}
        sigma += [
            place | {"step": t, "sigma_min": 0.06 + 0.01 * t, "sigma_max": 2.0, "displacement": t, "change": 0.1 * t}
            for t in range(4)
        ]
    return frames_of("movements", summary, {}, steps=steps, degeneracy=cases, sigma=sigma)


def diffusion() -> Frames:
    rng, summary, rounds, samples = np.random.default_rng(0), [], [], []
    for (i, solver), budget, seed in itertools.product(enumerate(SOLVERS[1:]), ("iterations", "seconds"), range(2)):
        key = {"solver": solver, "budget": budget, "seed": seed, "lr": 0.0 if i == 2 else 0.01}
        last = {"loss": 0.8 - 0.05 * i, "inexactness": 0.5 / 10**i, "energy_distance": 0.9, "floor": 0.05}
        summary.append(key | last | {"iterations": 40, "seconds": 1.0})
        rounds += [
            key | {"round": t, "loss": 1.1 - 0.04 * t - 0.01 * i, "inexactness": 0.5 / 10**i} for t in range(1, 7)
        ]
        for source, image in itertools.product(("real", "reconstructed", "sample"), range(8)):
            pixels = {f"pixel_{p}": value for p, value in enumerate(rng.random(64))}
            samples.append(key | {"source": source, "image": image} | pixels)
    return frames_of("diffusion", summary, {"grid": {"solver": list(SOLVERS[1:])}}, rounds=rounds, samples=samples)


def rlo(rules: bool = False) -> Frames:
    rows = []
    axis, values = ("rule.name", ["rlo-lifted", "sgd", "adam"]) if rules else ("rule.direction", ["sign", "tanh"])
    for (i, value), (j, lr), seed in itertools.product(enumerate(values), enumerate([0.003, 0.01, 0.03]), range(3)):
        size = (1 + i) * (1 + j) * (1 + 0.1 * seed)
        row = {
            "n": 100,
            "width": 64,
            "mass": 1.0,
            axis: value,
            "lr": lr,
            "seed": seed,
            "replaced": 0,
            "replacement": 60,
        }
        row |= {"loss_tail": 0.1 * size, "held_out": 0.9 - 0.02 * size, "thickness": 0.3 * size, "alignment": 0.5}
        rows.append(
            row
            | {"sup": 0.1 * size, "held_out_sup": 0.2 * size, "sup_at_level": 0.05 * size, "diverged": False}
            | {"twin_diverged": False}
        )
    return frames_of("rlo", rows, {"grid": {axis: values, "lr": [0.003, 0.01, 0.03]}})


def prediction() -> Frames:
    rows, timing = [], []
    for n, mass, seed in itertools.product((6, 12), (1.0, 0.1), range(2)):
        key = {"n": n, "width": 32, "mass": mass, "seed": seed}
        timing.append(key | {"train_seconds": 2.0, "predict_seconds": 0.1})
        for k in range(4):
            size = (1 + k) / n
            measured = {f"measured_{place}": size for place in PLACES}
            predicted = {f"predicted_{place}": size * (1 + 0.02 * (k - 1.4) * mass) for place in PLACES}
            rows.append(key | {"replaced": k, "replacement": 70 + k} | measured | predicted)
    return frames_of("prediction", rows, {"grid": {"n": [6, 12]}}, timing=timing)


KINDS = {
    "twins": twins, "twins of two widths": twins_of_two_widths, "loops": loops, "movements": movements,
    "diffusion": diffusion, "rlo": rlo, "rlo rules": lambda: rlo(rules=True), "prediction": prediction,
}  # fmt: skip


def predicted_page() -> str:
    """The page of ``stability predict``, from made-up numbers on real digits."""
    from stability import conformal_factor
    from studies.sensitivity.page import page
    from studies.sensitivity.predict import QUANTITIES, Sensitivity

    rng, found = np.random.default_rng(0), []
    for mass in (1.0, 0.01):
        sizes = {f"predicted_{of}": rng.uniform(0.2, 1.0, 12) for of in QUANTITIES}
        uppers = {f"upper_{of}": 1.1 * sizes[f"predicted_{of}"] for of in QUANTITIES}
        keys = {"replaced": np.repeat(np.arange(4), 3), "replacement": np.arange(100, 112)}
        candidates = pd.DataFrame(keys | sizes | uppers)
        calibration = candidates.assign(**{f"measured_{of}": 1.02 * sizes[f"predicted_{of}"] for of in QUANTITIES})
        factors = {
            of: conformal_factor(calibration[f"measured_{of}"], calibration[f"predicted_{of}"], 0.1)
            for of in QUANTITIES
        }
        point = Point((("n", 4), ("width", 8), ("mass", mass), ("seed", 0)), "key")
        drawn = SimpleNamespace(x=torch.rand(4, 64), targets=torch.eye(10)[:4])
        found.append(Sensitivity(point, drawn, candidates, calibration, factors))
    return page(found, Study.from_toml("digits"), ["stability", "predict", "digits", "--quick"])


def save_svg(figure, path: Path) -> list[Path]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
    return [path.with_name(f"{path.name}.svg")]


def write_page(kind: str, folder: Path) -> Path:
    """The report of a kind (or of ``stability predict``) as folder/report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch("studies.figures.style.save_figure", save_svg):  # a page holds no more, and the rest takes longer
        text = predicted_page() if kind == "predict" else render(KINDS[kind](), folder)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


PAGES = (*KINDS, "predict")
