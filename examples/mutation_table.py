"""The mutation table of docs/assumptions.md: each assumption violated and caught, and just inside and passed.

python -m examples.mutation_table           prints the table
python -m examples.mutation_table --write   puts it into docs/assumptions.md
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from stability.assumptions.controls import Control, run_controls
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
    text = table(run_controls())
    print(text)
    if write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
        _, blank, after = rest.partition("\n\n")
        PAGE.write_text(before + text + blank + after, encoding="utf-8")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
