"""A user's own data from a file: .npz with arrays x and y, .csv or .parquet with the target columns named."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

EXPECTED = "expected the arrays x [rows, …] and y [rows] or [rows, p], of numbers: np.savez(path, x=…, y=…)"


def read_file(name: str, target: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the file. Raises ValueError that says what the file has and what was expected."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"data.name = {name}: no such file; paths are taken from the current folder, {Path.cwd()}")
    if path.suffix == ".npz":
        return _read_npz(path, name)
    import pandas as pd

    try:
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except Exception as error:  # the parsers of pandas and pyarrow have types of their own
        raise ValueError(f"data.name = {name} cannot be read: {error}; expected a table with named columns") from error
    columns = [column.strip() for column in target.split(",") if column.strip()]
    unknown = [column for column in columns if column not in frame.columns]
    if not columns or unknown:
        raise ValueError(
            f"data.target = {target!r} should name the target column of {name} (several with commas); it has "
            f"{', '.join(map(str, frame.columns[:12]))}"
        )
    inputs = frame.drop(columns=columns)
    if words := _words(inputs):
        raise ValueError(
            f"data.name = {name}: columns {', '.join(words)} are no numbers; encode them, or leave them out"
        )
    targets = frame[columns]
    words = _words(targets)
    if words and len(columns) > 1:
        raise ValueError(
            f"data.target = {target!r}: columns {', '.join(words)} of {name} are no numbers; expected one column of words, or "
            "several of numbers"
        )
    if words and (missing := targets[columns[0]].isna()).any():
        raise ValueError(
            f"data.name = {name}: targets that are missing in {missing.sum()} rows, the first {missing.to_numpy().argmax()}"
        )
    y = targets[columns[0]].to_numpy() if len(columns) == 1 else targets.to_numpy(dtype=np.float64)
    return inputs.to_numpy(dtype=np.float64), y.astype(str) if words else y


def _words(frame: "pd.DataFrame") -> list[str]:
    """The columns that are no numbers."""
    return [str(column) for column in frame.columns if frame[column].dtype.kind not in "biuf"]


def _read_npz(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            whole = zipfile.is_zipfile(file)
        if not whole:  # numpy would take it for a pickle, or for an array without a name
            raise ValueError("it is no archive of arrays, or only the beginning of one")
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in ("x", "y") if key in arrays.files}
            names = ", ".join(arrays.files) or "nothing"
    except Exception as error:  # numpy, zipfile and zlib each have their own for a damaged file
        raise ValueError(f"data.name = {name} cannot be read: {error}; {EXPECTED}") from error
    if len(found) < 2:
        raise ValueError(f"data.name = {name} holds {names}; {EXPECTED}")
    return found["x"], found["y"]
