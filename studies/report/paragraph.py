"""The finding in words: sentences chosen by the numbers, flattering or not. Each claim is guarded by its comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figures.wording import few, listed, mass_words, of_all, pairs, plural, span
from studies.findings.applicable import another_loss, scale_words
from studies.findings.exponents import Exponent, compared, fit_exponent, signed
from studies.findings.numbers import (
    MARGIN,
    SLACK,
    broken,
    enclosure,
    informative,
    null_twin,
    paper_bound,
    ratio,
    spread_of,
)
from studies.findings.written import number
from studies.report.paragraph_confinement import about_confinement, confinement_clause

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames


def headline(frames: Frames) -> str:
    """What was run, how far the twins moved apart, and what each kind of bound says of it: one short paragraph.

    `frames` holds one width. True of these numbers, whatever they are; `details` has the rest.
    """
    summary = frames.summary
    sentences = [
        what_was_seen(summary),
        *paper_in_short(summary),
        sharpest_in_short(summary),
        enclosure_in_short(summary),
        drift_in_short(summary),
        confinement_clause(frames),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def details(frames: Frames, draws: int = 2000) -> list[tuple[str, str]]:
    """What the headline rests on: (lead, sentences), in the order of a reader's questions."""
    summary = frames.summary
    parts = {
        "The paper's bound": about_paper_bound(summary),
        f"Exponents of {'the mass' if compared(summary) == 'mass' else 'n'}": about_exponents(summary, draws),
        "Bounds under assumptions": about_ladder(summary),
        "Enclosures": about_enclosure(summary),
        "Kernel drift": about_drift(summary),
        "Confinement": about_confinement(frames),
        "Held-out points": about_held_out(summary),
        "Rounding": about_null(summary),
    }
    return [(lead, " ".join(sentences)) for lead, sentences in parts.items() if sentences]


def what_was_seen(summary: pd.DataFrame) -> str:
    one = len(summary) == 1
    return (
        f"{plural(len(summary), 'pair')} of networks that {'differs' if one else 'differ'} in one training sample "
        f"(n = {few(summary['n'])}, mass {few(summary['mass'])}, {plural(summary['seed'].nunique(), 'seed')}) "
        f"moved apart by {span(spread_of(summary['measured_sup']))} on the worst training sample"
        + (", in units of the outputs." if another_loss(summary) else f"; {scale_words(summary)}.")
    )


def paper_in_short(summary: pd.DataFrame) -> list[str]:
    total, bound = len(summary), paper_bound(summary)
    if another_loss(summary):
        return ["The paper's bound T0, and T1 to T3, do not apply: they need ½‖y − a‖².", *metric_rungs(summary)]
    if not bound.over_floor:
        return [
            "The paper's bound T0 makes no statement: "
            f"ξ cannot be told from 0 in {of_all(bound.not_applicable, total)}."
        ]
    text = "The paper's bound T0 is "
    if bound.over_measured:
        text += f"{number(bound.over_measured.median)} times that in the median and "
    text += f"at least {number(bound.over_floor.low)} times the trivial level 2L√n"
    # T0 ≥ 2L√n is a theorem (theory, §3): below it the constants are wrong, and the sentence says so.
    if bound.over_floor.low >= 1 - SLACK:
        text += ": it says nothing about these runs."
    else:
        text += ", which it cannot be below: the constants of this study need checking."
    sentences = [text]
    if bound.not_applicable:
        sentences.append(f"In {of_all(bound.not_applicable, total)} ξ cannot be told from 0 and T0 is infinite.")
    if bound.broken:
        sentences.append(f"The measurement exceeds T0 in {of_all(bound.broken, total)}.")
    return sentences


def metric_rungs(summary: pd.DataFrame) -> list[str]:
    """What stands in their place under another loss: T3H in the metric H⁻¹, and where T2H has a rate above 0."""
    over, total = spread_of(ratio(summary, "T3H", "measured_H")), len(summary)
    applies, worst = int(summary["T2H"].notna().sum()), float(summary["rate_H"].min())
    sentences = []
    if over:
        sentences.append(
            f"T3H, a bound in the metric H⁻¹ on the flow without drift, is {span(over)} times what it bounds."
        )
    if applies < total:
        sentences.append(
            f"T2H is applicable in {of_all(applies, total)}: the smallest rate is {number(worst)}, and it needs one above 0."
        )
    return sentences


