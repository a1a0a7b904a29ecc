"""The finding in words: sentences chosen by the numbers, flattering or not. Each claim is guarded by its comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.confinement import change_with_mass, equal_loss
from studies.exponents import Exponent, fit_exponent, signed
from studies.figure_style import number
from studies.findings import SLACK, Range, broken, enclosure, informative, null_twin, paper_bound, ratio, spread_of

if TYPE_CHECKING:
    import pandas as pd

    from studies.frames import Frames

UNCHANGED = 1.25
"""A median ratio within this factor of 1 is called unchanged, whatever its scatter."""
HALVED = 0.5
"""A median ratio at or below this is called confined: a fall of a few per cent confines nothing."""


def paragraph(frames: Frames, draws: int = 2000) -> str:
    """The opening paragraph of the report for the frames of one width: plain sentences, true of these numbers."""
    summary = frames.summary
    sentences = [
        what_was_seen(summary),
        *about_paper_bound(summary),
        *about_exponents(summary, draws),
        *about_ladder(summary),
        *about_enclosure(summary),
        *about_drift(summary),
        *about_confinement(frames),
        *about_held_out(summary),
        *about_null(summary),
    ]
    return " ".join(sentences)


def span(values: Range) -> str:
    """
    >>> span(Range(1.0, 2.0, 3.0, 5)), span(Range(2.0, 2.0, 2.0, 1))
    ('1 to 3 (median 2)', '2')
    """
    low, median, high = (number(value) for value in (values.low, values.median, values.high))
    return low if low == high else f"{low} to {high} (median {median})"


def listed(values, joint: str = "and") -> str:
    """
    >>> listed([6, 12, 24]), listed([6])
    ('6, 12 and 24', '6')
    """
    words = [value if isinstance(value, str) else number(float(value)) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"


def plural(count: int, word: str) -> str:
    """
    >>> plural(1, "pair"), plural(3, "mass")
    ('1 pair', '3 masses')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}{'es' if word.endswith('s') else 's'}"


def of_all(count: int, total: int) -> str:
    """
    >>> of_all(0, 9), of_all(3, 9), of_all(9, 9), of_all(1, 1)
    ('none of the 9 pairs', '3 of the 9 pairs', 'all 9 pairs', 'the one pair')
    """
    if total == 1:
        return "the one pair" if count else "none of the pairs"
    return f"all {total} pairs" if count == total else f"{count or 'none'} of the {total} pairs"


def what_was_seen(summary: pd.DataFrame) -> str:
    masses, ns = sorted(summary["mass"].unique(), reverse=True), sorted(summary["n"].unique())
    widths, steps = sorted(summary["width"].unique()), sorted(summary["steps"].unique())
    many = len(summary) > 1
    return (
        f"In {plural(len(summary), 'pair')} of networks that {'differ' if many else 'differs'} in one training "
        f"sample (n = {listed(ns)}; mass {listed(masses)}; {plural(summary['seed'].nunique(), 'seed')}; width "
        f"{listed(widths)}; {listed(steps)} steps) the outputs on the worst training sample moved apart by "
        f"{span(spread_of(summary['measured_sup']))}, "
        "where 1 is the distance from 0 to a target."
    )


def about_paper_bound(summary: pd.DataFrame) -> list[str]:
    total, bound = len(summary), paper_bound(summary)
    if not bound.over_floor:
        return [
            f"The paper's bound T0 makes no statement: ξ cannot be told from 0 in "
            f"{of_all(bound.not_applicable, total)}."
        ]
    text = "The paper's bound T0 is "
    if bound.over_measured:
        text += f"{span(bound.over_measured)} times that, and "
    text += f"{span(bound.over_floor)} times the level 2L√n that the triangle inequality gives without any theory"
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


def about_exponents(summary: pd.DataFrame, draws: int) -> list[str]:
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
    sentences = [f"Exponents of n of T0 and of the measurement, with 95 % intervals: {'; '.join(stated)}."]
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


def worded(fit: Exponent) -> str:
    return str(fit) if fit.fitted else "no exponent (fewer than three n without 0 or infinite values)"


def edge(fit: Exponent, name: str) -> float:
    """End of the interval, or the slope itself where there is no interval."""
    return getattr(fit, name) if np.isfinite(getattr(fit, name)) else fit.slope


def mass_words(some: list[float], every: list[float]) -> str:
    """
    >>> mass_words([1.0, 0.1], [1.0, 0.1]), mass_words([0.1], [1.0, 0.1])
    ('every mass', 'mass 0.1')
    """
    return "every mass" if len(some) == len(every) > 1 else f"mass {listed(some)}"


def about_ladder(summary: pd.DataFrame) -> list[str]:
    total = len(summary)
    last = spread_of(ratio(summary, "T3", "measured_l2"))
    sentences = (
        [f"The sharpest bound under assumptions, T3, is {span(last)} times the stacked divergence ‖e‖."] if last else []
    )
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
    found = enclosure(summary)
    if not found.over_path:
        return []
    total = found.over_path.count
    head = (
        f"The a-posteriori enclosure T5 is {span(found.over_measured)} times the divergence "
        f"and {span(found.over_path)} times the theory-free path length"
    )
    if found.above == 0:
        return [f"{head}: at or below it in {of_all(total, total)}, so contraction explains part of what was seen."]
    if found.above == total:
        return [
            f"{head}: above it in {of_all(total, total)}, so here contraction explains nothing that the path length "
            f"does not."
        ]
    return [
        f"{head}: above it in {of_all(found.above, total)}, where contraction explains nothing that the path length "
        f"does not."
    ]


