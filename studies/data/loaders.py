"""x and y as scikit-learn's loaders and the user's functions return them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from studies.definition.imported import called, said, signature_of
from studies.definition.training import Data

OWN = "load it in a function of your own, data.name=package.module:function"
# Arguments of scikit-learn's loaders that a study does not give under [data.arguments].
DECIDED = ("return_X_y", "download_if_missing")


def from_sklearn(data: Data) -> tuple[Any, Any]:
    """(x, y) of the loader or fetcher of sklearn.datasets that ``data.name`` is, with or without its load_ or fetch_.

    Nothing is downloaded unless ``data.download`` says so. Raises ValueError for a loader that there is not, that does not
    return (x, y), or that does not take ``data.arguments``.
    """
    from sklearn import datasets

    from studies.data.download import downloading

    bare = data.name.removeprefix("load_").removeprefix("fetch_")
    names = [data.name] if data.name != bare else [f"load_{bare}", f"fetch_{bare}"]
    found = next((name for name in names if name in dir(datasets)), None)
    if found is None:
        raise ValueError(f"data.name = {data.name}: sklearn.datasets has no {' or '.join(names)}")
    function, fetches = getattr(datasets, found), found.startswith("fetch_")
    takes = signature_of(function, data.name, "data.name").parameters
    if "return_X_y" not in takes:
        raise ValueError(
            f"data.name = {data.name} does not return (x, y): sklearn.datasets.{found} has no return_X_y; {OWN}"
        )
    if unknown := [name for name in data.arguments if name not in takes or name in DECIDED]:
        known = ", ".join(name for name in takes if name not in DECIDED)
        raise ValueError(f"data.arguments.{unknown[0]}: sklearn.datasets.{found} takes {known}")
    arguments: dict[str, Any] = {"return_X_y": True}
    if "as_frame" in takes:
        arguments["as_frame"] = False  # fetch_openml's own choice are tables, with words in them
    if fetches and not data.download:
        if "download_if_missing" not in takes:  # it cannot be asked to leave the network alone
            raise ValueError(f"data.name = {data.name} asks a server: write data.download=true to allow it")
        arguments["download_if_missing"] = False
    with downloading(data.name, allowed=data.download) if fetches else nullcontext():
        try:
            return function(**arguments | data.arguments)
        except Exception as error:
            if fetches and isinstance(error, OSError):
                raise
            raise ValueError(f"data.name = {data.name}: {said(error)}") from error


def from_function(function: Callable[..., Any], data: Data) -> tuple[Any, Any]:
    """(x, y) of the user's function, or of the torch Dataset that it returns.

    Raises ValueError, with what the function or its Dataset raised as its cause.
    """
    place, key = data.name, "data.name"
    found = called(function, data.arguments, place, key)
    if isinstance(found, tuple) and len(found) == 2:
        return found
    if isinstance(found, tuple) or not (hasattr(found, "__len__") and hasattr(found, "__getitem__")):
        raise ValueError(
            f"{key} = {place} returned {_described(found)}; expected (x, y) or a torch Dataset with a length"
        )
    try:
        rows = [found[i] for i in range(len(found))]
    except Exception as error:
        raise ValueError(f"{key} = {place}: a row of its {type(found).__name__}: {said(error)}") from error
    for index, row in enumerate(rows):
        if not (isinstance(row, tuple | list) and len(row) == 2):
            kind = type(found).__name__
            raise ValueError(f"{key} = {place}: row {index} of its {kind} is {_described(row)}; expected a pair (x, y)")
    return [x for x, _ in rows], [y for _, y in rows]


def as_array(values: Any, what: str, data: Data) -> np.ndarray:
    """``values``, an array or the rows of one. Raises ValueError where they make none."""
    if hasattr(values, "toarray"):  # scipy's; np.asarray would put it whole into one cell
        raise ValueError(
            f"data.name = {data.name}: {what} are a sparse matrix {values.shape}; expected a dense array; {OWN}"
        )
    try:
        return (
            np.stack([np.asarray(row) for row in values]) if isinstance(values, list) and values else np.asarray(values)
        )
    except Exception as error:
        raise ValueError(f"data.name = {data.name}: {what} make no array: {said(error)}") from error


def _described(found: Any) -> str:
    """
    >>> _described(3), _described((1, "a"))
    ('a int', 'a tuple of 2 (int, str)')
    """
    name = f"a {type(found).__name__}"
    if isinstance(found, tuple | list):
        kinds = ", ".join(type(part).__name__ for part in found[:5])
        return f"{name} of {len(found)} ({kinds}{', …' if len(found) > 5 else ''})"
    return name
