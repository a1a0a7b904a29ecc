"""Baselines: the constants of a test module in a plain TOML file beside it, written whole or not at all.

    ["TestDigits::test_rate[0.1]"]
    date = "2026-11-29"
    python = "3.11"
    torch = "2.13.0"
    contraction-stability = "0.1.0"

    ["TestDigits::test_rate[0.1]".positive_rate]
    value = 0.0123
    sample = 3
    step = 50
    rtol = 0.05          # yours: kept when the value is updated

Tolerances may be written by hand into the table of a constant, or of a test for all of its constants.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stability.assumptions.verdict import place_of

RTOL = 0.01
TOLERANCES = ("rtol", "atol")
HEADER = "# Baselines of the constants in {name}. Values: pytest --assumptions-update. rtol, atol and note are yours.\n"


@dataclass(frozen=True)
class Constant:
    """A number that a test holds against its baseline, and where it was taken."""

    name: str
    quantity: str
    value: float
    layer: str = ""
    sample: int = -1
    step: int = -1
    replaced: int = -1

    @property
    def place(self) -> str:
        return place_of(self.layer, self.sample, self.step, self.replaced)

    def entry(self) -> dict:
        """What is written of it."""
        where = {"layer": self.layer, "sample": self.sample, "step": self.step, "replaced": self.replaced}
        return {"value": float(self.value)} | {k: v for k, v in where.items() if v not in ("", -1)}


def read(path: Path) -> dict[str, dict]:
    """{test: {its date, versions, and a table per constant}}; {} where there is no file.

    Raises ValueError for a file that is not TOML, or not of this form.
    """
    import tomllib

    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for test, table in found.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {test} should be the table of a test, [{_key(test)}], got {table!r}")
        for name, entry in table.items():
            if not isinstance(entry, dict):
                continue
            value = entry.get("value")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}: [{_key(test)}.{_key(name)}] needs value = a number, got {value!r}")
    return found


def tolerances(table: Mapping, name: str, given: Mapping[str, float], noise: float) -> tuple[float, float]:
    """(rtol, atol): of the constant's table, else of its test's, else as ``given`` by the marker or the call.

    ``noise`` is the atol where nobody wrote one. Raises ValueError for a tolerance that is no number >= 0.

    >>> tolerances({"rtol": 0.1, "xi": {"value": 1.0, "atol": 0.5}}, "xi", {"rtol": 0.2}, 0.0)
    (0.1, 0.5)
    """
    entry, found = table.get(name, {}), []
    for key, fallback in (("rtol", RTOL), ("atol", noise)):
        value = entry.get(key, table.get(key, given.get(key)))
        value = fallback if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{key} of {name} must be a number >= 0, got {value!r}")
        found.append(float(value))
    return found[0], found[1]


def moved(constant: Constant, table: Mapping, rtol: float, atol: float) -> str:
    """ "" where the constant is within max(rtol·|baseline|, atol) of its baseline, else by how much it is not, and where.

    >>> now, table = Constant("xi", "ξ", 1.1, step=3), {"date": "2026-01-01", "xi": {"value": 1.0, "step": 7}}
    >>> moved(now, table, 0.2, 0.0)
    ''
    >>> moved(now, table, 0.01, 0.0).partition("; ")[::2]
    ('xi has moved from its baseline: ξ = 1.1, baseline 1 of 2026-01-01: +0.1 (+10 %), tolerance ±0.01',
     'now at step 3, then at step 7')
    """
    entry = table[constant.name]
    base, value = float(entry["value"]), float(constant.value)
    allowed = max(rtol * abs(base), atol) if math.isfinite(base) else atol
    if value == base or abs(value - base) <= allowed or (value != value and base != base):
        return ""
    change = value - base
    percent = f" ({100 * change / abs(base):+.3g} %)" if math.isfinite(change) and base else ""
    then = place_of(*(entry.get(k, d) for k, d in (("layer", ""), ("sample", -1), ("step", -1), ("replaced", -1))))
    where = f"; now at {constant.place}" if constant.place else ""
    where += f", then at {then}" if then else ""
    date = f" of {table['date']}" if "date" in table else ""
    return (
        f"{constant.name} has moved from its baseline: {constant.quantity} = {value:.6g}, baseline {base:.6g}{date}: "
        f"{change:+.3g}{percent}, tolerance ±{allowed:.3g}{where}"
    )


def update(path: Path, tests: Mapping[str, Mapping[str, Mapping]], stamp: Mapping[str, str]) -> None:
    """Write the constants of some tests into the file; what else it holds stays, tolerances and notes too.

    Read again under a lock, and replaced in one move: readers see the old file or the new one, and two test runs that
    update it at the same time both find their values in it.
    """
    with _locked(path.parent):
        found = read(path)
        for test, entries in tests.items():
            table = found.setdefault(test, {})
            table.update(stamp)
            for name, entry in entries.items():
                kept = {k: v for k, v in table.get(name, {}).items() if k in (*TOLERANCES, "note")}
                table[name] = {**entry, **kept}
        text = HEADER.format(name=path.name.replace(".assumptions.toml", ".py")) + to_toml(found)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, path.stat().st_mode if path.exists() else 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def to_toml(tests: Mapping[str, Mapping]) -> str:
    """Tests and their constants in the order of their names.

    >>> print(to_toml({"test_a[1]": {"date": "2026-01-01", "xi": {"value": 1e-05, "layer": "0"}}}), end="")
    <BLANKLINE>
    ["test_a[1]"]
    date = "2026-01-01"
    <BLANKLINE>
    ["test_a[1]".xi]
    value = 1e-05
    layer = "0"
    """
    lines = []
    for test in sorted(tests):
        table = tests[test]
        lines += [
            "",
            f"[{_key(test)}]",
            *(f"{_key(k)} = {_value(v)}" for k, v in table.items() if not isinstance(v, dict)),
        ]
        for name in sorted(k for k, v in table.items() if isinstance(v, dict)):
            lines += ["", f"[{_key(test)}.{_key(name)}]", *(f"{_key(k)} = {_value(v)}" for k, v in table[name].items())]
    return "\n".join([*lines, ""])


def stamp() -> dict[str, str]:
    """Date and versions, as a baseline records them."""
    import platform
    from datetime import date
    from importlib.metadata import PackageNotFoundError, version

    found = {"date": date.today().isoformat(), "python": platform.python_version()}
    for package in ("torch", "contraction-stability"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _value(name)


def _value(value) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML's own words
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)  # integers, and dates that a user wrote


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder, where the system has locks on folders."""
    try:
        import fcntl
    except ImportError:  # Windows: the last of two runs that end at the same moment wins
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
