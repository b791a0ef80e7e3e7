"""A job's log: one JSON object for each step and each evaluation, beside the adapter's folder."""

import json
import os
from pathlib import Path
from typing import Any

from loraplex.output_files import writing


class JobLog:
    """Appends lines to `<output>/<name>.jsonl`; a resumed run cuts off what its checkpoint doesn't know of.

    Raises OutputError where it can't be written.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path = path
        self._enabled = enabled
        self.num_bytes = 0

    def start(self, num_bytes: int) -> None:
        """Keep the first `num_bytes` of the file and go on from there."""
        self.num_bytes = num_bytes
        if not self._enabled:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                self.num_bytes = min(num_bytes, file.tell())  # it may have been removed meanwhile
                file.truncate(self.num_bytes)

    def write(self, entry: dict[str, Any]) -> None:
        line = (json.dumps(entry) + "\n").encode()
        self.num_bytes += len(line)
        if self._enabled:
            with writing(self.path), self.path.open("ab") as file:
                file.write(line)

    def sync(self) -> None:
        """Bring the lines to the disk: before the checkpoint that counts them."""
        if self._enabled:
            with writing(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())
