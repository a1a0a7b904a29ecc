"""Are the sibling packages ours? A user's own folder called ``optim`` or ``studies`` may come first on ``sys.path``."""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path


def check_not_shadowed(package_file: str, names: Iterable[str]) -> None:
    """Raise an ImportError that names the shadowing file when a sibling package would come from elsewhere.

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
