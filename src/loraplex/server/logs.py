"""Logs as JSON, one object a line, on standard error. Never secrets; prompts only if that is set."""

import json
import logging
import sys
import threading
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({})))


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        fields.pop("color_message", None)  # uvicorn's
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def set_up_logs(level: str) -> None:
    """Send all logs to standard error in one format: loraplex's and uvicorn's from `level` on, others' warnings.

    The server writes its own line for a request. Errors that nobody caught in a thread are logged too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.root.handlers = [handler]
    logging.root.setLevel("WARNING")
    for known in list(logging.root.manager.loggerDict.values()):
        if isinstance(known, logging.Logger):  # libraries bring handlers of their own
            known.handlers, known.propagate = [], True
    for name in ("loraplex", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("uvicorn.access").propagate = False
    logging.captureWarnings(True)
    threading.excepthook = _log_uncaught


def _log_uncaught(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        name = "" if failed.thread is None else failed.thread.name
        logging.getLogger(__name__).error("a thread failed", exc_info=failed.exc_value, extra={"thread_name": name})
