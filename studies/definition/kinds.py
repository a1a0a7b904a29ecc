"""What a kind of study is, and which there are. ``kind = "twins"`` in a study file names one.

A kind says what a point computes and which tables it writes; grid, overrides, engines, store, resuming and the report's
frame are the same for all. ``docs/studies.md`` shows one being added.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from studies.definition.imported import imported

if TYPE_CHECKING:
    import pandas as pd

    from studies.definition.config import Study
    from studies.definition.points import Point

# Name → where the Kind is, as "module:NAME". They are imported when a study asks for one.
KINDS = {
    "twins": "studies.kinds.twins:TWINS",
    "loops": "studies.kinds.loops:LOOPS",
    "movements": "studies.kinds.movements:MOVEMENTS",
    "diffusion": "studies.kinds.diffusion:DIFFUSION",
    "rlo": "studies.kinds.rlo:RLO",
    "prediction": "studies.kinds.prediction:PREDICTION",
}


@dataclass(frozen=True)
class TableSpec:
    """``key``: the columns that order its rows, after those of the point's axes. ``needed``: further ones it must have."""

    key: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A figure of a report: file name without ending, title, caption (what it shows, what to see), and how it is drawn."""

    name: str
    title: str
    caption: str
    make: Callable[[], Any]  # a matplotlib Figure


def no_check(study: "Study") -> None:
    """Nothing can be known before training."""


@dataclass(frozen=True)
class Kind:
    """One kind of study; plain functions, so that a module can hold them.

    config: the pydantic model of its study files, a subclass of :class:`studies.definition.config.Study`.
    tables: name → :class:`TableSpec` of what ``run_point`` returns; the first one is the main one, a row per result.
    run_point: (study, point) → {table: DataFrame}, the point's axes as first columns (``study.columns(point)``). Pure: the
        same study and point give the same bits, whichever engine runs it.
    work: (study, point) → about how long it takes, in any unit: orders the points, weighs the progress bar, and lets
        ``stability plan`` carry a calibration over.
    size: (study, point) → about how many bytes its largest arrays take together; for ``stability plan``.
    check: (study) → None; raises ValueError for what can be known before anything is trained.
    sections: (frames: ``studies.results.frames.Frames``) → the figures of the report. finding: (frames) → its opening
        paragraphs, in words and numbers.
    numbers: (frames) → its tables, (caption, frame) each.
    """

    name: str
    what: str
    config: "type[Study]"
    tables: Mapping[str, TableSpec]
    run_point: "Callable[[Study, Point], dict[str, pd.DataFrame]]"
    work: "Callable[[Study, Point], float]"
    size: "Callable[[Study, Point], float]" = field(default=lambda study, point: 0.0)
    check: "Callable[[Study], None]" = no_check
    sections: "Callable[[Any], Sequence[Section]]" = field(default=lambda frames: [])
    finding: "Callable[[Any], Sequence[str]]" = field(default=lambda frames: [])
    numbers: "Callable[[Any], Sequence[tuple[str, pd.DataFrame]]]" = field(default=lambda frames: [])


def kind_of(name: str) -> Kind:
    """The kind that a study file names: a shipped one, or the user's own as "package.module:NAME".

    Raises ValueError when there is none.

    >>> kind_of("twins").name
    'twins'
    """
    from studies.definition.config_text import nearest

    place = KINDS.get(name, name) if isinstance(name, str) else ""
    if ":" not in place:
        guess = nearest(name, KINDS) if isinstance(name, str) else None
        raise ValueError(
            f"kind = {name!r} should be one of {', '.join(KINDS)}, or your own as package.module:NAME"
            + (f", did you mean {guess}?" if guess else "")
        )
    found = imported(place, "kind")
    if not isinstance(found, Kind):
        raise ValueError(f"kind = {name!r} is a {type(found).__name__}; expected a studies.definition.kinds.Kind")
    return found
