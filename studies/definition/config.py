"""A study as data: what is computed, over which grid, on what machine. No torch here: ``--help`` and ``list`` stay fast.

A study file is TOML. It is read, changed by ``key=value`` overrides and checked in one go: every error is reported at
once, with its path, its value and the nearest valid name. How text becomes values and back is in ``config_text.py``, what
the axes of ``[grid]`` make of it in ``axes.py``; the keys of each kind of study are those of its config model.
"""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from studies.definition import axes
from studies.definition.config_text import apply_overrides, flatten, nearest, to_toml
from studies.definition.fields import Count, Table, count_or_auto
from studies.definition.kinds import Kind, kind_of
from studies.definition.points import Point, Value, point_key

if TYPE_CHECKING:
    import pandas as pd

SHIPPED = Path(__file__).parent.parent / "catalogue"

# Part of every point's key: raised when a config no longer means the same numbers, so that old points are redone.
POINT_FORMAT = 3
# Changing these changes no number of the results: a study continues under other values of them. ``threads`` is not among
# them: the number of threads decides the order of additions, and so the last digits.
WITHOUT_EFFECT = frozenset({"title", "question", "workers", "engine", "cluster", "gpus"})


class ConfigError(ValueError):
    """A study that cannot be run as written; ``errors`` lists everything that is wrong with it, one line each."""

    def __init__(self, source: str, errors: Sequence[str]):
        self.source, self.errors = source, list(errors)
        super().__init__(f"{source}: " + "; ".join(self.errors))


class Grid(Table):
    """Lists are axes: every combination is a point, for every one of the ``seeds``. So is any other key of the study by its
    full path: ``lr = [0.1, 0.2]``, ``"model.activation" = ["tanh", "relu"]``."""

    model_config = ConfigDict(extra="allow")
    seeds: Count = 1


