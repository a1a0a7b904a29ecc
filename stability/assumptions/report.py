"""``AssumptionReport``: all verdicts on one run, as a table, a frame, JSON, or an exception."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stability.assumptions.catalogue import KEY_OF, known_key, known_keys
from stability.assumptions.failures import AssumptionViolated
from stability.assumptions.verdict import VERDICTS, Assumption, worst_first

if TYPE_CHECKING:
    import pandas as pd

STATUS = {"holds": 0, "violated": 1, "undecided": 3}
"""Exit status of ``stability check`` (2 is a user's error)."""

_COLUMNS = ("assumption", "verdict", "value", "threshold", "margin", "where", "equations")


@dataclass(frozen=True)
class AssumptionReport:
    """Verdicts on the assumptions of theorem 3 for one run and its twins. Iterating gives them one by one.

    ``context``: what was run (n, outputs, parameters, steps, lr, mass, …, dtype), plain values.

    >>> from stability.assumptions.verdicts import positive_rate, no_kernel_drift
    >>> report = AssumptionReport((positive_rate(0.1, "", step=3), no_kernel_drift(0.5, 1.0, 0)))
    >>> report.verdict, report["no_kernel_drift"].value, [v.assumption for v in report.violated]
    ('violated', 0.5, ['no kernel drift'])
    >>> report.raise_if_violated(allow=["no_kernel_drift"])["positive_rate"].verdict
    'holds'
    >>> print(report)
    2 assumptions: 1 hold, 1 violated
    assumption       verdict   value  threshold  margin  where             equations
    positive rate    holds     0.1    0          0.1     step 3            P5, P14
    no kernel drift  violated  0.5    1e-06      -0.5    twin of sample 0  P8
    no kernel drift is violated: the proof drops (H'_S − H)r'
    """

    verdicts: tuple[Assumption, ...]
    context: dict = field(default_factory=dict)

    def __iter__(self) -> Iterator[Assumption]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, key: str) -> Assumption:
        """The worst verdict on one assumption (there is one per twin), by key or name. ValueError for unknown names,
        KeyError for one that was not asked for."""
        key = known_key(key)
        found = [v for v in self.verdicts if KEY_OF[v.assumption] == key]
        if not found:
            raise KeyError(f"{key} was not checked")
        return min(found, key=worst_first)

    @property
    def keys(self) -> tuple[str, ...]:
        """The assumptions that were checked, each once."""
        return tuple(dict.fromkeys(KEY_OF[v.assumption] for v in self.verdicts))

    @property
    def verdict(self) -> str:
        """The worst of all: "violated" before "undecided" before "holds"."""
        return min((v.verdict for v in self.verdicts), key=VERDICTS.index, default="holds")

    @property
    def violated(self) -> tuple[Assumption, ...]:
        return tuple(v for v in self.verdicts if v.verdict == "violated")

    @property
    def undecided(self) -> tuple[Assumption, ...]:
        return tuple(v for v in self.verdicts if v.verdict == "undecided")

    @property
    def status(self) -> int:
        """0 all hold, 1 something is violated, 3 nothing is violated but something undecided."""
        return STATUS[self.verdict]

    def without(self, keys: Iterable[str]) -> "AssumptionReport":
        """The same without some assumptions."""
        keys = known_keys(keys, "keys")
        return AssumptionReport(tuple(v for v in self if KEY_OF[v.assumption] not in keys), self.context)

    def raise_if_violated(self, *, allow: Iterable[str] = (), undecided: bool = False) -> "AssumptionReport":
        """Itself, or :class:`AssumptionViolated` (an AssertionError) that names everything violated.

        ``allow``: assumptions known to fail; with ``undecided`` those that could not be decided raise too.
        """
        asked = self.without(allow)
        failed = [*asked.violated, *(asked.undecided if undecided else ())]
        if failed:
            raise AssumptionViolated("\n".join(in_words(v) for v in sorted(failed, key=worst_first)))
        return self

    def to_frame(self) -> "pd.DataFrame":
        """One row per verdict: ``key`` and the fields of :class:`Assumption`."""
        import pandas as pd

        return pd.DataFrame([{"key": KEY_OF[v.assumption], **v.to_dict()} for v in self.verdicts])

    def to_dict(self) -> dict:
        rows = [{"key": KEY_OF[v.assumption], **v.to_dict()} for v in self.verdicts]
        return {"verdict": self.verdict, "context": self.context, "assumptions": rows}

    def to_json(self, **options) -> str:
        """JSON of :meth:`to_dict`; numbers that JSON has no word for are "inf", "-inf" and "nan"."""
        return json.dumps(plain(self.to_dict()), ensure_ascii=False, **options)

    def __str__(self) -> str:
        counts = {verdict: sum(v.verdict == verdict for v in self.verdicts) for verdict in reversed(VERDICTS)}
        said = ", ".join(
            f"{count} {'hold' if verdict == 'holds' else verdict}" for verdict, count in counts.items() if count
        )
        about = "; ".join(f"{name} {_number(value)}" for name, value in self.context.items())
        several = f", {len(self)} verdicts" if len(self) > len(self.keys) else ""
        head = f"{len(self.keys)} assumptions{several}: {said}" + (f" ({about})" if about else "")
        rows = [_COLUMNS, *(_row(v) for v in self.verdicts)]
        widths = [max(len(row[j]) for row in rows) for j in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        worst = {v.assumption: v for v in sorted(self.verdicts, key=worst_first, reverse=True) if v.verdict != "holds"}
        reasons = [f"{name} is {v.verdict}: {v.reason}" for name, v in worst.items()]
        return "\n".join([head, *lines, *reasons])


def in_words(found: Assumption) -> str:
    """One verdict as a sentence with everything in it: quantity, value, threshold, margin, reason, place, equations.

    >>> in_words(Assumption("one metric", "gap", 0.5, 0.1, -0.4, "violated", "G ≠ G'", "P8", step=0))
    "one metric (P8) is violated: gap = 0.5, threshold 0.1, margin -0.4 (G ≠ G'), at step 0"
    """
    place = f", at {found.place}" if found.place else ""
    equation = "" if found.equation == "–" else f" ({found.equation})"
    return (
        f"{found.assumption}{equation} is {found.verdict}: {found.quantity} = {_number(found.value)}, threshold "
        f"{_number(found.threshold)}, margin {_number(found.margin)} ({found.reason}){place}"
    )


def plain(value):
    """Nested dicts, lists and numbers as JSON takes them."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _row(v: Assumption) -> tuple[str, ...]:
    numbers = (_number(v.value), _number(v.threshold), _number(v.margin))
    return (v.assumption, v.verdict, *numbers, v.place, "" if v.equation == "–" else v.equation)


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
