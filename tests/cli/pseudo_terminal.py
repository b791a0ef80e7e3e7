"""A program on a terminal of 80 columns that a test types into."""

import os
import pty
import select
import signal
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

TIMEOUT_S = 120


class Dialogue:
    """Starts the program; leaving the block ends it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execve(command[0], list(command), {**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment})
        self._seen = ""

    def __enter__(self) -> "Dialogue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._terminal)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to the text, which comes after all that was waited for before."""
        end = time.monotonic() + TIMEOUT_S
        while text not in self._seen and time.monotonic() < end:
            self._read()
        before, found, self._seen = self._seen.partition(text)
        assert found, f"{text!r} doesn't come: {before!r}"
        return before

    def status(self) -> int:
        """The program's exit status, when it has ended."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            self._read()
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"the program doesn't end: {self._seen!r}")

    def _read(self) -> None:
        ready, _, _ = select.select([self._terminal], [], [], 0.1)
        try:
            self._seen += os.read(self._terminal, 4096).decode(errors="replace") if ready else ""
        except OSError:  # the program has ended
            time.sleep(0.1)
