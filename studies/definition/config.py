"""A study as data: what is trained, over which grid, on what machine. No torch here: ``--help`` and ``list`` stay fast.

A study file is TOML. It is read, changed by ``key=value`` overrides and checked in one go: every error is reported at
once, with its path, its value and the nearest valid name. How text becomes values and back is in ``config_text.py``.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from studies.definition.config_text import apply_overrides, describe, flatten, nearest, to_toml

SHIPPED = Path(__file__).parent.parent / "catalogue"

# Part of every point's key: raised when a config no longer means the same numbers, so that old points are redone.
POINT_FORMAT = 2
# Changing these changes no number of the results: a study continues under other values of them. ``threads`` is not among
# them: the number of threads decides the order of additions, and so the last digits.
WITHOUT_EFFECT = frozenset({"title", "question", "workers"})
# With more points than this a grid is a slip of the keyboard, and listing them alone would take minutes.
MOST_POINTS = 100_000
# lr = "auto" is half the limit that λ_max(H) ≤ N gives, which holds for the mean-scaled metric with M = I only.
AUTO_LR_NEEDS = {
    "optimizer": ("woodbury",),
    "scale": ("mean",),
    "output_metric": ("identity", "squared", "fisher_gaussian"),
}


class ConfigError(ValueError):
    """A study that cannot be run as written; ``errors`` lists everything that is wrong with it, one line each."""

    def __init__(self, source: str, errors: Sequence[str]):
        self.source, self.errors = source, list(errors)
        super().__init__(f"{source}: " + "; ".join(self.errors))


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("should not name a value twice")
    return values


def _positive_or_auto(value: Any) -> float | str:
    if value == "auto" or (isinstance(value, int | float) and 0 < value < math.inf):
        return value if value == "auto" else float(value)
    raise ValueError('should be a positive number or "auto"')


def _count_or_auto(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError('should be a whole number, at least 1, or "auto"')


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_one_or_more = (
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),  # `n = 6` means `n = [6]`
    Field(min_length=1),
    AfterValidator(_distinct),
)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        if any(isinstance(item, bool) for item in (value if isinstance(value, list) else [value])):
            raise ValueError("should not be true or false")  # Python would read them as 1 and 0
        return value


class Grid(_Table):
    """Every combination of ``n``, ``mass``, ``width`` and seed is a point; a point has ``replacements`` twin pairs."""

    n: Annotated[list[Count], *_one_or_more]
    mass: Annotated[list[Positive], *_one_or_more]
    width: Annotated[list[Count], *_one_or_more] = [128]
    seeds: Count = 3
    replacements: Count = 4

    @field_validator("seeds")
    @classmethod
    def _not_too_many(cls, seeds: int, info: ValidationInfo) -> int:
        points = seeds * math.prod(len(info.data.get(name, ())) for name in ("n", "mass", "width"))
        if points > MOST_POINTS:
            raise ValueError(f"makes a grid of {points} points; should be {MOST_POINTS} at most")
        return seeds


class Data(_Table):
    """Which data set, and how many of its rows are never trained on (the same rows for every point)."""

    name: Literal["digits"] = "digits"
    held_out: Count = 200


class Model(_Table):
    """Fully connected: inputs - width - … - width - outputs with ``hidden`` layers of that width."""

    hidden: Annotated[int, Field(ge=0, le=100)] = 2
    activation: Literal["tanh", "softplus", "gelu", "silu", "sigmoid", "relu"] = "tanh"


@dataclass(frozen=True)
class Point:
    """One run on n samples together with its replacement twins; the unit of storage and of resuming.

    ``key`` names its folder: readable, and different whenever anything that changes its numbers is.
    """

    n: int
    width: int
    mass: float
    seed: int
    key: str

    def __str__(self) -> str:
        return f"n={self.n}, width={self.width}, mass={self.mass:g}, seed={self.seed}"


class Study(_Table):
    """A whole study; see ``digits.toml`` for what each key means.

    >>> study = Study.from_toml("digits", ["n=6,12", "mass=0.1", "grid.seeds=2"])
    >>> study.grid.n, study.grid.mass, len(study.points())
    ([6, 12], [0.1], 4)
    >>> Study.from_toml("digits", ["n=0", "mas=1"])
    Traceback (most recent call last):
    studies.definition.config.ConfigError: digits: unknown key mas = 1, did you mean grid.mass?; grid.n[0] = 0 should be ...
    """

    title: str = ""
    question: str = ""
    optimizer: Literal["woodbury", "sgd"] = "woodbury"
    output_metric: Literal[
        "identity",
        "squared",
        "cross_entropy",
        "logistic",
        "fisher_gaussian",
        "fisher_categorical",
        "fisher_bernoulli",
    ] = "identity"
    scale: Literal["mean", "sum", "none"] = "mean"
    loss: Literal["squared", "mse", "cross_entropy", "logistic", "huber"] = "squared"
    lr: Annotated[float | str, PlainValidator(_positive_or_auto)] = 0.1
    steps: Count = 200
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Literal["float64", "float32"] = "float64"
    workers: Annotated[int | str, PlainValidator(_count_or_auto)] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    grid: Grid
    data: Data = Data()
    model: Model = Model()

    @field_validator("lr")
    @classmethod
    def _auto_rests_on_a_bound(cls, lr: float | str, info: ValidationInfo) -> float | str:
        chosen = {name: info.data.get(name, valid[0]) for name, valid in AUTO_LR_NEEDS.items()}
        other = [f"{name}={value}" for name, value in chosen.items() if value not in AUTO_LR_NEEDS[name]]
        if lr == "auto" and other:
            needed = ", ".join(f"{name}={' or '.join(valid)}" for name, valid in AUTO_LR_NEEDS.items())
            raise ValueError(f"does not go with {', '.join(other)}: it needs {needed}; write a number, such as lr=0.1")
        return lr

    @classmethod
    def from_toml(cls, source: str | Path, overrides: Iterable[str] = (), *, quick: bool = False) -> "Study":
        """The study in ``source`` (a shipped name or a TOML path) under ``key=value`` overrides.

        A key is a full path (``grid.n``) or its last part where only one key ends so (``n``). With ``quick`` the file's
        own ``[quick]`` table is applied first. Raises :class:`ConfigError` that lists everything that is wrong.
        """
        raw = _read(source)
        raw.pop("provenance", None)  # a results folder's config.toml is itself a study file
        reduced = raw.pop("quick", None)
        if quick and not isinstance(reduced, dict):
            raise ConfigError(str(source), ["--quick was asked for, but the study has no [quick] table"])
        problems = apply_overrides(raw, flatten(reduced) if quick else {}, cls)
        problems += apply_overrides(raw, overrides, cls)
        try:
            study = cls.model_validate(raw)
        except ValidationError as failure:
            problems += [describe(error, cls) for error in failure.errors()]
        if problems:
            raise ConfigError(str(source), problems)
        return study

    @property
    def metric_scale(self) -> str:
        """The scale c of the pulled-back term; plain gradient descent has none (G = D), whatever ``scale`` says."""
        return "none" if self.optimizer == "sgd" else self.scale

    def points(self) -> list[Point]:
        """The grid in the order n, width, mass, seed; seeds are ``seed``, ``seed + 1``, …"""
        grid, seeds = self.grid, range(self.seed, self.seed + self.grid.seeds)
        return [
            Point(n, width, mass, seed, self._key(n, width, mass, seed))
            for n in grid.n
            for width in grid.width
            for mass in grid.mass
            for seed in seeds
        ]

    def _key(self, n: int, width: int, mass: float, seed: int) -> str:
        fixed = {
            name: value
            for name, value in flatten(self.to_dict()).items()
            if name not in WITHOUT_EFFECT | {"seed"} and not name.startswith("grid.")
        }
        fixed |= {"format": POINT_FORMAT, "point": [n, width, mass, seed], "scale": self.metric_scale}
        fixed |= {"replacements": self.grid.replacements, "replaced below": min(self.grid.n)}
        digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        return f"n{n}-width{width}-mass{mass:g}-seed{seed}-{digest[:12]}"

    def differences(self, other: "Study") -> list[str]:
        """What makes this study's numbers ("here") differ from the other's ("there"); empty when nothing does."""
        mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
        return [
            f"{name} is {theirs[name]!r} there, {mine[name]!r} here"
            for name in mine
            if name not in WITHOUT_EFFECT and mine[name] != theirs[name]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, tables last, as TOML wants it."""
        return {name: dict(value) if isinstance(value, BaseModel) else value for name, value in self}

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
