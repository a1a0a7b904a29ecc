"""What the studies in this folder have in common on the command line: a folder to write into, and a quick form."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def options(description: str, name: str, given: Sequence[str] | None = None) -> tuple[Path, bool]:
    """(folder, quick) of ``python -m examples.NAME [FOLDER] [--quick]``; the folder is results/NAME where none is given.

    >>> options("A study.", "routes", ["--quick"])[1]
    True
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results") / name, help="where the figure goes")
    parser.add_argument("--quick", action="store_true", help="the same on less data, in seconds")
    found = parser.parse_args(sys.argv[1:] if given is None else given)
    return found.folder, found.quick
