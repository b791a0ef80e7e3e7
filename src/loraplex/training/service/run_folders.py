"""The runs that are on disk, whether they are in memory or not."""

import logging
from pathlib import Path

from loraplex.errors import CheckpointError, RequestError
from loraplex.training.service.checkpoints import is_run_id
from loraplex.training.service.journal import Journal
from loraplex.training.service.settings import RunSettings

logger = logging.getLogger(__name__)

_MAX_KNOWN = 4096


class RunFolders:
    """Those below one folder. Safe to use from many threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, RunSettings] = {}  # which never change

    def folder(self, run_id: str) -> Path:
        return self._root / run_id

    def has(self, run_id: str) -> bool:
        return is_run_id(run_id) and Journal.exists(self.folder(run_id))

    def settings(self, run_id: str) -> RunSettings:
        """Raises RequestError for an unknown run, and CheckpointError."""
        if not self.has(run_id):
            raise RequestError(f"there is no training run {run_id[:100]!r}. Create one with create_model.")
        found = self._known.get(run_id)
        if found is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known = {}
            found = self._known[run_id] = Journal(self.folder(run_id)).settings()
        return found

    def all_settings(self) -> list[RunSettings]:
        """Of all runs, newest first; a damaged one is told in the log, and hides no other."""
        found = []
        for folder in self._root.glob("s-*"):
            try:
                if self.has(folder.name):
                    found.append(self.settings(folder.name))
            except CheckpointError as error:
                logger.warning("%s", error)
        return sorted(found, key=lambda own: -own.created)

    def last_heard(self, run_id: str) -> float:
        """When a run had its last request, in seconds since 1970."""
        return Journal(self.folder(run_id)).last_changed()
