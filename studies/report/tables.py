"""The tables of the report as plain rows of text: assumptions, medians, exponents, flags, and what the lines are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stability.assumptions.catalogue import CATALOGUE
from studies.figures.bounds import EXPONENTS, NAMES
from studies.figures.lines import KINDS, LINES
from studies.findings.applicable import stated
from studies.findings.exponents import Exponent, compared
from studies.findings.numbers import exponents, ratio
from studies.findings.written import number, setting, short_words

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("holds", "violated", "undecided")
MEANING = {spec.name: spec.meaning for spec in CATALOGUE.values()}
"""What an assumption of theorem 3 means, by the name that the assumptions table gives it."""


@dataclass(frozen=True)
class Table:
    """Columns as (short heading, what it is); rows of text; how many columns on the left name the row."""

    columns: list[tuple[str, str]]
    rows: list[list[str]]
    keys: int = 1
    caption: str = field(default="")

    @property
    def explained(self) -> list[tuple[str, str]]:
        """The columns whose heading is short for something."""
        return [(short, long) for short, long in self.columns if short != long]


def line_table(summary: pd.DataFrame | None = None) -> list[dict[str, object]]:
    """The lines of the figures by kind: label, formula, of what norm; with a summary those it has numbers for."""
    about = {
        "T0": "stated per sample, proved for ‖e‖",
        "T5": "per sample",
        "trivial_sup": "per sample",
        "vacuity_floor": "on ‖e‖",
    }
    about |= dict.fromkeys(("T1", "T1c", "T2", "T3", "T2H", "T3H", "T4"), "on ‖e‖")
    kinds: dict[str, list[str]] = {}
    for column, line in LINES.items():
        if column in ("T5_others", "measured_others") or (summary is not None and not stated(summary, [column])):
            continue
        text = line.formula if line.label in (line.formula, "measured") else f"{line.label}: {line.formula}"
        kinds.setdefault(line.kind, []).append(f"{text} ({about[column]})" if column in about else text)
    return [{"kind": kind, "meaning": KINDS[kind], "lines": kinds[kind]} for kind in KINDS if kind in kinds]


def assumption_table(assumptions: pd.DataFrame) -> Table:
    """Verdicts counted by assumption and mass, with the worst value (violated before undecided before holds, then
    least margin)."""
    headings = [
        ("assumption", "what theorem 3 takes for granted"),
        ("mass", "mass of every layer"),
        ("counted in", "runs on S, or twin pairs"),
        *((verdict, f"how many have the verdict {verdict}") for verdict in VERDICTS),
        ("worst value", "of the measured quantity"),
        ("threshold", "what it is held against"),
        ("margin", "negative: on the wrong side"),
        ("why", "reason given with the worst value"),
    ]
    rows = []
    for name in dict.fromkeys(assumptions["assumption"]):
        for mass, these in sorted(assumptions[assumptions["assumption"] == name].groupby("mass"), reverse=True):
            counts, worst = these["verdict"].value_counts(), worst_row(these)
            unit = "runs" if (these["replaced"] < 0).all() else "pairs"
            numbers = [number(float(worst.get(key, np.nan))) for key in ("value", "threshold", "margin")]
            counted = [str(int(counts.get(verdict, 0))) for verdict in VERDICTS]
            rows.append([name, f"{mass:g}", unit, *counted, *numbers, str(worst.get("reason", "") or "")])
    return Table(headings, rows, keys=3)


def worst_row(rows: pd.DataFrame) -> pd.Series:
    """Violated before undecided before holds; among equals the smallest margin."""
    rank = rows["verdict"].map({"violated": 0, "undecided": 1, "holds": 2}).fillna(1)
    margin = rows.get("margin", rank)
    return rows.loc[margin.groupby(rank).idxmin().iloc[0]] if margin.notna().all() else rows.loc[rank.idxmin()]


def meanings(assumptions: pd.DataFrame) -> list[tuple[str, str, str, str]]:
    """Each assumption once: name, meaning in words, measured quantity, equations of the paper."""
    found = []
    for name, rows in assumptions.groupby("assumption", sort=False):
        quantity, equation = (str(rows[key].iloc[0]) if key in rows else "" for key in ("quantity", "equation"))
        found.append((str(name), MEANING.get(str(name), ""), quantity, "" if equation == "–" else equation))
    return found


BOUND_COLUMNS = (
    "T0",
    "T0_over_measured",
    "T0_over_floor",
    "T1",
    "T1c",
    "T2",
    "T3",
    "T2H",
    "T3H",
    "rate_H",
    "vacuity_floor",
    "T4",
    "path_l2",
    "measured_l2",
    "T5",
    "path_sup",
    "trivial_sup",
    "measured_sup",
)
HEADINGS = {
    "T0": ("T0", "the paper's statement, 2κ²L/(ξμ√n)"),
    "T0_over_measured": ("T0/maxᵢ |eᵢ|", "T0 over the measurement it is stated for, pair by pair"),
    "T0_over_floor": ("T0/(2L√n)", "T0 over the trivial level of ‖e‖, pair by pair"),
    "vacuity_floor": ("2L√n", "trivial level of ‖e‖"),
    "path_l2": ("path ‖e‖", "theory-free path length of ‖e‖"),
    "measured_l2": ("‖e‖", "measured, all training outputs"),
    "T5": ("T5", "a-posteriori enclosure, per sample"),
    "path_sup": ("path maxᵢ", "theory-free path length, worst sample"),
    "trivial_sup": ("2L", "trivial level per sample"),
    "measured_sup": ("maxᵢ |eᵢ|", "measured, worst training sample"),
    "rate_H": ("ρ", "infimum over the run of the rate in the metric H⁻¹"),
    "xi": ("ξ", "infimum of λ_min(H) over the run"),
    "kappa": ("κ", "supremum of ‖∂outputs/∂θ‖ per sample"),
    "L": ("L", "supremum of ‖∂loss/∂output‖"),
    "h": ("h", "supremum of λ_max of the diagonal blocks of J G⁻¹Jᵀ"),
    "lambda_max": ("λmax", "supremum of λ_max(H)"),
    "drift_share": ("drift/d", "kernel drift over disturbance"),
    "measured_replaced": ("replaced", "measured at the replaced sample"),
    "measured_others": ("others", "measured at the other training samples"),
    "measured_heldout": ("held-out", "measured at held-out points"),
    "train_loss": ("loss", "final training loss of the run on S"),
}
MORE_HEADINGS = {
    "null_sup": ("null", "two runs on the same data, a start moved by one ulp: what rounding alone does"),
    "path_sup": ("path", "theory-free path length, worst training sample"),
    "held_out_loss": ("held-out loss", "of the run on S, at the end"),
    "held_out": ("accuracy", "share of held-out points classified rightly"),
    "held_out_accuracy": ("accuracy", "share of held-out points classified rightly"),
    "gap": ("gap", "held-out loss − training loss"),
    "uniform_stability": ("uniform", "largest difference of the twins' losses over the held-out points"),
    "parameter_distance": ("parameters", "distance of the twins' parameters over their norm"),
    "loss_tail": ("loss", "steady-state training loss"),
    "thickness": ("‖z‖/‖d‖", "residual thickness"),
    "alignment": ("cos(v, d)", "alignment of the velocity with its target"),
    "factor": ("fitted f", "of z⁺ = f·(z − Δd) by least squares over the second half of the run; 1 − η for an RLO"),
    "forcing": ("‖Δd‖/‖d‖", "how far the target moves in a step"),
    "sup": ("sup", "largest divergence of the twins on the training samples"),
    "held_out_sup": ("held-out sup", "largest divergence of the twins at held-out points"),
    "sup_at_level": ("at equal loss", "divergence of the twins where the training losses are equal"),
    "diverged": ("diverged", "share of runs that diverged"),
    "reached": ("reached", "seeds that came down to the loss at which twins are compared at equal loss"),
    "inexactness": ("δ", "distance to the exact proximal point, as a share of the exact step"),
    "energy_distance": ("energy distance", "between samples and held-out latents"),
    "least": ("least", "least loss over the seeds"),
    "largest": ("largest", "largest loss over the seeds"),
    "steps_within": ("steps within", "outer steps that came within δ"),
    "sigma_start": ("σ start", "smallest singular value of J at the start"),
    "sigma_least": ("σ least", "smallest singular value of J along the run"),
    "sigma_min": ("σ min", "smallest singular value of J at this outer step"),
    "sigma_max": ("σ max", "largest singular value of J at this outer step"),
    "change": ("‖ΔJ‖", "change of J since the start, spectral norm"),
}
CONSTANT_COLUMNS = (
    "xi",
    "lambda_max",
    "kappa",
    "L",
    "h",
    "drift_share",
    "measured_replaced",
    "measured_others",
    "measured_heldout",
    "train_loss",
)


def median_tables(summary: pd.DataFrame) -> list[Table]:
    """Medians over the pairs of each (n, mass): the bounds with what they bound; the constants and where the
    divergence is."""
    over = summary.assign(
        T0_over_measured=ratio(summary, "T0", "measured_sup"), T0_over_floor=ratio(summary, "T0", "vacuity_floor")
    )
    return [
        medians(
            over,
            stated(over, BOUND_COLUMNS),
            "Bounds and measurements, suprema over training [network-output units; the two ratios have no unit]; "
            "∞ where ξ is 0, – where a bound is not applicable.",
        ),
        medians(
            summary,
            CONSTANT_COLUMNS,
            "Constants, share of the kernel drift, divergence by place [network-output units], final training loss.",
        ),
    ]


def medians(summary: pd.DataFrame, columns: Sequence[str], caption: str) -> Table:
    columns = [column for column in columns if column in summary.columns]
    grouped = summary.groupby(["n", "mass"])
    values, sizes = grouped[columns].median(), grouped.size()
    order = sorted(values.index, key=lambda key: (key[0], -key[1]))
    rows = [
        [str(int(n)), f"{mass:g}", str(int(sizes[n, mass])), *(number(float(value)) for value in values.loc[(n, mass)])]
        for n, mass in order
    ]
    head = [("n", "training samples"), ("mass", "mass of every layer"), ("pairs", "twin pairs")]
    return Table(
        [*head, *(HEADINGS.get(c, (c, LINES[c].kind if c in LINES else c)) for c in columns)],
        rows,
        keys=2,
        caption=caption,
    )


def exponent_table(summary: pd.DataFrame) -> Table | None:
    """Exponents with intervals: a row per quantity, a column per mass (along the mass: per n). None where none is fitted."""
    fits = exponents(summary, tuple(stated(summary, EXPONENTS)))
    if not any(fit.fitted for fit in fits["exponent"]):
        return None
    by = fits.columns[0]
    values = list(dict.fromkeys(fits[by]))
    found: dict[tuple[float, str], Exponent] = {(value, name): fit for value, name, fit in fits.itertuples(index=False)}
    rows = [
        [NAMES.get(name, LINES[name].label), LINES[name].kind, *(with_note(found[value, name]) for value in values)]
        for name in stated(summary, EXPONENTS)
    ]
    head = [
        ("quantity", f"fitted as {short_words(compared(summary))}^b"),
        ("kind", "kind of line"),
        *((setting(by, value), "exponent b with 95 % interval") for value in values),
    ]
    return Table(head, rows, keys=1)


def with_note(fit: Exponent) -> str:
    return f"{fit} ({fit.note})" if fit.fitted and fit.note else str(fit)


def flag_list(summary: pd.DataFrame) -> list[tuple[str, int, str]]:
    """Each flag with the number of pairs that carry it and where: by mass, from heavy to light, the n.

    >>> import pandas as pd
    >>> flag_list(pd.DataFrame({"n": [6, 12, 6], "mass": [1.0, 1.0, 0.1], "flags": ["ξ = 0", "ξ = 0", ""]}))
    [('ξ = 0', 2, 'mass 1: n = 6, 12')]
    """
    if "flags" not in summary.columns:
        return []
    single = summary.assign(flag=summary["flags"].fillna("").str.split("; ")).explode("flag")
    single = single[single["flag"].str.strip() != ""]
    found = []
    for flag, rows in single.groupby("flag", sort=True):
        by_mass = sorted(rows.groupby("mass")["n"], reverse=True, key=lambda group: group[0])
        places = [f"mass {mass:g}: n = {', '.join(map(str, sorted(set(ns))))}" for mass, ns in by_mass]
        found.append((str(flag), len(rows), "; ".join(places)))
    return found


def plain_table(caption: str, frame: pd.DataFrame) -> Table:
    """Any frame as rows of text, numbers to four digits; columns of words name the row.

    >>> import pandas as pd
    >>> plain_table("", pd.DataFrame({"optimizer": ["adam"], "n": [6], "sup": [0.123456]})).rows
    [['adam', '6', '0.1235']]
    """
    words = [name for name in frame.columns if frame[name].dtype.kind not in "iuf"]
    frame = frame[[*words, *(name for name in frame.columns if name not in words)]]

    def cell(value) -> str:
        if isinstance(value, float | np.floating):
            return number(value, digits=4)
        return re.sub(r"(?<![\w.])-(?=\d)", "−", str(value))

    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return Table([heading(str(name)) for name in frame.columns], rows, max(len(words), 1), caption)


def heading(name: str) -> tuple[str, str]:
    """A column in short and in words; "x ±" is the half width of x's interval.

    >>> heading("measured_heldout"), heading("gap ±")[0], heading("own_column")
    (('held-out', 'measured at held-out points'), 'gap ±', ('own column', 'own column'))
    """
    if name.endswith(" ±"):
        short, long = heading(name.removesuffix(" ±"))
        return f"{short} ±", f"half width of the 95 % interval: {long}"
    return HEADINGS.get(name) or MORE_HEADINGS.get(name) or (short_words(name), short_words(name))
