"""The tables and the configuration of a finished (or half finished) study, as pandas frames. Reads, never trains.

Source of the columns: the tables that a study run writes; twins have `summary`, `trajectories`, `spectra` and `assumptions`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.definition.kinds import kind_of

if TYPE_CHECKING:
    import pandas as pd

POINT = ["n", "width", "mass", "seed"]
"""Names one training run on S."""
PAIR = [*POINT, "replaced", "replacement"]
"""Names one pair of twins."""

TABLES = ("summary", "trajectories", "spectra", "assumptions")
NEEDED = {
    "summary": [*PAIR, "measured_sup", "measured_l2"],
    "trajectories": [*PAIR, "step"],
    "spectra": [*POINT, "step", "quantile", "eigenvalue"],
    "assumptions": [*PAIR, "assumption", "verdict"],
}


@dataclass(frozen=True)
class Frames:
    """Everything that figures and report read. A table that is not there is an empty frame with its key columns.

    ``others``: the tables that kinds of study other than the twins write, also as attributes: ``frames.steps``.
    """

    summary: pd.DataFrame
    trajectories: pd.DataFrame
    spectra: pd.DataFrame
    assumptions: pd.DataFrame
    config: dict[str, Any] = field(default_factory=dict)
    others: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name != "others" and not name.startswith("__") and name in self.others:
            return self.others[name]
        raise AttributeError(f"no table {name!r}; there are {', '.join([*TABLES, *self.__dict__.get('others', ())])}")

    @property
    def widths(self) -> list[int]:
        return sorted(int(width) for width in self.summary["width"].unique())

    @property
    def extra_axes(self) -> list[str]:
        """The axes of the grid that are keys of the study: columns named by their full path."""
        return [name for name in self.config.get("grid", {}) if name in self.summary.columns and name not in POINT]

    def where(self, values: dict[str, Any]) -> Frames:
        """The rows that have these values in these columns, of every table."""

        def rows(table: pd.DataFrame) -> pd.DataFrame:
            for name, value in values.items():
                table = table[table[name] == value] if name in table.columns else table
            return table

        return replace(
            self,
            **{name: rows(getattr(self, name)) for name in TABLES},
            others={name: rows(table) for name, table in self.others.items()},
        )

    def at_width(self, width: int) -> Frames:
        """The rows of one network width: figures compare n and mass at one width."""
        return self.where({"width": width})

    def parts(self) -> list[tuple[dict[str, Any], Frames]]:
        """The study cut by width and by every axis beside n and mass: figures of bounds compare n and mass alone."""
        names = ["width", *self.extra_axes]
        found = self.summary[names].drop_duplicates().sort_values(names)
        rows = [dict(zip(names, row, strict=True)) for row in found.itertuples(index=False)]
        many = [name for name in names if self.summary[name].nunique() > 1]
        return [({name: row[name] for name in many}, self.where(row)) for row in rows]


def read_frames(out: str | Path) -> Frames:
    """Read the result folder `out`. Only `summary.parquet` is indispensable; other tables may be missing.

    Raises:
        ValueError: no summary, an empty one, or a table without the columns it is read by.
    """
    import pandas as pd

    out = Path(out)
    if not (out / "summary.parquet").is_file():
        if "provenance" in read_config(out / "config.toml"):
            advice = f"no point of the study is finished; `stability resume {out}` continues it"
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):  # which `run --out` would refuse
            advice = "it is not the folder of a study run; give another one"
        else:
            advice = f"expected the folder of a study run; write `stability run digits --out {out}` first"
        raise ValueError(f"no summary.parquet in {out}: {advice}")
    config = read_config(out / "config.toml")
    tables = {}
    for name, needed in _needed(config).items():
        path = out / f"{name}.parquet"
        table = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=needed)
        if missing := [column for column in needed if column not in table.columns]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; run the study again in a new folder")
        tables[name] = table
    if tables["summary"].empty:
        raise ValueError(
            f"{out / 'summary.parquet'} has no rows: no point of the study is finished; run it again to continue"
        )
    others = {name: tables.pop(name) for name in list(tables) if name not in TABLES}
    absent = {name: pd.DataFrame(columns=NEEDED[name]) for name in TABLES if name not in tables}
    return Frames(**tables, **absent, config=config, others=others)


def _needed(config: dict[str, Any]) -> dict[str, list[str]]:
    """Table → the columns that it must have, of the kind of study that the folder holds."""
    if config.get("kind", "twins") == "twins":
        return NEEDED
    kind = kind_of(config["kind"])
    axes = [*kind.config.AXES, "seed"]
    return {name: [*axes, *spec.key, *spec.needed] for name, spec in kind.tables.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration as run; {} when there is none, so that a report can be drawn from the tables alone."""
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
