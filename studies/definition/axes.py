"""Axes of a grid: any key of a study by its path, checked value by value, and the study at one combination of values.

The lists that a kind declares (``n``, ``mass``, …) are axes by themselves. Every other key of ``[grid]`` is the full path of
a key of the study, ``lr`` or ``"model.activation"``: its values take that key's place, point by point.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from studies.definition.config_text import describe, flatten, full_name, keys, unknown_key
from studies.definition.points import Value

if TYPE_CHECKING:
    from studies.definition.config import Study

# With more points than this a grid is a slip of the keyboard, and listing them alone would take minutes.
MOST_POINTS = 100_000
NO_AXIS = frozenset({"kind", "seed", "title", "question", "workers", "threads", "engine", "cluster", "gpus", "device"})


def combinations(axes: Mapping[str, list[Value]]) -> Iterator[dict[str, Value]]:
    """
    >>> [list(values.values()) for values in combinations({"n": [6, 12], "lr": [0.1]})]
    [[6, 0.1], [12, 0.1]]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def tidy(raw: dict) -> None:
    """``[grid]`` with the paths of tables written out: ``model.hidden = [1, 2]`` is what ``"model.hidden"`` means."""
    if isinstance(raw.get("grid"), dict):
        raw["grid"] = flatten(raw["grid"])


def check(raw: dict, model: "type[Study]") -> list[str]:
    """What is wrong with the axes that are keys of the study: unknown names, no list, values that the key cannot take."""
    problems, grid, known = [], raw.get("grid"), keys(model)
    if not isinstance(grid, dict):
        return problems
    declared = keys(model.model_fields["grid"].annotation)
    for name in [name for name in grid if name not in declared]:
        values, full = grid[name], full_name(name, known)
        if full is None or full.startswith("grid."):
            del grid[name]
            problems.append(unknown_key(f"grid.{name}", values, known))
            continue
        if full in NO_AXIS:
            del grid[name]
            problems.append(f"grid.{name} = {values!r}: {full} is the same for the whole study and cannot be an axis")
            continue
        values = values if isinstance(values, list) else [values]
        if not values or any(isinstance(value, list | dict) for value in values):
            problems.append(f"grid.{name} = {values!r} should be a list of plain values")
        elif len({(type(value) is bool, value) for value in values}) < len(values):
            problems.append(f"grid.{name} = {values!r} should not name a value twice")
        del grid[name]
        grid[full] = values  # by its full path, in the order of the file
    return problems


def with_first_values(raw: dict, model: "type[Study]") -> dict:
    """The file with every axis at its first value in the place of the key: a study of which the keys can be checked."""
    grid = raw.get("grid")
    if not isinstance(grid, dict):
        return raw
    declared = keys(model.model_fields["grid"].annotation)
    raw = {name: dict(value) if isinstance(value, dict) else value for name, value in raw.items()}
    for name, values in grid.items():
        if name not in declared and isinstance(values, list) and values:
            _set(raw, name, values[0])
    return raw


def check_each_value(raw: dict, model: "type[Study]", failure: ValidationError) -> list[str]:
    """What is wrong with a file of which other keys are wrong too: ``failure`` knows the first value of every axis alone."""
    grid = raw["grid"] if isinstance(raw.get("grid"), dict) else {}
    declared = keys(model.model_fields["grid"].annotation)
    extra = {name: values for name, values in grid.items() if name not in declared and isinstance(values, list)}
    at_first = [describe(error, model) for error in failure.errors()]
    problems = [line for line in at_first if not any(_is_of(line, name) for name in extra)]
    for name, values in extra.items():
        for index, value in enumerate(values):
            changed = with_first_values(raw, model)
            _set(changed, name, value)
            lines = [line for line in _errors(changed, model) if _is_of(line, name) or line not in at_first]
            problems += [_placed(line, name, index) for line in lines]
    return problems


def check_combinations(study: "Study") -> list[str]:
    """Every value of every axis in its place, then their combinations: lr = "auto" may go with one optimizer only."""
    seeds, problems = study.grid.seeds, []
    size = seeds * math.prod(map(len, study.axes().values()))
    if size > MOST_POINTS:
        return [f"grid.seeds = {seeds} makes a grid of {size} points; should be {MOST_POINTS} at most"]
    extra = {name: study.axes()[name] for name in study.extra_axes()}
    for name, values in extra.items():
        for index, value in enumerate(values):
            problems += [_placed(line, name, index) for line in _wrong(study, {name: value})]
    if not problems:
        for values in combinations(extra) if extra else ():
            problems += _wrong(study, values)
    return problems


def _is_of(line: str, name: str) -> bool:
    """Is the line about the key ``name``?"""
    return line.startswith((f"{name} ", f"{name}["))


def _placed(line: str, name: str, index: int) -> str:
    """What is said of a key, said of the value of its axis."""
    return f"grid.{name}[{index}]{line.removeprefix(name)}" if _is_of(line, name) else line


def _wrong(study: "Study", values: Mapping[str, Value]) -> list[str]:
    return _errors(_changed(study, values), type(study))


def _errors(raw: dict, model: "type[Study]") -> list[str]:
    try:
        model.model_validate(raw)
    except ValidationError as failure:
        return [describe(error, model) for error in failure.errors()]
    return []


def with_values(study: "Study", values: Mapping[str, Value]) -> "Study":
    """The study with other values of some keys, given by their full path; raises pydantic's ValidationError."""
    return type(study).model_validate(_changed(study, values))


def _changed(study: "Study", values: Mapping[str, Value]) -> dict[str, Any]:
    raw = study.to_dict()
    for name, value in values.items():
        _set(raw, name, value)
    return raw


def _set(raw: dict[str, Any], name: str, value: Any) -> None:
    *tables, leaf = name.split(".")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            return  # the check of the whole says that a table was expected
    raw[leaf] = value