def sharpest_in_short(summary: pd.DataFrame) -> str:
    over = spread_of(ratio(summary, "T3", "measured_l2"))
    if not over:
        return ""
    return (
        f"The sharpest bound under assumptions, T3, is {number(over.median)} times ‖e‖ in the median, "
        f"below 2L√n in {pairs(informative(summary)['T3'], len(summary))}."
    )


def enclosure_in_short(summary: pd.DataFrame) -> str:
    found = enclosure(summary)
    if not found.over_path:
        return ""
    total = found.over_path.count
    where = pairs(found.below, total)
    text = f"The a-posteriori enclosure T5 is clearly below the theory-free path length in {where}: "
    if found.below == total:
        return text + "contraction explains part of what was seen."
    return text + ("elsewhere" if found.below else "here") + " contraction explains nothing beyond it."


def drift_in_short(summary: pd.DataFrame) -> str:
    share = spread_of(summary["drift_share"])
    return f"Kernel drift, which the proof drops, is {number(share.median)} of the disturbance." if share else ""


def about_paper_bound(summary: pd.DataFrame) -> list[str]:
    bound = paper_bound(summary)
    if not bound.over_measured:
        return []
    return [
        f"T0 is {span(bound.over_measured)} times the divergence of the worst sample and {span(bound.over_floor)} "
        "times 2L√n, which the triangle inequality gives without any theory."
    ]


def about_exponents(summary: pd.DataFrame, draws: int) -> list[str]:
    if another_loss(summary):
        return []  # of T0; the figure has those of what is stated
    if compared(summary) == "mass":
        return about_exponents_of_mass(summary, draws)
    masses = sorted((float(mass) for mass in summary["mass"].unique()), reverse=True)
    fits = {
        (mass, column): fit_exponent(summary[summary["mass"] == mass], column, draws=draws)
        for mass in masses
        for column in ("T0", "measured_sup", "xi")
    }
    if not any(fit.fitted for fit in fits.values()):
        return ["No exponent of n is stated: that needs at least three n."]
    stated = [
        f"{worded(fits[mass, 'T0'])} and {worded(fits[mass, 'measured_sup'])} at mass {number(mass)}" for mass in masses
    ]
    sentences = [
        f"Of T0 and of the measurement, with 95 % intervals over {plural(summary['seed'].nunique(), 'seed')}: "
        f"{'; '.join(stated)}."
    ]
    grows = [mass for mass in masses if fits[mass, "T0"].fitted and edge(fits[mass, "T0"], "low") > 0]
    falls = [
        mass for mass in masses if fits[mass, "measured_sup"].fitted and edge(fits[mass, "measured_sup"], "high") < 0
    ]
    if grows:
        rates = [signed(fits[mass, "xi"].slope) for mass in grows if fits[mass, "xi"].fitted]
        why = f" (exponent of ξ: {listed(rates)})" if rates else ""
        sentences.append(f"T0 grows with n at {mass_words(grows, masses)} in spite of its 1/√n{why}.")
    if falls:
        sentences.append(f"The measured divergence falls with n at {mass_words(falls, masses)}.")
    else:
        sentences.append("At no mass does the measured divergence fall with n beyond the interval.")
    return sentences


def about_exponents_of_mass(summary: pd.DataFrame, draws: int) -> list[str]:
    """Of a study of one n: T0 has a 1/μ of its own, and ξ moves with the mass too."""
    fits = {
        column: fit_exponent(summary, column, along="mass", draws=draws)
        for column in ("T0", "T3", "measured_sup", "xi")
    }
    if not any(fit.fitted for fit in fits.values()):
        return ["No exponent of the mass is stated: that needs at least three masses."]
    names = {"T0": "T0", "T3": "T3", "measured_sup": "the measurement", "xi": "ξ"}
    stated = ", ".join(f"of {names[name]} {worded(fit, 'masses')}" for name, fit in fits.items())
    return [
        f"With 95 % intervals over {plural(summary['seed'].nunique(), 'seed')}: {stated}. T0 carries 1/mass and 1/ξ: where ξ "
        "falls as the mass grows, the bound need not."
    ]


