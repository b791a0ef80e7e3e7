"""bitsandbytes warns at every call of an int8 module that inputs are rounded to float16: here it is told once."""

import logging
from functools import cache

_LOGGER = "bitsandbytes.autograd._functions"
_REPEATED = "inputs will be cast"


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._was_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if _REPEATED not in str(record.msg):
            return True
        was_told, self._was_told = self._was_told, True
        return not was_told


@cache
def warn_of_casts_once() -> None:
    """Let the warning through once in this process; a server would log it hundreds of times for each token."""
    logging.getLogger(_LOGGER).addFilter(_Once())
