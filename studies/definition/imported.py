"""What a study file names by the place where it is, "package.module:NAME", and how it is called.

It is the user's code: whatever it raises comes out as one ValueError that names the key and the place, with what was raised
as its cause.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def imported(place: str, key: str) -> Any:
    """The object at ``place``, "package.module:NAME"; ``key`` is the key of the study that names it.

    Raises ValueError where there is no such module, where it cannot be run, or has no such name in it.

    >>> imported("math:pi", "loss")
    3.141592653589793
    >>> imported("math:tau_2", "loss")
    Traceback (most recent call last):
    ValueError: loss = math:tau_2 cannot be imported: module 'math' has no attribute 'tau_2'
    """
    module, _, name = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{key} = {place} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # a script without a main guard may end the process
        raise ValueError(f"{key} = {place} cannot be imported: {said(error)}") from error
    try:
        return getattr(found, name)
    except AttributeError as error:
        raise ValueError(f"{key} = {place} cannot be imported: {error}") from error


def signature_of(function: Any, place: str, key: str) -> inspect.Signature | None:
    """The signature of what a study names; None where Python knows none (some built-in functions).

    Raises ValueError where it cannot be called.

    >>> signature_of(3, "mine:net", "model.architecture")
    Traceback (most recent call last):
    ValueError: model.architecture = mine:net is of type int; expected a function or a class
    """
    if not callable(function):
        raise ValueError(f"{key} = {place} is of type {type(function).__name__}; expected a function or a class")
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def called(function: Callable[..., Any], arguments: Mapping[str, Any], place: str, key: str) -> Any:
    """``function(**arguments)``, where ``place`` and ``key`` are what it was imported by.

    Raises ValueError for arguments that it does not take, and from whatever it raises itself.

    >>> called(lambda width: 1 / width, {"width": 2}, "mine:net", "model.architecture")
    0.5
    >>> called(lambda width: 1 / width, {"width": 0}, "mine:net", "model.architecture")
    Traceback (most recent call last):
    ValueError: model.architecture = mine:net: ZeroDivisionError: division by zero
    >>> called(lambda width: 1 / width, {"widht": 0}, "mine:net", "model.architecture")
    Traceback (most recent call last):
    ValueError: model.architecture = mine:net takes (width) and was given widht: missing a required argument: 'width'
    """
    signature = signature_of(function, place, key)
    try:
        if signature is not None:
            signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "nothing"
        raise ValueError(f"{key} = {place} takes {signature} and was given {given}: {error}") from error
    try:
        return function(**arguments)
    except Exception as error:
        raise ValueError(f"{key} = {place}: {said(error)}") from error


def said(error: BaseException) -> str:
    """
    >>> said(KeyError("x")), said(RuntimeError())
    ("KeyError: 'x'", 'RuntimeError')
    """
    return f"{type(error).__name__}: {error}".removesuffix(": ")
