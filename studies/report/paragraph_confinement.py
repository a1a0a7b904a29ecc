"""Whether a small mass confines the influence of the replaced sample, in words: pair by pair, in two readings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from studies.figures.wording import listed, plural
from studies.findings.confinement import change_with_mass, equal_loss
from studies.findings.written import number

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

UNCHANGED = 1.25
"""A median ratio within this factor of 1 is called unchanged, whatever its scatter."""
HALVED = 0.5
"""A median ratio at or below this is called confined: a fall of a few per cent confines nothing."""
CLAUSE = {
    "everywhere": "confines the influence, on held-out points too",
    "training": "confines the influence on the training set only",
    "nowhere": "does not confine the influence",
    "unknown": "cannot be said to confine the influence",
}


@dataclass(frozen=True)
class Readings:
    """The change with mass at the largest n that the smallest and the largest mass share, in both readings."""

    changes: pd.DataFrame  # over training, every n
    at_n: pd.DataFrame
    at_loss: pd.DataFrame  # no rows without trajectories
    level: float
    starts_below: int

    @property
    def n(self) -> int:
        return int(self.changes["n"].max())

    @property
    def masses(self) -> tuple[float, float]:
        return float(self.changes["heavy"].iloc[0]), float(self.changes["light"].iloc[0])


def readings(frames: Frames) -> Readings | None:
    """None with one mass: then there is nothing to compare."""
    changes = change_with_mass(frames.summary)
    if changes.empty:
        return None
    n = changes["n"].max()
    level, at_level = equal_loss(frames.trajectories)
    at_loss = change_with_mass(at_level) if len(at_level) else changes.iloc[:0]
    below = int(at_level["starts_below"].sum()) if len(at_level) else 0
    return Readings(changes, changes[changes["n"] == n], at_loss[at_loss["n"] == n], level, below)


def confinement_clause(frames: Frames) -> str:
    """One sentence; '' with one mass."""
    found = readings(frames)
    if found is None:
        return ""
    heavy, light = map(number, found.masses)
    over, at_loss = extent(found.at_n), extent(found.at_loss)
    head = f"At n = {found.n}, mass {light} instead of {heavy}"
    if found.at_loss.empty or at_loss == over:
        return f"{head} {CLAUSE[over]}."
    return f"{head} {CLAUSE[over]} over training; at equal training loss it {CLAUSE[at_loss]}."


def about_confinement(frames: Frames) -> list[str]:
    """Does small mass confine the influence? Factors at each place, the verdict they allow, and the trend in n."""
    found = readings(frames)
    if found is None:
        return [
            "With one mass the study does not say whether a small mass confines the influence of the replaced sample."
        ]
    heavy, light = map(number, found.masses)
    text = f"From mass {heavy} to {light} at n = {found.n} the divergence (median over the pairs) {changed(found.at_n)}"
    if len(found.at_loss):
        text += (
            f"; at equal training loss ({number(found.level)}, interpolated between steps in log loss) "
            f"it {changed(found.at_loss)}"
        )
    sentences = [text + ".", verdict(found.at_n, found.at_loss)]
    if found.starts_below:
        sentences.append(f"In {plural(found.starts_below, 'pair')} the run starts at or below that loss.")
    others = found.changes[found.changes["place"] == "measured_others"].set_index("n")["ratio"]
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


def extent(rows: pd.DataFrame) -> str:
    """How far the influence is confined, for the rows of one n: a key of CLAUSE.

    >>> import pandas as pd
    >>> places = ["measured_others", "measured_heldout"]
    >>> [extent(pd.DataFrame({"place": places, "ratio": r})) for r in ([0.2, 0.2], [0.2, 1.8], [0.9, 0.2])]
    ['everywhere', 'training', 'nowhere']
    """
    ratios = rows.set_index("place")["ratio"]
    if not {"measured_others", "measured_heldout"} <= set(ratios.index):
        return "unknown"
    if ratios["measured_others"] > HALVED:
        return "nowhere"
    return "everywhere" if ratios["measured_heldout"] <= HALVED else "training"


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
    how_far = extent(rows)
    if how_far == "unknown":
        return "the study cannot say whether it is confined"
    if how_far == "everywhere":
        return "it is confined, on held-out points too"
    ratios = rows.set_index("place")["ratio"]
    others, heldout = compared(ratios["measured_others"]), compared(ratios["measured_heldout"])
    if how_far == "training":
        return f"it is confined on the training set only: on held-out points the divergence is {heldout}"
    return f"it is not confined: at the other training samples the divergence is {others}, on held-out points {heldout}"


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
