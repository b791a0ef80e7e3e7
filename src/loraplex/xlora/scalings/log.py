"""The scalings of every row that a mixture ran, kept while logging is on.

The functions are those of the original X-LoRA package and of PEFT (enable, disable, clear, get, bucketed,
flush to a file, load again); an entry is one row without padding, where theirs is a padded batch.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from torch import Tensor

from loraplex.errors import ConfigError, ScalingsError
from loraplex.xlora.scalings.file import read_scalings, write_scalings
from loraplex.xlora.scalings.row_scalings import RowScalings


class ScalingsLog:
    """A log of scalings, off at first; any thread may call any of its methods.

    With `max_tokens` (a token takes lora_layers * experts * 4 bytes) the oldest entries go when a new one
    needs their room, and are counted in `num_dropped`: a log is for watching, so it must not fail the
    request that it watches.
    """

    def __init__(self, *, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1, or None for no limit.")
        self.max_tokens = max_tokens
        self.num_dropped = 0  # entries, since the log was last cleared
        self._is_enabled = False
        self._entries: deque[RowScalings] = deque()
        self._num_tokens = 0
        self._lock = threading.Lock()

    @property
    def is_enabled(self) -> bool:
        return self._is_enabled

    @property
    def num_tokens(self) -> int:
        """Of all entries together."""
        return self._num_tokens

    def __len__(self) -> int:
        return len(self._entries)

    def enable(self) -> None:
        """Start to log; entries of before stay."""
        with self._lock:
            self._is_enabled = True

    def disable(self) -> None:
        """Stop to log; entries stay."""
        with self._lock:
            self._is_enabled = False

    def clear(self) -> None:
        """Forget all entries; logging stays on or off."""
        with self._lock:
            self._clear()

    def record(self, rows: Sequence[RowScalings]) -> None:
        """Add a copy of each row on the CPU; nothing happens while the log is off."""
        if not self._is_enabled:
            return
        copies = [replace(row, values=row.values.to("cpu", copy=True)) for row in rows]
        with self._lock:
            if self._is_enabled:
                self._append(copies)

    def entries(self) -> list[RowScalings]:
        """The rows in the order they were recorded; the list is the caller's."""
        with self._lock:
            return list(self._entries)

    def bucketed(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """For each number of tokens: positions in `entries()`, and values [tokens, lora_layers, experts]."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, row in enumerate(self.entries()):
            positions, values = buckets.setdefault(row.num_tokens, ([], []))
            positions.append(position)
            values.append(row.values)
        return buckets

    def flush(self, path: str | Path) -> int:
        """Move all entries into the one safetensors file `path`; return how many they were.

        The file is replaced as a whole. Raises ScalingsError for an empty log and ScalingsFileError if the
        file can't be written; the entries stay in the log then.
        """
        with self._lock:  # held while writing, so that what is cleared is what was written
            if not self._entries:
                raise ScalingsError(
                    f"the scalings log is empty, so {path} was not written. Call enable() and run rows."
                )
            write_scalings(list(self._entries), path)
            num_entries = len(self._entries)
            self._clear()
        return num_entries

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return a log, off, with the entries that were flushed to `path`; raises ScalingsFileError."""
        log = cls()
        log._append(read_scalings(path))
        return log

    def _append(self, rows: Sequence[RowScalings]) -> None:
        self._entries.extend(rows)
        self._num_tokens += sum(row.num_tokens for row in rows)
        while self.max_tokens is not None and self._num_tokens > self.max_tokens:
            self._num_tokens -= self._entries.popleft().num_tokens
            self.num_dropped += 1

    def _clear(self) -> None:
        self._entries.clear()
        self._num_tokens = self.num_dropped = 0
