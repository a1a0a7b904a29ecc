"""One point of a study's grid: the values of its axes, and the key that names its folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool


@dataclass(frozen=True)
class Point:
    """The unit of storage and of resuming. ``values``: (axis, value), in the order of the grid, the seed last.

    ``key`` names its folder: readable, and different whenever anything that changes its numbers is. Values are also
    attributes: ``point.n``, ``point.seed``.

    >>> point = Point((("n", 6), ("mass", 0.1), ("seed", 0)), "n6-mass0.1-seed0-0f")
    >>> str(point), point.mass
    ('n=6, mass=0.1, seed=0', 0.1)
    """

    values: tuple[tuple[str, Value], ...]
    key: str

    def __getattr__(self, name: str) -> Value:
        if name != "values" and not name.startswith("__"):  # while unpickling there are no values yet
            for axis, value in self.values:
                if axis == name:
                    return value
        raise AttributeError(f"the point has no axis {name!r}")

    def __str__(self) -> str:
        return ", ".join(f"{axis}={written(value)}" for axis, value in self.values)


def written(value: Value) -> str:
    """
    >>> written(0.1), written(1.0), written("adam"), written(True)
    ('0.1', '1', 'adam', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def point_key(values: Mapping[str, Value], fixed: Mapping[str, Any]) -> str:
    """The values, readable as far as a file name goes, and a digest of them and of everything that is ``fixed``.

    >>> point_key({"n": 6, "optimizer": "adam"}, {"lr": 0.1})
    'n6-optimizeradam-...'
    """
    text = json.dumps([list(values.items()), fixed], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    readable = "-".join(f"{axis.rpartition('.')[2]}{written(value)}" for axis, value in values.items())
    safe = "".join(letter if letter.isalnum() or letter in ".-_+" else "_" for letter in readable)
    return f"{safe[:120]}-{digest[:12]}"
