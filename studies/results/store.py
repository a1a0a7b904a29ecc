"""The result folder. Everything in it is whole or absent: written beside its place, synced, then renamed.

    DIR/config.toml                the study as run, with [provenance]: versions, commit, host, date, command
    DIR/points/<key>/              one finished point: four tables and point.json with their checksums
    DIR/{summary,trajectories,spectra,assumptions}.parquet    the tables of all finished points

A point that is not whole (a killed process, a damaged disk) fails its checksums and is trained again.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.definition.config import ConfigError, Point, Study
from studies.definition.config_text import to_toml
from studies.results.frames import PAIR, POINT, TABLES

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

ORDER = {"summary": PAIR, "trajectories": [*PAIR, "step"], "spectra": [*POINT, "step", "quantile"], "assumptions": PAIR}
# A half-written folder older than this many seconds was left by a process that was killed; a living one takes far less.
STALE = 600
FULL = {errno.ENOSPC, errno.EDQUOT}


class FolderError(ValueError):
    """The output folder cannot be used: foreign, of another study, or not writable."""


class DiskFullError(OSError):
    """No room is left for the results: not the input's fault, and the same command continues once there is."""


@contextmanager
def usable(out: str | Path) -> Iterator[None]:
    """What the system refuses in the folder ``out``, in one line: FolderError, or DiskFullError when it has no room."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                f"the disk of {out} is full; make room and give the same command again, finished points are kept"
            ) from error
        file = Path(os.fsdecode(error.filename)).name if isinstance(error.filename, str | bytes) else ""
        what = f" ({file})" if file and not file.startswith(".") and file != Path(out).name else ""
        raise FolderError(f"cannot use the folder {out}: {error.strerror or error}{what}; give another one") from error


def open_folder(out: str | Path, study: Study, provenance: Mapping[str, Any]) -> list[Point]:
    """Make ``out`` ready for the study and return the points that are still to be trained.

    A folder of the same study is continued; keys that change no number (workers, title, …) may differ. One of ours in
    which no point was ever finished holds nothing to protect: it becomes this study's.
    Raises FolderError when the folder is foreign, holds another study, or cannot be written.
    """
    out = Path(out)
    with usable(out):
        if out.exists() and not out.is_dir():
            raise FolderError(f"{out} is a file; a folder was expected, give another --out")
        if (out / "config.toml").is_file():
            _check_same_study(out, study)
        elif out.is_dir() and any(not entry.name.startswith(".config.toml.") for entry in out.iterdir()):
            raise FolderError(f"not a results folder: {out} is not empty and has no config.toml; give another --out")
        out.mkdir(parents=True, exist_ok=True)
        to_do = [point for point in study.points() if not is_finished(out, point)]
        if to_do or not (out / "config.toml").is_file():
            write_config(out, study, provenance)  # before points/: an early end must not leave a folder of no study
        (out / "points").mkdir(exist_ok=True)
        for left_over in (out / "points").glob(".*"):
            if time.time() - left_over.stat().st_mtime > STALE:
                shutil.rmtree(left_over)
    return to_do


def _check_same_study(out: Path, study: Study) -> None:
    different = study.differences(read_study(out))
    if different and _holds_results(out):
        raise FolderError(
            f"{out} holds the results of another config ({'; '.join(different)}): give another --out, "
            "or the config it was made with to continue it"
        )


def _holds_results(out: Path) -> bool:
    """Was a point ever finished here? Damaged ones count: they are somebody's."""
    return (out / "summary.parquet").exists() or any((out / "points").glob("*/point.json"))


def read_study(out: str | Path) -> Study:
    """The study that a results folder holds; FolderError when the folder is not one of ours."""
    config = Path(out) / "config.toml"
    try:
        if "provenance" not in tomllib.loads(config.read_text(encoding="utf-8")):
            raise FolderError(f"not a results folder: {out}'s config.toml has no [provenance]; give another folder")
        return Study.from_toml(config)
    except FileNotFoundError:
        raise FolderError(f"{out} is not a results folder: it has no config.toml") from None
    except (ConfigError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{out} is not a results folder of this version: {error}; give another folder") from error


def write_config(out: Path, study: Study, provenance: Mapping[str, Any]) -> None:
    """config.toml as run; reading it back gives an equal study."""
    text = to_toml(study.to_dict() | {"provenance": dict(provenance)})
    write_whole(out / "config.toml", lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then put it there in one move: whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp's own mode is for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_point(out: Path, point: Point, tables: Mapping[str, "pd.DataFrame"], facts: Mapping[str, Any]) -> None:
    """Store one finished point with ``facts`` about it (seconds, …); what was there and is not whole gives way."""
    with usable(out):
        _write_point(out, point, tables, facts)


def _write_point(out: Path, point: Point, tables: Mapping[str, "pd.DataFrame"], facts: Mapping[str, Any]) -> None:
    points = out / "points"
    temporary = Path(tempfile.mkdtemp(dir=points, prefix=f".{point.key}."))
    try:
        temporary.chmod(0o777 & ~_umask())
        for name in TABLES:
            tables[name].to_parquet(temporary / f"{name}.parquet", index=False)
            _sync(temporary / f"{name}.parquet")
        checksums = {name: _checksum(temporary / f"{name}.parquet") for name in TABLES}
        record = {"key": point.key, **facts, "sha256": checksums}
        (temporary / "point.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _sync(temporary / "point.json")
        _sync(temporary)
        if is_finished(out, point):  # another run was faster; its numbers are the same
            return
        shutil.rmtree(points / point.key, ignore_errors=True)
        os.replace(temporary, points / point.key)
        _sync(points)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_finished(out: Path, point: Point) -> bool:
    """Is the point there, whole and undamaged?"""
    folder = out / "points" / point.key
    try:
        record = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        return record["key"] == point.key and all(
            record["sha256"][name] == _checksum(folder / f"{name}.parquet") for name in TABLES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def collect(out: Path, study: Study) -> int:
    """Write the tables of all finished points of the study together; returns how many points that are."""
    import pandas as pd

    finished = [point for point in study.points() if is_finished(out, point)]
    for name in TABLES if finished else ():
        with usable(out):
            parts = [pd.read_parquet(out / "points" / point.key / f"{name}.parquet") for point in finished]
            table = pd.concat(parts, ignore_index=True).sort_values(ORDER[name], kind="stable", ignore_index=True)
            write_whole(out / f"{name}.parquet", lambda path, table=table: table.to_parquet(path, index=False))
    return len(finished)


def load_results(out: str | Path) -> "Frames":
    """The tables of a results folder, as far as the study got: ``.summary``, ``.trajectories``, …, ``.config``."""
    from studies.results.frames import read_frames

    out = Path(out)
    if not (out / "summary.parquet").is_file() and (out / "points").is_dir():  # killed before the tables were written
        collect(out, read_study(out))
    return read_frames(out)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file to the disk; a folder too, where the system can open one."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
