"""Where results come from: versions, commit, machine, date, command. Stored with every run."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("contraction-stability", "torch", "numpy", "scipy", "pandas", "scikit-learn")


def provenance(command: Sequence[str] | None = None) -> dict[str, str]:
    """Facts about this run as plain text.

    >>> sorted(provenance(["stability", "run", "digits"]))[:4]
    ['command', 'commit', 'contraction-stability', 'date']
    """
    facts = {
        "command": shlex.join(sys.argv if command is None else command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent.parent) or "not in a git checkout",
    }
    return facts | {package: _version(package) for package in PACKAGES}


def commit(folder: Path) -> str | None:
    """The git commit of the source in ``folder``, marked "+changes" when files differ; None outside a checkout.

    A package installed below somebody else's checkout has no commit of its own: its files must be tracked.
    """

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(folder), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
