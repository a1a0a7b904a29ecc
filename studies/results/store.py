"""The result folder. Everything in it is whole or absent: written beside its place, synced, then renamed.

    DIR/config.toml        the study as run, with [provenance]: versions, commit, host, date, command
    DIR/points/<key>/      one finished point: its tables and point.json with their checksums, seconds, host
    DIR/failed/<key>.json  a point that failed, with its traceback; gone once it is finished
    DIR/runs/*.json        one file per run: when, where, how long, with which engine, what came of it
    DIR/<table>.parquet    the tables of all finished points together: summary, …

A point that is not whole (a killed process, a damaged disk) fails its checksums and is computed again. Several processes
may work on one folder: a point that two of them finish is there once, and their numbers are the same.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.definition.config import ConfigError, Study
from studies.definition.config_text import to_toml
from studies.definition.points import Point
from studies.results.whole import FolderError, sync, umask, usable, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from studies.results.frames import Frames

# A half-written folder older than this many seconds was left by a process that was killed; a living one takes far less.
STALE = 600
OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST}


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


def write_point(out: Path, point: Point, tables: Mapping[str, "pd.DataFrame"], facts: Mapping[str, Any]) -> None:
    """Store one finished point with ``facts`` about it (seconds, …); what was there and is not whole gives way."""
    with usable(out):
        _write_point(out, point, tables, facts)


def _write_point(out: Path, point: Point, tables: Mapping[str, "pd.DataFrame"], facts: Mapping[str, Any]) -> None:
    points = out / "points"
    temporary = Path(tempfile.mkdtemp(dir=points, prefix=f".{point.key}."))
    try:
        temporary.chmod(0o777 & ~umask())
        checksums = {}
        for name, table in tables.items():
            table.to_parquet(temporary / f"{name}.parquet", index=False)
            sync(temporary / f"{name}.parquet")
            checksums[name] = _checksum(temporary / f"{name}.parquet")
        record = {"key": point.key, **facts, "sha256": checksums}
        (temporary / "point.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        sync(temporary / "point.json")
        sync(temporary)
        while not is_finished(out, point):  # or another process was faster; its numbers are the same
            try:
                os.rename(temporary, points / point.key)
                break
            except OSError as error:
                if error.errno not in OCCUPIED:
                    raise
            _set_aside(points, point.key)
        sync(points)
        (out / "failed" / f"{point.key}.json").unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(points: Path, key: str) -> None:
    """What is there and not whole goes, in one move: another process may be doing the same."""
    damaged = Path(tempfile.mkdtemp(dir=points, prefix=f".{key}.damaged."))
    try:
        os.rename(points / key, damaged / key)
    except FileNotFoundError:
        pass  # the other one was faster
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def is_finished(out: Path, point: Point) -> bool:
    """Is the point there, whole and undamaged?"""
    folder = out / "points" / point.key
    try:
        record = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        sums = record["sha256"]
        return record["key"] == point.key and all(
            isinstance(sums[name], str) and sums[name] == _checksum(folder / f"{name}.parquet") for name in sums
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_failure(out: Path, point: Point, facts: Mapping[str, Any]) -> None:
    """Record a point that failed: what was raised, where, how often it was tried."""
    with usable(out):
        (out / "failed").mkdir(exist_ok=True)
        text = json.dumps({"key": point.key, "point": str(point), **facts}, indent=2, ensure_ascii=False) + "\n"
        write_whole(out / "failed" / f"{point.key}.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_run(out: Path, facts: Mapping[str, Any]) -> None:
    """One more file below runs/: what a run did. Every run of every process has its own."""
    with usable(out):
        (out / "runs").mkdir(exist_ok=True)
        text = json.dumps(dict(facts), indent=2, ensure_ascii=False) + "\n"
        # One process can start twice within the second that ``started`` names.
        name = f"{facts['started'].replace(':', '')}-{facts['host']}-{os.getpid()}-{time.time_ns()}.json"
        write_whole(out / "runs" / name, lambda path: path.write_text(text, encoding="utf-8"))


def collect(out: Path, study: Study) -> int:
    """Write the tables of all finished points of the study together; returns how many points that are.

    Point by point, in the order of their values: no more than one point's table is in memory.
    """
    finished = [point for point in study.points() if is_finished(out, point)]
    finished.sort(key=lambda point: [_orderly(value) for value in study.columns(point).values()])
    for name, spec in study.kind_object.tables.items() if finished else ():
        with usable(out):
            write_whole(out / f"{name}.parquet", partial(_write_together, out, study, finished, name, spec.key))
    return len(finished)


def _orderly(value: Any) -> tuple:
    """Numbers by size, words by letters."""
    return (isinstance(value, str), value)


def _write_together(out: Path, study: Study, points: list[Point], name: str, key: tuple[str, ...], path: Path) -> None:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [out / "points" / point.key / f"{name}.parquet" for point in points]
    schema = pa.unify_schemas([_patiently(pq.read_schema, file) for file in files], promote_options="permissive")
    schema = schema.remove_metadata()  # pandas' own speaks of one point
    with pq.ParquetWriter(path, schema) as writer:
        for file in files:
            frame = _patiently(pd.read_parquet, file)
            order = [column for column in key if column in frame.columns]
            frame = frame.sort_values(order, kind="stable", ignore_index=True) if order else frame
            frame = frame.reindex(columns=schema.names)  # a column that only other points have is empty here
            writer.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))


def _patiently(read, file: Path):
    """Another process may be putting an equal folder in the place of this one: for a moment there is none."""
    for _ in range(20):
        try:
            return read(file)
        except FileNotFoundError:
            time.sleep(0.05)
    return read(file)


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