class Study(Table):
    """A whole study: the keys that every kind has; ``Study.from_toml`` gives the config of the kind that a file names.

    >>> study = Study.from_toml("digits", ["n=6,12", "mass=0.1", "grid.seeds=2"])
    >>> study.grid.n, study.grid.mass, len(study.points())
    ([6, 12], [0.1], 4)
    >>> Study.from_toml("digits", ["n=0", "mas=1"])
    Traceback (most recent call last):
    studies.definition.config.ConfigError: digits: unknown key mas = 1, did you mean grid.mass?; grid.n[0] = 0 should be ...
    """

    AXES: ClassVar[tuple[str, ...]] = ()  # the lists of [grid] that points run over, the slowest first

    title: str = ""
    question: str = ""
    kind: str = "twins"
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Literal["float64", "float32"] = "float64"
    workers: Annotated[int | str, PlainValidator(count_or_auto)] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    engine: Literal["auto", "in-process", "pool", "ray"] = "auto"
    cluster: str = ""
    gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    grid: Grid = Grid()

    @classmethod
    def from_toml(cls, source: str | Path, overrides: Iterable[str] = (), *, quick: bool = False) -> Self:
        """The study in ``source`` (a shipped name or a TOML path) under ``key=value`` overrides.

        A key is a full path (``grid.n``) or its last part where only one key ends so (``n``). With ``quick`` the file's
        own ``[quick]`` table is applied first. Raises :class:`ConfigError` that lists everything that is wrong.
        """
        raw = _read(source)
        raw.pop("provenance", None)  # a results folder's config.toml is itself a study file
        reduced = raw.pop("quick", None)
        if quick and not isinstance(reduced, dict):
            raise ConfigError(str(source), ["--quick was asked for, but the study has no [quick] table"])
        try:
            model = kind_of(raw.get("kind", "twins")).config
        except ValueError as error:
            raise ConfigError(str(source), [str(error)]) from error
        axes.tidy(raw)
        problems = apply_overrides(raw, flatten(reduced) if quick else {}, model, no_axis=axes.NO_AXIS)
        problems += apply_overrides(raw, overrides, model, no_axis=axes.NO_AXIS)
        problems += axes.check(raw, model)
        try:
            study = model.model_validate(axes.with_first_values(raw, model))
        except ValidationError as failure:
            problems += axes.check_each_value(raw, model, failure)
        else:
            problems += axes.check_combinations(study)
        if problems:
            raise ConfigError(str(source), list(dict.fromkeys(problems)))
        return study

    @property
    def kind_object(self) -> Kind:
        return kind_of(self.kind)

    def axes(self) -> dict[str, list[Value]]:
        """Axis → its values in the order of the grid, the slowest first: those of the kind, then any other keys."""
        extra = self.grid.model_extra or {}
        return {name: getattr(self.grid, name) for name in self.AXES} | {name: extra[name] for name in extra}

    def extra_axes(self) -> list[str]:
        """The axes that are keys of the study by their full path."""
        return list(self.grid.model_extra or {})

    def points(self) -> list[Point]:
        """Every combination of the axes' values, and for each the seeds ``seed``, ``seed + 1``, …"""
        fixed: dict[tuple, dict] = {}
        points = []
        for values in axes.combinations(self.axes() | {"seed": list(range(self.seed, self.seed + self.grid.seeds))}):
            extra = tuple((name, values[name]) for name in self.extra_axes())
            if extra not in fixed:
                fixed[extra] = self.with_values(dict(extra)).fixed()
            points.append(Point(tuple(values.items()), point_key(values, fixed[extra])))
        return points

    def is_of(self, point: Point) -> bool:
        """Is ``point`` still a point of this study? Not when a data file has changed since its key was made."""
        return point_key(dict(point.values), self.at(point).fixed()) == point.key

    def at(self, point: Point) -> Self:
        """The study with the values of the point in the place of the axes that are keys of the study."""
        return self.with_values({name: value for name, value in point.values if name in self.extra_axes()})

    def with_values(self, values: dict[str, Value]) -> Self:
        return axes.with_values(self, values) if values else self

    def columns(self, point: Point) -> dict[str, Value]:
        """The first columns of a point's tables: its axes and its seed, each of one type over the whole study."""
        kinds = {name: {type(value) for value in values} for name, values in self.axes().items()}
        return {
            name: str(value) if len(kinds.get(name, ())) > 1 and not kinds[name] <= {int, float} else value
            for name, value in point.values
        }

    def keyed(self, point: Point, tables: "dict[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
        """The tables of a point with :meth:`columns` in front, in place."""
        for table in tables.values():
            for place, (name, value) in enumerate(self.columns(point).items()):
                table.insert(place, name, value)
        return tables

    def fixed(self) -> dict[str, Any]:
        """Everything beside the point's own values that changes its numbers; kinds add what they need to."""
        left_out = WITHOUT_EFFECT | {"seed"}
        settings = {name: value for name, value in flatten(self.to_dict()).items() if name not in left_out}
        return {name: value for name, value in settings.items() if not name.startswith("grid.")} | {
            "format": POINT_FORMAT
        }

    def describe_size(self) -> str:
        """How much there is to compute, in a few words."""
        return f"{len(self.points())} points"

    def differences(self, other: "Study") -> list[str]:
        """What makes this study's numbers ("here") differ from the other's ("there"); empty when nothing does."""
        mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
        on_axes = {*self.extra_axes(), *other.extra_axes()}
        return [
            f"{name} is {theirs.get(name, 'not set')!r} there, {mine.get(name, 'not set')!r} here"
            for name in mine | theirs
            if name not in WITHOUT_EFFECT | on_axes and mine.get(name) != theirs.get(name)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, tables last, as TOML wants it; tables with nothing in them are left out."""
        plain = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in self}
        for value in plain.values():
            if isinstance(value, dict):
                for name in [name for name, inner in value.items() if inner == {}]:
                    del value[name]
        return dict(sorted(plain.items(), key=lambda item: isinstance(item[1], dict)))

    def to_toml(self) -> str:
        """Text that ``from_toml`` reads back as an equal study."""
        return to_toml(self.to_dict())


def shipped_studies() -> dict[str, Path]:
    """Name → file of the studies that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def source_text(source: str | Path) -> str:
    """The text of a study file as it was written, comments and all. Raises ConfigError when there is none to read."""
    shipped = shipped_studies()
    try:
        return shipped.get(str(source), Path(source)).read_text(encoding="utf-8")
    except FileNotFoundError:
        guess = nearest(str(source), shipped)
        hint = f"did you mean {guess}? " if guess else ""
        problem = f"no such study; {hint}shipped are {', '.join(shipped)}, or give the path of a TOML file"
    except UnicodeDecodeError as error:
        problem = f"not valid TOML: {error}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; a TOML file was expected"
    raise ConfigError(str(source), [problem])


def _read(source: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(source_text(source))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(source), [f"not valid TOML: {error}"]) from None
