"""What can go wrong that is not the caller's fault, and how a wrong name is answered."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely meant, or None.

    >>> nearest("identiy", ["identity", "squared"]), nearest("zzz", ["identity"])
    ('identity', None)
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The text for a name that is not among ``known``.

    >>> unknown_name("scale", "means", ["mean", "sum"])
    "unknown scale 'means'; known are 'mean', 'sum'; did you mean 'mean'?"
    """
    known = list(known)
    close = nearest(name, known)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"unknown {what} {name!r}; known are {', '.join(map(repr, known))}{hint}"


class NumericalError(RuntimeError):
    """The arithmetic failed although the input was well formed.

    ``where`` names the place (layer, step), ``value`` is the number that tells how badly.

    >>> str(NumericalError("inner system is not positive definite", where="layer '0'", value=-1e-3))
    "layer '0': inner system is not positive definite (-0.001)"
    """

    def __init__(self, message: str, *, where: str = "", value: float | None = None):
        self.where, self.value = where, value
        super().__init__((f"{where}: " if where else "") + message + (f" ({value:.3g})" if value is not None else ""))
