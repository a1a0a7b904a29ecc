"""Do calibrated predictions, and estimates for all replacements of a sample, keep what they promise on twins held back?"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.prediction_data import draw_study, network
from benchmarks.timing import Settings
from stability.prediction.coverage import coverage
from stability.prediction.per_sample import uniform_per_sample
from stability.prediction.predict import predict_twins
from stability.prediction.trained import trained_divergence
from stability.prediction.uniform import uniform_estimate

TITLE = "Coverage of predictions and estimates"
ALPHA = 0.1
LEVEL = 0.02  # of the estimate per sample, so that its coverage on trained twins is 0.95 or more
POOL = 72  # with the twins fewer than the rows that the smallest data set has left: no z' stands in both
CALIBRATION, TESTED, STEPS = 39, 30, 60
METHODS = ("strided-path", "kernel-path")
ABOUT = (
    "Tanh networks with two hidden layers of 64 on data sets of scikit-learn, squared loss, M = I, scale mean, lr 0.1, "
    f"{STEPS} steps. Each setting has data, replacements and an initialisation of its own: {CALIBRATION} twins S^(k→z'), "
    f"drawn at random, calibrate the conformal factor q for α = {ALPHA:g}; {TESTED} more are trained and held back. `covered`: share of them with measured sup divergence ≤ "
    "q·predicted; `over`: median of q·predicted/measured. `per sample`: the estimate for all replacements of each k "
    f"(`uniform_per_sample`, α = {LEVEL:g}, no trained twin) on all {CALIBRATION + TESTED} trained twins; `ellipsoid`: the "
    "one of `uniform_estimate` for every (k, z'), from 24 candidates, along strides. Bands: central 95 %; "
    "binomial as if the tests were independent, and exact for tests that share the q of their setting."
)
METHOD = "Nothing is timed."
# data set, masses, n
CASES = [
    ("digits", (1.0, 0.1, 0.01), (12,)),
    ("digits, n = 24", (0.1,), (24,)),
    ("wine", (1.0, 0.01), (12, 24)),
    ("breast cancer", (1.0, 0.01), (16, 32)),
    ("diabetes", (1.0, 0.1, 0.01), (16,)),
]
QUICK = [("wine", (0.1,), (6,))]


def study(name: str, n: int, mass: float, settings: Settings, *, tested: int, steps: int, seed: int = 0) -> dict:
    """All numbers of one setting, drawn by ``seed``: the rows of ``stability.prediction.coverage.coverage``, the estimates."""
    twins = CALIBRATION + tested
    x, a, drawn, held_out = draw_study(name, n, twins + POOL, 10, seed, settings.device)
    model, zs, pool = network((x.shape[1], 64, 64, a.shape[1]), seed, settings.device), drawn[:twins], drawn[twins:]
    run = {"steps": steps, "lr": 0.1, "mass": mass}
    measured = trained_divergence(model, x, a, zs, held_out=held_out, **run)["measured_sup"].cpu().double()
    found: dict = {"name": name, "n": n, "mass": mass, "measured": measured}
    for method in METHODS:
        predicted = predict_twins(model, x, a, zs, method=method, held_out=held_out, **run).column("predicted_sup")
        found[method] = coverage(measured.numpy(), predicted.numpy(), CALIBRATION, ALPHA)
        found[method]["overestimates"] = found[method]["factor"] * predicted[CALIBRATION:] / measured[CALIBRATION:]
    pool_x, pool_a = torch.stack([z.x for z in pool]), torch.stack([z.target for z in pool])
    estimate = uniform_per_sample(model, x, a, pool_x, pool_a, each=4, alpha=LEVEL, **run)
    found["per sample"] = estimate.upper()[[z.index for z in zs]] / measured
    ellipsoid = uniform_estimate(model, x, a, pool[:24], method="strided-path", **run)
    found["ellipsoid"] = ellipsoid.sup / measured
    return found


def table(rows: Sequence[Mapping]) -> str:
    """A line per setting."""
    lines = [
        "| data | n | mass | strided-path: q | covered | over | kernel-path: q | covered | over | "
        "per sample: covered | over | ellipsoid: covered | over |",
        "|---|--:|--:|" + "--:|" * 10,
    ]
    for row in rows:
        cells = [row["name"], str(row["n"]), f"{row['mass']:g}"]
        for method in METHODS:
            of = row[method]
            cells += [f"{of['factor']:.3f}", f"{of['covered']}/{of['tested']}", f"{of['overestimate']:.2f}"]
        for name in ("per sample", "ellipsoid"):
            cells += [f"{int((row[name] >= 1).sum())}/{len(row[name])}", f"{row[name].median():.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Mapping]) -> str:
    """All settings together, with the bands that the counts should lie in."""
    lines = [
        "| | twins | covered | promised | binomial band | exact band | median over-estimate |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for method in METHODS:
        tested = [row[method]["tested"] for row in rows]
        share = sum(row[method]["covered"] for row in rows) / sum(tested)
        over = torch.cat([row[method]["overestimates"] for row in rows]).median()
        low, high = binomial_band(sum(tested), 1 - ALPHA)
        exact = pooled_band(tested, CALIBRATION, ALPHA)
        lines.append(
            f"| conformal, {method} | {sum(tested)} | {share:.3f} | {1 - ALPHA:g} | {low:.3f} – {high:.3f} | "
            f"{exact[0]:.3f} – {exact[1]:.3f} | {over:.2f} |"
        )
    for name in ("per sample", "ellipsoid"):
        ratios: Tensor = torch.cat([row[name] for row in rows])
        share = (ratios >= 1).double().mean()
        lines.append(f"| {name} | {len(ratios)} | {share:.3f} | an estimate | – | – | {ratios.median():.2f} |")
    return "\n".join(lines)


def binomial_band(tests: int, p: float) -> tuple[float, float]:
    """The central 95 % of a binomial share.

    >>> binomial_band(100, 0.9)
    (0.84, 0.95)
    """
    from scipy.stats import binom

    return tuple(float(end) / tests for end in binom.ppf([0.025, 0.975], tests, p))


def pooled_band(tests: Sequence[int], m: int, alpha: float) -> tuple[float, float]:
    """The central 95 % of the share covered where every setting has its own q from m calibration twins.

    Given q, a setting covers with probability B ~ Beta(k, m + 1 − k), k = ⌈(1 − α)(m + 1)⌉ (Vovk 2012), so its count is
    beta-binomial; the counts of the settings add up.

    >>> low, high = pooled_band([30] * 12, 19, 0.1)
    >>> low < 0.9 < high, high - low > 0.06
    (True, True)
    """
    from scipy.special import beta

    from stability.prediction.conformal import rank_of

    k = rank_of(alpha, m)
    total = np.ones(1)
    for t in tests:
        c = np.arange(t + 1)
        choose = np.array([comb(t, int(i)) for i in c], dtype=float)
        total = np.convolve(total, choose * beta(c + k, t - c + m + 1 - k) / beta(k, m + 1 - k))
    below = np.cumsum(total)
    return tuple(float(np.searchsorted(below, end)) / sum(tests) for end in (0.025, 0.975))


def report(settings: Settings, cases: Sequence[tuple], stem: Path) -> Iterator[str]:
    """The body of the page, after each data set."""
    rows: list[dict] = []
    tested, steps = (TESTED, STEPS) if settings.rounds > 3 else (8, 12)
    for name, masses, sizes in cases:
        for n in sizes:
            for mass in masses:
                # Seeds 1, 2, … : no draw is shared between settings, nor with those that the levels were chosen on (seed 0).
                own = {"tested": tested, "steps": steps, "seed": len(rows) + 1}
                rows.append(study(name.partition(",")[0], n, mass, settings, **own))
        yield f"{summary(rows)}\n\n{table(rows)}"
