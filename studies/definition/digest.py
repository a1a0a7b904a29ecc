"""What a data file holds, in one short text."""

import hashlib
import time
from functools import lru_cache
from pathlib import Path

# Seconds within which a second write may leave the clock of the file system, and so the time of change, where it was.
SETTLED = 2


def digest(name: str) -> str:
    """SHA-256 of the file, part of every point's key: other content means other numbers. "" where there is none yet."""
    path = Path(name)
    if not path.is_file():
        return ""
    state = path.stat()
    if time.time_ns() - state.st_mtime_ns < SETTLED * 10**9:
        return _read(str(path))  # it may change again without a trace
    return _digest(str(path.resolve()), state.st_mtime_ns, state.st_size)


@lru_cache
def _digest(path: str, changed: int, size: int) -> str:
    return _read(path)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