def about_drift(summary: pd.DataFrame) -> list[str]:
    share = spread_of(summary["drift_share"])
    if not share:
        return []
    verdict = (
        "so the term that the paper's proof drops is not small"
        if share.median > 0.1
        else "small in the median, as the paper's proof takes for granted"
    )
    return [f"The kernel drift is {span(share)} of the disturbance d, {verdict}."]


def about_confinement(frames: Frames) -> list[str]:
    """Does small mass confine the influence? Pair by pair, at the largest n that both masses share, in both
    readings."""
    changes = change_with_mass(frames.summary)
    if changes.empty:
        return [
            "With one mass the study does not say whether a small mass confines the influence of the replaced sample."
        ]
    n = int(changes["n"].max())
    heavy, light = changes["heavy"].iloc[0], changes["light"].iloc[0]
    at_n = changes[changes["n"] == n]
    text = (
        "Does a small mass confine the influence of the replaced sample? "
        f"From mass {number(heavy)} to {number(light)} at n = {n} the divergence (median over the pairs) "
        f"{changed(at_n)}"
    )
    level, at_level = equal_loss(frames.trajectories)
    at_loss = change_with_mass(at_level) if len(at_level) else changes.iloc[:0]
    at_loss = at_loss[at_loss["n"] == n]
    if len(at_loss):
        text += f"; at equal training loss ({number(level)}) it {changed(at_loss)}"
    sentences = [text + ".", verdict(at_n, at_loss)]
    others = changes[changes["place"] == "measured_others"].set_index("n")["ratio"]
    if len(others) > 1:
        first, last = others.iloc[0], others.iloc[-1]
        trend = (
            "fades as n grows" if last > first * UNCHANGED and first < 1
            else "strengthens as n grows" if last * UNCHANGED < first
            else "shows no clear trend in n"
        )  # fmt: skip
        sentences.append(
            f"At the other training samples the factor is {number(first)} at n = {others.index[0]}: the effect "
            f"there {trend}."
        )
    return sentences


def changed(rows: pd.DataFrame) -> str:
    """'is multiplied by 0.9 at the replaced sample, …', in the order replaced, others, held-out."""
    ratios = rows.set_index("place")["ratio"]
    where = {
        "measured_replaced": "the replaced sample",
        "measured_others": "the other training samples",
        "measured_heldout": "held-out points",
    }
    return "is multiplied by " + listed(
        [f"{number(ratios[place])} at {name}" for place, name in where.items() if place in ratios]
    )


def verdict(over_training: pd.DataFrame, at_loss: pd.DataFrame) -> str:
    """Both readings in one sentence where they agree, apart where they do not."""
    first = confined(over_training)
    if at_loss.empty or (second := confined(at_loss)) == first:
        return f"So {first}."
    return f"So, over training, {first}; at equal loss {second}."


def confined(rows: pd.DataFrame) -> str:
    """A clause for one n. 'Confined' needs the divergence halved at the other training samples AND at held-out points.

    >>> import pandas as pd
    >>> confined(pd.DataFrame({"place": ["measured_others", "measured_heldout"], "ratio": [0.2, 1.8]}))
    'it is confined on the training set only: on held-out points the divergence is larger'
    """
    ratios = rows.set_index("place")["ratio"]
    if not {"measured_others", "measured_heldout"} <= set(ratios.index):
        return "the study cannot say whether it is confined"
    others, heldout = ratios["measured_others"], ratios["measured_heldout"]
    if max(others, heldout) <= HALVED:
        return "it is confined, on held-out points too"
    if others <= HALVED:
        return f"it is confined on the training set only: on held-out points the divergence is {compared(heldout)}"
    return (
        f"it is not confined: at the other training samples the divergence is {compared(others)}, "
        f"on held-out points {compared(heldout)}"
    )


def compared(factor: float) -> str:
    """
    >>> [compared(factor) for factor in (0.4, 0.7, 1.1, 2.0)]
    ['less than half', 'lower, by less than half', 'the same within a factor 1.25', 'larger']
    """
    if factor <= HALVED:
        return "less than half"
    if factor < 1 / UNCHANGED:
        return "lower, by less than half"
    return "larger" if factor > UNCHANGED else f"the same within a factor {UNCHANGED:g}"


def about_held_out(summary: pd.DataFrame) -> list[str]:
    share = spread_of(ratio(summary, "measured_heldout", "measured_replaced"))
    return [f"The worst held-out point moves {span(share)} times as far as the replaced sample."] if share else []


def about_null(summary: pd.DataFrame) -> list[str]:
    largest, hidden = null_twin(summary)
    if not np.isfinite(largest):
        return []
    if not hidden:
        return [f"Rounding alone (null twins) accounts for at most {number(largest)}, below every measured divergence."]
    return [
        f"Rounding alone (null twins) reaches {number(largest)}; in {of_all(hidden, len(summary))} the divergence "
        f"is not above its null twin's and is no measurement."
    ]
