"""One version of a named adapter and where it is."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.weights import Adapter

Tier = Literal["slot", "host", "disk"]
Fingerprint = tuple[tuple[str, int, int], ...]  # name, size and modification time of each file


@dataclass(frozen=True, kw_only=True)
class AdapterState:
    """What `model.adapters()` tells about one adapter."""

    name: str
    version: int
    tier: Tier
    num_bytes: int
    pinned: bool
    num_leases: int  # requests that run with it now
    folder: str | None

    def as_json(self) -> dict[str, str | int | bool | None]:
        return asdict(self)


@dataclass(eq=False, kw_only=True)
class AdapterVersion:
    """Changed only by the store, under its lock; the weights it points to never change."""

    name: str
    number: int
    folder: Path | None
    fingerprint: Fingerprint | None
    num_bytes: int
    modules: frozenset[int]  # that it adapts, by index
    invocation: tuple[int, ...] | None = None  # aLoRA
    end_tokens: tuple[int, ...] = ()  # that end its answers, besides the base model's
    original: Adapter | None = None  # as it was given, if no folder has it
    read_back: Callable[[], PreparedAdapter] | None = None  # faster than reading it as a new one, where that is known
    prepared: PreparedAdapter | None = None  # in host memory
    slot: int | None = None
    num_leases: int = 0
    pinned: bool = False
    retired: bool = False  # replaced or unloaded, kept only for its leases

    @property
    def evictable(self) -> bool:
        return self.num_leases == 0 and not self.pinned

    def state(self) -> AdapterState:
        tier: Tier = "disk" if self.prepared is None else "host" if self.slot is None else "slot"
        return AdapterState(
            name=self.name,
            version=self.number,
            tier=tier,
            num_bytes=self.num_bytes,
            pinned=self.pinned,
            num_leases=self.num_leases,
            folder=None if self.folder is None else str(self.folder),
        )


def folder_fingerprint(folder: Path) -> Fingerprint:
    """Names, sizes and modification times of an adapter's files; empty if the folder is gone.

    A file without a status, such as a link to itself, counts as empty.
    """
    if not folder.is_dir():
        return ()
    entries = []
    with suppress(FileNotFoundError):  # it is being replaced or removed: not the same, whatever it was
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
            try:
                status = path.stat()
            except FileNotFoundError:
                raise
            except OSError:
                entries.append((path.name, 0, 0))
                continue
            entries.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(entries)
