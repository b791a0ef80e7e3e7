"""SIGTERM and ctrl-C while a run trains: its step is finished and saved first, so that it goes on exactly there."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class StopRequest:
    """Which signal asked for the end of a run, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def came(self) -> bool:
        return self.signal is not None

    def end(self) -> None:
        """Raise what the signal asks for: SystemExit(143) of SIGTERM, KeyboardInterrupt of ctrl-C."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)  # what a shell sees of a process that SIGTERM ended

    def note(self, number: int, frame: FrameType | None) -> None:
        """A second signal doesn't wait."""
        again, self.signal = self.came, signal.Signals(number)
        if again:
            self.end()
        logger.warning("%s: the step is finished and saved first; once more ends it at once", self.signal.name)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block the signals are noted, unless the program takes them itself or this isn't its main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number in _SIGNALS if before[number] in _DEFAULTS]
    for number in taken:
        signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number in taken:
            signal.signal(number, before[number])
