"""What a data file holds, as part of a study: other content means other numbers."""

import hashlib
from functools import lru_cache
from pathlib import Path


def digest(name: str) -> str:
    """SHA-256 of the file, part of every point's key: other content means other numbers. "" where there is none yet."""
    path = Path(name)
    if not path.is_file():
        return ""
    state = path.stat()
    return _digest(str(path.resolve()), state.st_mtime_ns, state.st_size)


@lru_cache
def _digest(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
