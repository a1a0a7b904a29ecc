"""Files that are whole or absent: written beside their place, synced, then renamed. And what a disk may refuse."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}


class FolderError(ValueError):
    """The output folder cannot be used: foreign, of another study, or not writable."""


class DiskFullError(OSError):
    """No room is left for the results: not the input's fault, and the same command continues once there is."""


@contextmanager
def usable(out: str | Path) -> Iterator[None]:
    """What the system refuses in the folder ``out``, in one line: FolderError, or DiskFullError when it has no room."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                f"the disk of {out} is full; make room and give the same command again, finished points are kept"
            ) from error
        file = Path(os.fsdecode(error.filename)).name if isinstance(error.filename, str | bytes) else ""
        what = f" ({file})" if file and not file.startswith(".") and file != Path(out).name else ""
        raise FolderError(f"cannot use the folder {out}: {error.strerror or error}{what}; give another one") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then put it there in one move: whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        sync(temporary)
        temporary.chmod(0o666 & ~umask())  # mkstemp's own mode is for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file to the disk; a folder too, where the system can open one."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
