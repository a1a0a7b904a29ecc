"""A contender in another process, asked one JSON line at a time, so that its turns can stand between ours."""

import json
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

CLOSING_SECONDS = 10


class WorkerError(RuntimeError):
    """The worker said that it cannot, died, or did not answer in time."""


class Worker:
    """A process that answers each request line ``{"do": …}`` by one line ``{"ok": …}`` or ``{"error": …}``.

    ``command`` is started at once and must say ready first. A request that takes longer than ``timeout`` seconds ends
    the process.

    >>> import sys
    >>> echo = "import sys; print('{\\"ok\\": 1}', flush=True); [print(s, end='', flush=True) for s in sys.stdin]"
    >>> with Worker([sys.executable, "-c", echo]) as worker:
    ...     worker.ask(ok=2)
    2
    """

    def __init__(self, command: Sequence[str], timeout: float = 120.0, environment: dict[str, str] | None = None):
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in close()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            env=environment,
        )
        try:
            self._reply()
        except WorkerError:
            self.close()
            raise

    def ask(self, **request: Any) -> Any:
        """The answer; WorkerError with the worker's own words where it has none."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
        except (OSError, ValueError) as error:
            raise WorkerError(f"the worker is gone: {self._last_words()}") from error
        return self._reply()

    def _reply(self) -> Any:
        late = threading.Timer(self.timeout, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            in_time = not late.finished.is_set()
            late.cancel()
        if not line:
            self._process.wait(CLOSING_SECONDS)
            raise WorkerError(f"died: {self._last_words()}" if in_time else f"no answer within {self.timeout:.0f} s")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["ok"]

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [f"exit status {self._process.poll()}"]
        return lines[-1]

    def close(self) -> None:
        """End the process, by closing its input first."""
        if not self._process.stdin.closed:
            with suppress(OSError):  # it died with a request in the pipe
                self._process.stdin.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(CLOSING_SECONDS)
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()
