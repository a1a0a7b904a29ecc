"""What the packages of the house share: names that load on first use, and the check that siblings are ours."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def lazy_names(package: str, home: Mapping[str, str]) -> tuple[Callable, Callable, list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package (PEP 562) whose public names load on first use.

    ``home`` maps each name to the module that defines it.

    >>> get, names, _ = lazy_names("some_package", {"OrderedDict": "collections"})
    >>> get("OrderedDict").__name__, names()
    ('OrderedDict', ['OrderedDict'])
    """

    def __getattr__(name: str):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    names = sorted(home)
    return __getattr__, lambda: names, names


def check_not_shadowed(package_file: str, names: Iterable[str]) -> None:
    """Raise an ImportError that names the shadowing file when a sibling package would come from elsewhere.

    A user's own folder called ``optim`` or ``studies`` may come first on ``sys.path``.

    ``package_file`` is the caller's ``__file__``; the siblings ``names`` are expected beside its folder. Nothing is
    imported. A folder without ``__init__.py`` shadows too where the installed package is found after ``sys.path``.

    >>> check_not_shadowed(__file__, ["optim", "stability"])
    """
    home = Path(package_file).resolve().parent.parent
    for name in names:
        found = _location(name)
        if found is None:
            raise ImportError(f"{name} is missing beside {home}: install contraction-stability again", name=name)
        folder = found.parent if found.name == "__init__.py" else found
        if folder.resolve() != home / name:
            raise ImportError(
                f"{found} hides contraction-stability's own {home / name}: "
                f"rename it, or take {folder.parent} off sys.path",
                name=name,
                path=str(found),
            )


def _location(name: str) -> Path | None:
    """What ``import name`` gives: .../name/__init__.py, .../name.py, or the folder when it has no ``__init__.py``."""
    spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    return Path(spec.origin) if spec.has_location else Path(next(iter(spec.submodule_search_locations)))
