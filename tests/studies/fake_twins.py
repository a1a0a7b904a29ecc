"""Stand-ins for the training: ``train_twins`` from a formula, a point's tables from nothing. For tests of what surrounds
them; light to import, since the children of a pool do it too."""

import time
from types import SimpleNamespace

import numpy as np
import pandas as pd

from studies.running.outcome import Outcome

SERIES = [
    *("measured_sup", "measured_l2", "measured_replaced", "measured_others", "measured_heldout"),
    *("T3", "T4", "T5", "T5_others", "path_l2", "path_sup", "disturbance", "drift", "twin_train_loss"),
]


def fake_train_twins(model, x, targets, replacements, *, held_out, steps, lr, mass, **options):
    n, T = len(x), steps + 1
    first = float(next(model.parameters()).detach().flatten()[0])
    distance = [float((twin.x - x[twin.index]).norm()) for twin in replacements]  # the numbers depend on what was drawn
    growth = np.linspace(0, 1, T) / n
    return SimpleNamespace(
        pairs=[
            {
                "replaced": twin.index,
                "parameters": sum(p.numel() for p in model.parameters()),
                "lr": 0.1,
                "steps": steps,
            }
            | {"xi": mass / n, "mu": mass, "start": first, "measured_sup": d / n, "measured_l2": d / n, "flags": ""}
            for twin, d in zip(replacements, distance, strict=True)
        ],
        trajectories={name: np.array([d * growth for d in distance]) for name in SERIES},
        run={name: np.full(T, mass / n) for name in ("train_loss", "xi", "lambda_max", "kappa")},
        spectrum=np.tile(np.arange(7.0), (T, 1)),
        spectrum_quantiles=(0, 0.05, 0.25, 0.5, 0.75, 0.95, 1),
        assumptions=[
            {"replaced": k, "assumption": "drift", "quantity": "drift_share", "value": 0.5, "threshold": None}
            | {"margin": None, "verdict": "violated", "reason": "", "equation": "P8"}
            for k in [-1, *(twin.index for twin in replacements)]
        ],
    )


def tables(point):
    """The four tables of a point, as small as they may be."""
    key = {"n": point.n, "width": point.width, "mass": point.mass, "seed": point.seed}
    pair = key | {"replaced": 1, "replacement": 7}
    return {
        "summary": pd.DataFrame([pair | {"measured_sup": 0.5, "measured_l2": 0.5}]),
        "trajectories": pd.DataFrame([pair | {"step": step} for step in range(3)]),
        "spectra": pd.DataFrame([key | {"step": 0, "quantile": 0.0, "eigenvalue": 1.0}]),
        "assumptions": pd.DataFrame([pair | {"assumption": "drift", "verdict": "violated"}]),
    }


def slow_attempt(study, point):
    """In place of ``runner.attempt``: the small points of seed 0 at once, the others in a minute."""
    if (point.n, point.seed) != (6, 0):
        time.sleep(60)
    return Outcome(tables(point), None, {"seconds": 0.0})
