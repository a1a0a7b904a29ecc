"""Data sets that come from the network, only where a study says ``data.download = true``, and kept in a cache after that."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def downloading(name: str, *, allowed: bool) -> Iterator[None]:
    """One line for what a download may run into: not allowed, no network, a server that does not answer."""
    try:
        yield
    except OSError as error:  # urllib's errors are OSErrors, and so is sklearn's "not found and not to be downloaded"
        if not allowed:
            raise ValueError(_not_allowed(name)) from error
        raise ValueError(
            f"data.name = {name} could not be downloaded ({error}); a machine without network can run it too: "
            "write x and y into a file with numpy.savez on one that has it, and give data.name=FILE.npz"
        ) from error


def _not_allowed(name: str, size: str = "") -> str:
    return (
        f"data.name = {name} is not on this machine and has to be downloaded{f' ({size})' if size else ''}: "
        "write data.download=true to allow it"
    )


def cache_folder() -> Path:
    """Where downloaded sets are kept: $CONTRACTION_STABILITY_DATA, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CONTRACTION_STABILITY_DATA") or Path(home) / "contraction-stability")


def openml(name: str, title: str, version: int, size: str, *, allowed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(x [rows, d] of bytes, y [rows] of labels) of an OpenML set, from the cache or, where allowed, from the network."""
    file = cache_folder() / f"{name}.npz"
    if not file.is_file():
        if not allowed:
            raise ValueError(_not_allowed(name, size))
        from sklearn.datasets import fetch_openml

        from studies.results.whole import write_whole

        with downloading(name, allowed=True):
            x, y = fetch_openml(title, version=version, return_X_y=True, as_frame=False, parser="liac-arff")
        file.parent.mkdir(parents=True, exist_ok=True)
        x, y = np.asarray(x, np.uint8), np.asarray(y).astype(np.int64)

        def save(path: Path) -> None:
            with path.open("wb") as target:  # given a name, numpy would add .npz to it
                np.savez_compressed(target, x=x, y=y)

        write_whole(file, save)
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["x"], arrays["y"]
