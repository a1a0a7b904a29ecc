"""Between text and config values: overrides, error messages, TOML. Knows pydantic models, but no particular study."""

import difflib
import json
import math
import re
import tomllib
import typing
from collections.abc import Container, Iterable, Mapping
from typing import Any

from pydantic import BaseModel


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Full path → type of every key, tables resolved.

    >>> from studies.definition.config import Grid
    >>> list(keys(Grid))
    ['seeds']
    """
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.annotation
    return found


def nearest(unknown: str, known: Iterable[str]) -> str | None:
    """The valid name most like ``unknown``, compared whole and part by part; None when nothing is close.

    >>> nearest("mas", ["grid.mass", "steps"]), nearest("zzz", ["steps"])
    ('grid.mass', None)
    """

    def likeness(name: str) -> float:
        last = name.rpartition(".")[2]
        pairs = [(unknown, name), *((part, last) for part in unknown.split("."))]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def apply_overrides(
    raw: dict,
    overrides: Iterable[str] | Mapping[str, Any],
    model: type[BaseModel],
    *,
    no_axis: Container[str] = frozenset(),
) -> list[str]:
    """Write overrides (``key=value`` texts, or a mapping of values) into ``raw``; returns what is wrong with them. The keys
    of ``no_axis`` have one value in the whole study."""
    known, problems = keys(model), []
    if not isinstance(overrides, Mapping):
        texts = [overrides] if isinstance(overrides, str) else list(overrides)
        problems += [f"override {text!r} should be written key=value" for text in texts if "=" not in text]
        pairs = [(name.strip(), text) for name, equals, text in (text.partition("=") for text in texts) if equals]
    else:
        pairs = list(overrides.items())
    for name, value in pairs:
        path = _path(name, known, raw.get("grid"))
        if isinstance(value, str) and not isinstance(overrides, Mapping):
            axis = len(path or ()) == 2 and path[0] == "grid" and ".".join(path) not in known
            value = parse_value(value, list if axis else known.get(".".join(path or ())))
            value = value if not axis or isinstance(value, list) else [value]
        if path is None:
            problems.append(unknown_key(name, value, known))
            continue
        if isinstance(value, str) and "," in value and not _takes_text(known.get(".".join(path))):
            full = ".".join(path)
            axis = "" if path[0] == "grid" or full in no_axis else f"; several make an axis: grid.{full}={value}"
            problems.append(f"{name} = {value!r} should be one value{axis}")
            continue
        *tables, leaf = path
        place = raw
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                break  # the check of the whole says that a table was expected
        else:
            place[leaf] = value
    return problems


def _takes_text(kind: Any) -> bool:
    """May a value of this type be words with a comma in them?"""
    return kind is str or kind is None or (typing.get_origin(kind) or kind) in (list, dict)


def _path(name: str, known: Mapping[str, Any], grid: Any) -> list[str] | None:
    """Where an override goes: the axis of that key where there is one, the key, a new axis ``grid.KEY``, or a place below a
    key that is a table of the user's own."""
    full = full_name(name, known)
    if full is not None:
        return ["grid", full] if isinstance(grid, dict) and full in grid else full.split(".")
    table, _, key = name.partition(".")
    if table == "grid" and key and "grid" in {path.partition(".")[0] for path in known}:
        full = full_name(key, known)
        return ["grid", full] if full and not full.startswith("grid.") else None
    for path, kind in known.items():
        if (typing.get_origin(kind) or kind) is dict and name.startswith(f"{path}."):
            return name.split(".")
    return None


def full_name(name: str, known: Iterable[str]) -> str | None:
    """The one key that ``name`` is, or is the last part of."""
    matches = [full for full in known if full == name] or [full for full in known if full.endswith(f".{name}")]
    return matches[0] if len(matches) == 1 else None


def unknown_key(name: str, value: Any, known: Iterable[str], tables: Iterable[str] = ()) -> str:
    """What is said of a key that nobody knows, with the nearest one that there is."""
    table, _, last = name.rpartition(".")
    inside = [full for full in known if table and full.startswith(f"{table}.")]  # the keys of a table that there is
    guess = nearest(last, inside) or nearest(last if inside else name, [*known, *tables])
    valid = inside or known
    return f"unknown key {name} = {value!r}, " + (
        f"did you mean {guess}?" if guess else f"valid are {', '.join(valid)}"
    )


def parse_value(text: str, kind: Any = None) -> Any:
    """A value as written on the command line: TOML, or a bare number, comma list or word.

    >>> parse_value("0.5"), parse_value(".5"), parse_value("sgd"), parse_value("6,12", list[int]), parse_value("1", str)
    (0.5, 0.5, 'sgd', [6, 12], '1')
    """
    text = text.strip()
    if kind is str and not text.startswith(("'", '"')):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)  # `.1` and `1.` are no TOML
    except ValueError:
        pass
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    # With a bracket that nothing closes it is no list, and is refused as the text that it is.
    if (typing.get_origin(kind) or kind) is list and "," in text and not set(inside) & set("[]"):
        return [parse_value(item) for item in inside.split(",") if item.strip()]
    return text


def describe(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One pydantic error as one line: path, value, what was expected, the nearest valid name."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    value, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        return unknown_key(path, value, keys(model), model.model_fields)
    if kind == "missing":
        return f"{path} is missing"
    if kind == "too_short":
        return f"{path} = {value!r} should not be empty"
    if kind == "literal_error":
        valid = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        guess = nearest(value, valid) if isinstance(value, str) else None
        return f"{path} = {value!r} should be one of {', '.join(valid)}" + (f", did you mean {guess}?" if guess else "")
    if kind == "string_pattern_mismatch":
        return f"{path} = {value!r} should be cpu, cuda or cuda:0, cuda:1, …"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path} = {value!r} {message[0].lower()}{message[1:]}"


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one dict of full paths.

    >>> flatten({"lr": 0.1, "grid": {"n": [6]}})
    {'lr': 0.1, 'grid.n': [6]}
    """
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def to_toml(table: Mapping[str, Any], path: str = "") -> str:
    """TOML text of nested dicts of values; the values of a table come before the tables in it. None, which TOML does not know,
    is a key that is not there.

    >>> print(to_toml({"lr": 0.1, "grid": {"n": [6, 12], "model.hidden": [1]}}), end="")
    lr = 0.1
    <BLANKLINE>
    [grid]
    n = [6, 12]
    "model.hidden" = [1]
    """
    values = {name: value for name, value in table.items() if not _is_table(value) and value is not None}
    lines = [f"{_toml_key(name)} = {_toml_value(value)}" for name, value in values.items()]
    text = "\n".join([f"[{path}]"] * bool(path) + lines) + "\n" if lines or path else ""
    for name, inner in table.items():
        if _is_table(inner):
            text += "\n" * bool(text) + to_toml(inner, f"{path}.{_toml_key(name)}".lstrip("."))
    return text


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # JSON's escapes are TOML's, but for DEL
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value)
