"""Frames with plausible numbers, in the shape a study writes them: no training. Sizes as in runs on digits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from studies.results.frames import Frames

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
MASSES = (1.0, 0.1, 0.01)
KEY = ["n", "width", "mass", "seed", "replaced", "replacement"]
LEARNING_RATE = 0.1
# Mass 1, 0.1, 0.01 at n = 20: value, then exponent of n. Bounds above each other as the ladder demands.
LAWS = {
    "xi": ((0.02, -2.4), (0.098, -1.9), (0.73, -1.5)),
    "measured_replaced": ((0.39, -0.45), (0.61, -0.05), (0.60, 0.1)),
    "measured_others": ((0.15, 0.0), (0.11, 0.35), (0.04, 1.1)),
    "measured_heldout": ((0.36, -0.1), (0.45, 0.05), (0.52, 0.12)),
}


def twin_row(n, mass, seed, replaced, replacement, rng, steps, singular):
    def law(name):
        exponents = dict(zip(MASSES, LAWS[name], strict=True))
        value, power = exponents.get(mass, LAWS[name][1])
        return value * (n / 20) ** power * np.exp(0.15 * rng.standard_normal())

    L, kappa = 1.8 + 0.02 * rng.standard_normal(), 6.0 * np.exp(0.05 * rng.standard_normal())
    at_replaced, others, heldout = law("measured_replaced"), law("measured_others"), law("measured_heldout")
    sup = max(at_replaced, others)
    l2 = np.hypot(at_replaced, others * np.sqrt(max(n - 1, 0)) * 0.4)
    l2 = max(l2, sup)
    xi = 0.0 if singular else min(law("xi"), 1.6)
    h = min(kappa**2 / mass, 1.5 * n)
    lambda_max = 2.8
    column = min(h / np.sqrt(n), lambda_max * 1.05)
    path_l2, path_sup = l2 * 1.2, sup * 1.15
    disturbance = 0.5 * 2 * h * L / np.sqrt(n) * 0.02
    T3 = max(l2, 0.1) * 9 * (1 + n / 40)
    T4 = l2 * (3 + 200 * mass / (n + 20))
    T5 = sup * (1.1 + 1.2 * n / 60)
    with np.errstate(divide="ignore"):
        T2 = T3 * 4 if not singular else np.inf
        T1c = T2 * 3 + (2 * L * column / xi if not singular else np.inf)
        T1 = max(T1c, 2 * h * L / (xi * np.sqrt(n)) if not singular else np.inf)
        T0 = max(T1, 2 * kappa**2 * L / (max(xi, 1e-300) * mass * np.sqrt(n))) if not singular else np.inf
    final = 0.98
    return {
        "n": n, "width": 128, "mass": mass, "seed": seed, "replaced": replaced, "replacement": replacement,
        "parameters": 26122, "outputs": 10, "lr": LEARNING_RATE, "steps": steps,
        "xi": xi, "kappa": kappa, "L": L, "mu": mass, "h": h, "column": column,
        "lambda_max": lambda_max, "lambda_max_twin": lambda_max * 1.02,
        "T0": max(T0, 2 * L * np.sqrt(n)), "T1": T1, "T1c": T1c, "T2": T2, "T3": T3, "T4": T4, "T5": T5,
        "T5_others": min(T5, others * 4), "path_l2": path_l2, "path_sup": path_sup,
        "vacuity_floor": 2 * L * np.sqrt(n), "trivial_sup": 2 * L,
        "disturbance": disturbance, "drift": 0.7 * disturbance, "drift_share": 0.5 + 0.5 * rng.random(),
        "measured_sup": sup, "measured_l2": l2, "measured_replaced": at_replaced, "measured_others": others,
        "measured_heldout": heldout, "final_sup": final * sup, "final_replaced": final * at_replaced,
        "final_others": final * others, "final_heldout": final * heldout,
        "null_sup": 3e-14 * (1 + rng.random()),
        "train_loss": 0.004 + 0.05 * mass, "twin_train_loss": 0.004 + 0.05 * mass,
        "flags": "xi=0: rows 3 and 5 of S are equal" if singular else "",
    }  # fmt: skip


def trajectory(row: dict) -> pd.DataFrame:
    """Growth to the summary's value, loss falling to the summary's: the suprema of both tables agree."""
    step = np.arange(row["steps"] + 1)
    time = step * row["lr"]
    grow = (1 - np.exp(-time / 3)) / (1 - np.exp(-time[-1] / 3))
    fall = row["train_loss"] + (0.5 - row["train_loss"]) * np.exp(-time / (3 + 8 * row["mass"]))
    frame = {key: row[key] for key in ("n", "width", "mass", "seed", "replaced", "replacement")}
    frame |= {"step": step, "time": time}
    for name in (
        "measured_sup",
        "measured_l2",
        "measured_replaced",
        "measured_others",
        "measured_heldout",
        "path_l2",
        "path_sup",
    ):
        frame[name] = row[name] * grow
    for name in ("T3", "T4", "T5", "T5_others"):
        frame[name] = row[name] * grow
    frame |= {"disturbance": row["disturbance"] * np.exp(-time / 5), "drift": row["drift"] * np.exp(-time / 5)}
    frame |= {"xi": row["xi"] * (1 + np.exp(-time)), "train_loss": fall, "twin_train_loss": fall}
    return pd.DataFrame(frame)


def spectrum(row: dict) -> pd.DataFrame:
    step = np.arange(row["steps"] + 1)
    low, high = np.log(max(row["xi"], 1e-17)), np.log(row["lambda_max"])
    rows = []
    for quantile in QUANTILES:
        level = np.exp(low + (high - low) * quantile**0.6) * (1 + 0.6 * np.exp(-step * row["lr"]) * (1 - quantile))
        if quantile == 0 and row["xi"] == 0:
            level = level * 0 - 1e-17  # what rounding leaves of a zero eigenvalue
        rows.append(
            pd.DataFrame(
                {key: row[key] for key in ("n", "width", "mass", "seed")}
                | {"step": step, "quantile": quantile, "eigenvalue": level}
            )
        )
    return pd.concat(rows, ignore_index=True)


def assumption_rows(row: dict) -> list[dict]:
    key = {name: row[name] for name in ("n", "width", "mass", "seed", "replaced", "replacement")}
    point = key | {"replaced": -1, "replacement": -1}

    def entry(key, assumption, quantity, value, threshold, margin, verdict, reason, equation):
        return key | {
            "assumption": assumption, "quantity": quantity, "value": value, "threshold": threshold, "margin": margin,
            "verdict": verdict, "reason": reason, "equation": equation,
        }  # fmt: skip

    why, share, null = "rows 3 and 5 are equal", row["drift_share"], row["null_sup"] / row["measured_sup"]
    rate = ("violated", why) if row["xi"] == 0 else ("holds", "λ_min(H) stays above its rounding radius")
    own, drift = "G is built on each twin's own data", "the proof drops (H'_S − H)r'"
    limit = "bound on lr·λ_max(ΛHΛᵀ), both twins"
    flow, gap = "sup of curvature and lr·λ_max(ΛHΛᵀ)/2 per step", "max_α ‖G'^−½(G − G')G'^−½‖ at θ₀"
    return [
        entry(point, "positive rate", "ξ = inf λ_min(H)", row["xi"], 0.0, row["xi"], *rate, "P5, P14"),
        entry(point, "step below its limit", limit, 0.28, 2.0, 1.72, "holds", "", "Euler step of P4"),
        entry(point, "gradient flow", flow, 0.14, 0.01, -0.13, "violated", "Euler steps", "P4"),
        entry(point, "squared loss", "ℓ = ½‖y − a‖²", 0.0, 0.0, 0.0, "holds", "the loss of this study", "P6"),
        entry(
            point, "C¹ activations", "modules with a kink", 0.0, 0.0, 0.0, "undecided", "the forward is not known", "P8"
        ),
        entry(key, "no kernel drift", "sup‖(H'_S − H)r'‖ / sup‖d‖", share, 1e-6, 1e-6 - share, "violated", drift, "P8"),
        entry(key, "one metric", gap, 0.5, 1e-6, -0.5, "violated", own, "P8"),
        entry(key, "resolved by floats", "null twin / measured sup", null, 1e-3, 1e-3 - null, "holds", "", "–"),
    ]


def frames(
    ns=(6, 12, 24, 48), masses=MASSES, seeds=3, replacements=4, steps=60, singular_n=(), width=128, seed=0
) -> Frames:
    """A whole study. `singular_n`: where xi is 0 and T0, T1, T1c, T2 are infinite."""
    rng = np.random.default_rng(seed)
    rows = [
        twin_row(n, mass, s, k, 300 + 7 * s + k, rng, steps, n in singular_n) | {"width": width}
        for n, mass, s, k in itertools.product(ns, masses, range(seeds), range(replacements))
    ]
    summary = pd.DataFrame(rows)
    first = summary.drop_duplicates(["n", "mass", "seed"]).to_dict("records")
    assumptions = pd.DataFrame([entry for row in rows for entry in assumption_rows(row)])
    return Frames(
        summary=summary,
        trajectories=pd.concat([trajectory(row) for row in rows], ignore_index=True),
        spectra=pd.concat([spectrum(row) for row in first], ignore_index=True),
        assumptions=assumptions.drop_duplicates(["n", "mass", "seed", "replaced", "replacement", "assumption"]),
    )


def write(result: Frames, out: Path, config: str | None = None) -> Path:
    """As a result folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("summary", "trajectories", "spectra", "assumptions"):
        getattr(result, name).to_parquet(out / f"{name}.parquet", index=False)
    if config is not None:
        (out / "config.toml").write_text(config, encoding="utf-8")
    return out
