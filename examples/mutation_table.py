"""The mutation tables of docs/assumptions.md: each assumption violated and caught, and just inside and passed.

python -m examples.mutation_table           prints the tables
python -m examples.mutation_table --write   puts them into docs/assumptions.md
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from stability.assumptions.controls import CONTROLS, Control, run_controls
from stability.assumptions.system_controls import SYSTEM_CONTROLS
from stability.assumptions.verdict import Assumption

PAGE = Path(__file__).resolve().parent.parent / "docs" / "assumptions.md"
HEAD = (
    "| assumption | what is varied | at | value | margin | | at | value | margin | threshold |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table(measured: Iterable[tuple[Control, Assumption, Assumption]]) -> str:
    """One row per control: the violating side, then the side just inside."""
    return "\n".join([HEAD, *(row(*found) for found in measured)])


def row(control: Control, caught: Assumption, passed: Assumption) -> str:
    sides = [
        f"{value} | {v.value:.3g} | {v.margin:.2g}"
        for value, v in zip(sides_of(control), (caught, passed), strict=True)
    ]
    words = [v.verdict for v in (caught, passed)]
    return f"| `{control.key}` | {control.knob} | {sides[0]} | {words[0]}; {words[1]} | {sides[1]} | {passed.threshold:.3g} |"


def sides_of(control: Control) -> tuple[str, str]:
    def text(value: object) -> str:
        return f"{value:g}" if isinstance(value, int | float) else str(value)

    return text(control.violating), text(control.inside)


def main(write: bool) -> None:
    tables = [table(run_controls(controls)) for controls in (CONTROLS, SYSTEM_CONTROLS)]  # in the order of the page
    print("\n\n".join(tables))
    if write:
        before, *parts = PAGE.read_text(encoding="utf-8").split(HEAD)
        pieces = [text + "\n\n" + part.partition("\n\n")[2] for text, part in zip(tables, parts, strict=True)]
        PAGE.write_text(before + "".join(pieces), encoding="utf-8")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