def worded(fit: Exponent, values: str = "n") -> str:
    return str(fit) if fit.fitted else f"no exponent (fewer than three {values} without 0 or infinite values)"


def edge(fit: Exponent, name: str) -> float:
    """End of the interval, or the slope itself where there is no interval."""
    return getattr(fit, name) if np.isfinite(getattr(fit, name)) else fit.slope


def about_ladder(summary: pd.DataFrame) -> list[str]:
    if another_loss(summary):
        return metric_rungs(summary)
    total = len(summary)
    last = spread_of(ratio(summary, "T3", "measured_l2"))
    sentences = [f"T3 is {span(last)} times the stacked divergence ‖e‖."] if last else []
    useful = {name: count for name, count in informative(summary).items() if count}
    if useful:
        sentences.append(
            "Below the trivial level 2L√n: "
            + ", ".join(f"{name} in {of_all(count, total)}" for name, count in useful.items())
            + "."
        )
    else:
        sentences.append("No bound under assumptions is below the trivial level 2L√n in any pair.")
    failed = {name: count for name in ("T1", "T1c", "T2", "T3") if (count := broken(summary, name))}
    if failed:
        sentences.append(
            "None of them covers kernel drift or the finite step, and it shows: the measurement exceeds "
            + ", ".join(f"{name} in {of_all(count, total)}" for name, count in failed.items())
            + "."
        )
    return sentences


def about_enclosure(summary: pd.DataFrame) -> list[str]:
    """T5 against the path length per sample in three classes, and T4 against that of the stack."""
    found = enclosure(summary)
    if not found.over_path:
        return []
    total, near = found.over_path.count, f"{100 * MARGIN:g} %"
    classes = [
        (found.below, f"below it by more than {near}", ", where contraction explains part of what was seen"),
        (found.within, f"within {near} of it", ""),
        (found.above, f"above it by more than {near}", ", where contraction explains nothing that the path does not"),
    ]
    counted = "; ".join(f"{where} in {of_all(count, total)}{what}" for count, where, what in classes if count)
    sentences = [
        f"T5 is {span(found.over_measured)} times the divergence of the worst sample "
        f"and {span(found.over_path)} times its theory-free path length: {counted}."
    ]
    if found.stacked:
        never = ", in no pair below it" if found.stacked.low >= 1 - SLACK else ""
        sentences.append(f"T4 is {span(found.stacked)} times the path length of ‖e‖{never}.")
    return sentences


def about_drift(summary: pd.DataFrame) -> list[str]:
    share = spread_of(summary["drift_share"])
    if not share:
        return []
    verdict = (
        "so the term that the paper's proof drops is not small"
        if share.median > 0.1
        else "small in the median, as the paper's proof takes for granted"
    )
    return [f"It is {span(share)} of the disturbance d, {verdict}."]


def about_held_out(summary: pd.DataFrame) -> list[str]:
    share = spread_of(ratio(summary, "measured_heldout", "measured_replaced"))
    if not share:
        return []
    return [
        f"The worst of them moves {span(share)} times as far as the replaced sample.",
        "No bound of the theory covers held-out points.",
    ]


def about_null(summary: pd.DataFrame) -> list[str]:
    largest, hidden = null_twin(summary)
    if not np.isfinite(largest):
        return []
    null = "Null twins (the same data, a start moved by one ulp) differ by"
    if not hidden:
        return [f"{null} at most {number(largest)}, below every measured divergence."]
    return [
        f"{null} up to {number(largest)}; in {of_all(hidden, len(summary))} the divergence is not above its null "
        "twin's and is no measurement."
    ]
