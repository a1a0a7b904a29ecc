"""A user's own data from a file: .npz with arrays x and y, .csv or .parquet with the target columns named."""

from pathlib import Path

import numpy as np


def read_file(name: str, target: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the file. Raises ValueError that says what the file has and what was expected."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"data.name = {name}: no such file; paths are taken from the current folder, {Path.cwd()}")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                missing = [key for key in ("x", "y") if key not in arrays.files]
                if missing:
                    raise ValueError(
                        f"data.name = {name} holds {', '.join(arrays.files)}; expected the arrays x [rows, …] and y [rows] or "
                        "[rows, p]: np.savez(path, x=…, y=…)"
                    )
                return arrays["x"], arrays["y"]
        except (OSError, EOFError) as error:
            raise ValueError(f"data.name = {name} is no .npz file: {error}") from error
    import pandas as pd

    try:
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors, pyarrow's OSErrors
        raise ValueError(f"data.name = {name} cannot be read: {error}") from error
    columns = [column.strip() for column in target.split(",") if column.strip()]
    unknown = [column for column in columns if column not in frame.columns]
    if not columns or unknown:
        raise ValueError(
            f"data.target = {target!r} should name the target column of {name} (several with commas); it has "
            f"{', '.join(map(str, frame.columns[:12]))}"
        )
    inputs = frame.drop(columns=columns)
    words = [str(column) for column in inputs.columns if inputs[column].dtype.kind not in "biuf"]
    if words:
        raise ValueError(
            f"data.name = {name}: columns {', '.join(words)} are no numbers; encode them, or leave them out"
        )
    y = frame[columns[0]].to_numpy() if len(columns) == 1 else frame[columns].to_numpy(dtype=np.float64)
    return inputs.to_numpy(dtype=np.float64), y if y.dtype.kind in "biuf" else y.astype(str)
