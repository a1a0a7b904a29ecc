"""The four tables and the configuration of a finished (or half finished) study, as pandas frames. Reads, never trains.

Source of the columns: the `summary`, `trajectories`, `spectra` and `assumptions` tables that a study run writes.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Everything that figures and report read. A table that is not there is an empty frame with its key columns."""

    summary: pd.DataFrame
    trajectories: pd.DataFrame
    spectra: pd.DataFrame
    assumptions: pd.DataFrame
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> list[int]:
        return sorted(int(width) for width in self.summary["width"].unique())

    def at_width(self, width: int) -> Frames:
        """The rows of one network width: figures compare n and mass at one width."""
        return replace(self, **{name: (table := getattr(self, name))[table["width"] == width] for name in TABLES})


def read_frames(out: str | Path) -> Frames:
    """Read the result folder `out`. Only `summary.parquet` is indispensable; other tables may be missing.

    Raises:
        ValueError: no summary, an empty one, or a table without the columns it is read by.
    """
    import pandas as pd

    out = Path(out)
    if not (out / "summary.parquet").is_file():
        raise ValueError(
            f"no summary.parquet in {out}: expected the folder of a study run; write `stability run digits --out "
            f"{out}` first"
        )
    tables = {}
    for name in TABLES:
        path = out / f"{name}.parquet"
        table = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=NEEDED[name])
        if missing := [column for column in NEEDED[name] if column not in table.columns]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; run the study again in a new folder")
        tables[name] = table
    if tables["summary"].empty:
        raise ValueError(
            f"{out / 'summary.parquet'} has no rows: no point of the study is finished; run it again to continue"
        )
    return Frames(**tables, config=read_config(out / "config.toml"))


def read_config(path: Path) -> dict[str, Any]:
    """The configuration as run; {} when there is none, so that a report can be drawn from the tables alone."""
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
