"""What a study file names by the place where it is: "package.module:NAME"."""

import importlib
from typing import Any


def imported(place: str, key: str) -> Any:
    """The object at ``place``, "package.module:NAME"; ``key`` is the key of the study that names it.

    Raises ValueError where there is no such module, or no such name in it.

    >>> imported("math:pi", "loss")
    3.141592653589793
    >>> imported("math:tau_2", "loss")
    Traceback (most recent call last):
    ValueError: loss = math:tau_2 cannot be imported: module 'math' has no attribute 'tau_2'
    """
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key} = {place} cannot be imported: {error}") from error
