"""A folder of adapters that is watched: what appears there is loaded, what changes replaced, what goes unloaded."""

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.leftovers import restore_all_replaced
from loraplex.adapters.names import check_name
from loraplex.adapters.store.version import Fingerprint, folder_fingerprint
from loraplex.errors import ConfigError, LoraplexError
from loraplex.models.multi_lora import MultiLoraModel

logger = logging.getLogger(__name__)

_CONFIG_FILE = "adapter_config.json"
_TIMES_MISSING = 2  # looks: a folder that is being replaced is away for a moment


@dataclass
class _Seen:
    fingerprint: Fingerprint | None  # None: to be read again, whatever its files are
    is_loaded: bool
    times_missing: int = 0


class AdapterWatcher:
    """Keeps a model's adapters as they are in a folder; `names` is the subfolder's path, "team/protein" for example.

    Running requests finish with the version that they began with. A subfolder that can't be loaded, whatever is raised,
    is logged, told by `errors`, and tried again when its files change; what was loaded under its name stays. Where a
    whole look fails, `fault` tells how, until one succeeds. Adapters that were loaded by other means are left alone.
    """

    def __init__(self, model: MultiLoraModel, folder: str | Path, *, interval_s: float = 1.0) -> None:
        self._model = model
        self._folder = Path(os.path.expanduser(folder))
        self._interval_s = interval_s
        self._seen: dict[str, _Seen] = {}
        self.errors: dict[str, str] = {}
        self.fault: str | None = None
        self._unreadable: set[str] = set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if not self._folder.is_dir():
            raise ConfigError(f"{str(self._folder)!r} is no folder, so it can't be watched. Make it first.")
        if not interval_s > 0:
            raise ConfigError(f"interval_s is {interval_s!r}; it must be above 0.")

    def start(self) -> None:
        """Look once, then go on looking in the background, whatever the first look finds."""
        self._look_on()
        self._thread = threading.Thread(target=self._watch, name="loraplex-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; adapters stay loaded."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Load, replace and unload what changed since the last look."""
        restore_all_replaced(self._folder)  # at any time a writer may have been killed while its folder was away
        found, unreadable = self._adapter_folders()
        for name in self._unreadable - set(unreadable):
            self.errors.pop(name, None)
        self._unreadable = set(unreadable)
        for name, folder in sorted(found.items()):
            try:
                fingerprint = folder_fingerprint(folder)
            except Exception as error:  # a file that is a link to itself, for example
                self._tell(name, error)
                continue
            known = self._seen.get(name)
            if known is not None and known.fingerprint == fingerprint:
                known.times_missing = 0
                continue
            self._load(name, folder, fingerprint, was_loaded=known is not None and known.is_loaded)
        for name in self._seen.keys() - found.keys():
            if not any(name == other or name.startswith(f"{other}/") for other in unreadable):
                self._miss(name)

    def _adapter_folders(self) -> tuple[dict[str, Path], list[str]]:
        """Adapters by name, and folders that can't be read, whose adapters stay: what isn't seen need not be gone.

        What begins with a dot is half written, or aside to be removed, and may go at any time.
        """
        found = {}
        unreadable: list[str] = []

        def note(error: OSError) -> None:
            if Path(error.filename) == self._folder:
                raise error
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                name = Path(error.filename).relative_to(self._folder).as_posix()
                unreadable.append(name)
                self._tell(name, error)

        for path, folders, files in os.walk(self._folder, onerror=note):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            folder = Path(path)
            if _CONFIG_FILE in files and folder != self._folder:
                found[folder.relative_to(self._folder).as_posix()] = folder
        return found, unreadable

    def _load(self, name: str, folder: Path, fingerprint: Fingerprint, *, was_loaded: bool) -> None:
        is_loaded = was_loaded
        seen: Fingerprint | None = fingerprint
        try:
            check_name(name)
            self._model.load_adapter(name, folder, replace=was_loaded)
            is_loaded = True
            self.errors.pop(name, None)
            logger.info("%s adapter %r from %s", "replaced" if was_loaded else "loaded", name, folder)
        except Exception as error:  # one folder must not end the watch over all others
            self._tell(name, error)
            if folder_fingerprint(folder) != fingerprint:  # what was read is not what was looked at: try again
                seen = None
        self._seen[name] = _Seen(seen, is_loaded)

    def _miss(self, name: str) -> None:
        seen = self._seen[name]
        seen.times_missing += 1
        if seen.times_missing < _TIMES_MISSING:
            return
        try:
            if seen.is_loaded and name in self._model.store:
                self._model.unload(name)
        except Exception as error:  # a mixture needs it
            self._tell(name, error)
            return
        self.errors.pop(name, None)
        del self._seen[name]

    def _tell(self, name: str, error: Exception) -> None:
        """Log an error and keep it; one that is repeated at every look is logged once."""
        text = str(error) if isinstance(error, LoraplexError) else f"{type(error).__name__}: {error}"
        if self.errors.get(name) != text:
            is_expected = isinstance(error, LoraplexError | OSError)
            logger.warning("adapter %r was not loaded: %s", name, text, exc_info=None if is_expected else error)
        self.errors[name] = text

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._look_on()

    def _look_on(self) -> None:
        """Look, and live on: nobody would see that this thread is gone."""
        try:
            self.look()
            self.fault = None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != self.fault:
                logger.error("the watched folder %s can't be looked at: %s", self._folder, text, exc_info=error)
            self.fault = text
