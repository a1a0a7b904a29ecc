"""What a certificate is made of: its rungs, each with value, kind, assumptions, status and cost."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

STATEMENT = "the paper's statement"
BOUND = "bound under assumptions"
ENCLOSURE = "a-posteriori enclosure"
ESTIMATE = "estimate"
THEORY_FREE = "triangle inequality"
KINDS = (STATEMENT, BOUND, ENCLOSURE, ESTIMATE, THEORY_FREE)
APPLIES, UNDECIDED, NOT_APPLICABLE = "applies", "undecided", "not applicable"
FLOW = ("positive rate", "no kernel drift", "gradient flow", "squared loss", "C¹ activations")  # what T0 to T3 rest on
ALWAYS = ("none: holds for every model, loss, optimizer and step; needs the trained twin",)


@dataclass(frozen=True)
class Cost:
    """Seconds of wall time, and the largest number of bytes held for it at a time."""

    seconds: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True)
class Rung:
    """One line of the ladder, and what it is worth.

    ``value`` bounds ``quantity`` of the divergence, whose largest measured value is ``measured``; ``ratio`` is value/measured.
    Where an assumption is violated, ``status`` is "not applicable", ``reason`` names it, and ``value`` is what the formula
    gives all the same (nan where it gives nothing): not a bound. ``series`` holds the value at every recorded time.
    """

    name: str
    quantity: str  # "l2": ‖e‖; "sup": max_i ‖e_i‖; "others", "replaced": the same over some samples
    value: float
    measured: float
    kind: str
    assumptions: tuple[str, ...]
    formula: str
    status: str = APPLIES
    reason: str = ""
    cost: Cost = Cost()
    series: Tensor | None = None

    @property
    def ratio(self) -> float:
        """value/measured; 1 where both are 0."""
        if self.measured == 0:
            return 1.0 if self.value == 0 else math.inf
        return self.value / self.measured

    @property
    def applies(self) -> bool:
        """True unless an assumption is violated or undecided."""
        return self.status == APPLIES


@dataclass(frozen=True)
class Certificate:
    """What two recorded runs say of their divergence; made by :func:`stability.certify`.

    ``rungs`` {name: :class:`Rung`}; ``measured`` suprema over ``times`` (sup, l2, replaced, others, heldout, final_…);
    ``errors`` e [times, N, p] on the inputs of S; ``replaced`` the rows that differ; ``closed_loop`` what A_t was taken to be,
    a function of the S run alone (``matrices()`` gives it again); ``notes`` what a reader should know.
    """

    rungs: dict[str, Rung]
    measured: dict[str, float]
    errors: Tensor
    times: tuple[int, ...]
    replaced: tuple[int, ...]
    closed_loop: object
    exact: bool
    description: tuple[str, ...]
    notes: tuple[str, ...] = ()
    cost: Cost = Cost()
    verdicts: tuple[dict, ...] = field(default=())

    def __getitem__(self, name: str) -> Rung:
        return self.rungs[name]

    @property
    def per_sample(self) -> Tensor:
        """‖e_i‖ at every recorded time, [times, N]."""
        return self.errors.norm(dim=-1)

    def to_frame(self) -> "pd.DataFrame":
        """The rungs as a pandas DataFrame, in the order of the ladder."""
        import pandas as pd

        rows = [
            {
                "name": r.name, "quantity": r.quantity, "value": r.value, "measured": r.measured, "ratio": r.ratio,
                "status": r.status, "reason": r.reason, "kind": r.kind, "assumptions": "; ".join(r.assumptions),
                "formula": r.formula, "seconds": r.cost.seconds, "nbytes": r.cost.nbytes,
            }
            for r in self.rungs.values()
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("name")

    def __str__(self) -> str:
        lines = [f"{'':10}{'value':>12}{'× measured':>12}  of       kind"]
        for r in self.rungs.values():
            shown = f"{r.value:12.4g}{r.ratio:12.3g}" if r.applies else f"{'n/a':>12}{f'({r.value:.3g})':>12}"
            lines.append(f"{r.name:10}{shown}  {r.quantity:8} {r.kind}" + (f": {r.reason}" if r.reason else ""))
        return "\n".join([*lines, *self.description, *self.notes])


def worst(verdicts: list[dict], names: tuple[str, ...] = FLOW) -> tuple[str, str]:
    """The status that verdicts on assumptions leave, and why: one violated is "not applicable", one open "undecided".

    >>> worst([{"assumption": "positive rate", "verdict": "violated", "value": 0.0, "reason": "rows 0 and 1 are equal"}])
    ('not applicable', 'positive rate: rows 0 and 1 are equal (0)')
    """
    for verdict, status in (("violated", NOT_APPLICABLE), ("undecided", UNDECIDED)):
        failing = {v["assumption"]: v for v in verdicts if v["assumption"] in names and v["verdict"] == verdict}
        if failing:
            return status, "; ".join(f"{name}: {v['reason']} ({v['value']:.2g})" for name, v in failing.items())
    return APPLIES, ""
