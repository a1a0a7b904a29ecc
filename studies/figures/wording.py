"""Numbers, lists and counts as words."""

from __future__ import annotations

from collections.abc import Iterable

from studies.findings.numbers import Range
from studies.findings.written import number


def span(values: Range) -> str:
    """
    >>> span(Range(1.0, 2.0, 3.0, 5)), span(Range(2.0, 2.0, 2.0, 1))
    ('1 to 3 (median 2)', '2')
    """
    low, median, high = (number(value) for value in (values.low, values.median, values.high))
    return low if low == high else f"{low} to {high} (median {median})"


def listed(values: Iterable[str | float], joint: str = "and") -> str:
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


def pairs(count: int, total: int) -> str:
    """`of_all` in short, where the total was just said.

    >>> pairs(0, 9), pairs(3, 9), pairs(9, 9), pairs(1, 9)
    ('no pair', '3 pairs', 'all 9 pairs', '1 pair')
    """
    if not count:
        return "no pair"
    return of_all(count, total) if count == total else plural(count, "pair")


def few(values: Iterable[float]) -> str:
    """A set of settings in a word or two.

    >>> few([48, 6, 12]), few([1.0, 0.1]), few([6])
    ('6 to 48', '0.1 and 1', '6')
    """
    values = sorted({float(value) for value in values})
    return listed(values) if len(values) < 3 else f"{number(values[0])} to {number(values[-1])}"


def mass_words(some: list[float], every: list[float]) -> str:
    """
    >>> mass_words([1.0, 0.1], [1.0, 0.1]), mass_words([0.1], [1.0, 0.1])
    ('every mass', 'mass 0.1')
    """
    return "every mass" if len(some) == len(every) > 1 else f"mass {listed(some)}"
