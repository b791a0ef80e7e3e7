"""One version of a named adapter, and the tiers it may be in: who is in slots and host memory, and who leaves."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slots import Slots
from loraplex.adapters.vocabulary import Vocabulary
from loraplex.adapters.weights import Adapter
from loraplex.errors import CapacityError
from loraplex.validation import listed

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
    changed: frozenset[str] = frozenset()  # modules whose own weights it changes, by path
    invocation: tuple[int, ...] | None = None  # aLoRA
    is_dora: bool = False
    end_tokens: tuple[int, ...] = ()  # that end its answers, besides the base model's
    vocabulary: Vocabulary | None = None  # in the place of the base model's tokens
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


class SlotTier:
    """Fills slots within their number and a budget of bytes; the store's lock guards it."""

    def __init__(self, slots: Slots, budget_bytes: int | None) -> None:
        self._slots = slots
        self._budget = budget_bytes
        self._held: dict[int, AdapterVersion] = {}
        self.num_loads = 0
        self.num_evictions = 0

    def check_room(self, newcomers: Sequence[AdapterVersion]) -> None:
        """Raise CapacityError, before anything moves, unless the newcomers fit beside what is in use."""
        needed = [version for version in self._held.values() if not version.evictable] + list(newcomers)
        if len(needed) > self._slots.num_slots or self._is_over_budget(needed):
            raise self._no_slots_for(newcomers)

    def fill(self, version: AdapterVersion, by_last_use: Iterable[AdapterVersion]) -> None:
        """Put a version into a slot; of `by_last_use`, the first that isn't in use leaves if there is no room."""
        assert version.prepared is not None, f"{version.name!r} left host memory while it was leased"
        while len(self._held) == self._slots.num_slots or self._is_over_budget([*self._held.values(), version]):
            idle = next((other for other in by_last_use if other.slot is not None and other.evictable), None)
            if idle is None:
                raise self._no_slots_for([version])
            self.leave(idle)
            self.num_evictions += 1
        slot = next(slot for slot in range(self._slots.num_slots) if slot not in self._held)
        self._slots.put(slot, version.prepared)
        self._held[slot] = version
        version.slot = slot
        self.num_loads += 1

    def leave(self, version: AdapterVersion) -> None:
        """Free a version's slot, if it has one."""
        if version.slot is not None:
            self._slots.clear(version.slot)
            del self._held[version.slot]
            version.slot = None

    def _is_over_budget(self, versions: Sequence[AdapterVersion]) -> bool:
        return self._budget is not None and sum(version.num_bytes for version in versions) > self._budget

    def _no_slots_for(self, newcomers: Sequence[AdapterVersion]) -> CapacityError:
        busy = sorted(version.name for version in self._held.values() if not version.evictable)
        return CapacityError(
            f"not enough slots for {listed(v.name for v in newcomers)} ({sum(v.num_bytes for v in newcomers)} bytes): "
            f"of {self._slots.num_slots} slots (budget {self._budget} bytes) {len(busy)} are in use or pinned "
            f"by {listed(busy) or 'none'}. Use fewer adapters at once, unpin some, or raise StoreConfig.num_slots or "
            "slot_bytes."
        )


class HostTier:
    """Versions with their weights, in order of last use; the store's lock guards it."""

    def __init__(self, budget_bytes: int | None) -> None:
        self._budget = budget_bytes
        self._held: dict[int, AdapterVersion] = {}  # by id()

    def __iter__(self) -> Iterator[AdapterVersion]:
        """The least recently used first."""
        return iter(self._held.values())

    def keep(self, version: AdapterVersion, prepared: PreparedAdapter) -> None:
        """Hold a version's weights; it is the most recently used one now."""
        version.prepared = prepared
        self._held.pop(id(version), None)
        self._held[id(version)] = version

    def leave(self, version: AdapterVersion) -> None:
        """Let the weights go; they are freed with their last user."""
        self._held.pop(id(version), None)
        version.prepared = None

    def leaving_for(self, newcomer: AdapterVersion, replaced: AdapterVersion | None = None) -> list[AdapterVersion]:
        """Who must leave so that the newcomer fits; `replaced` leaves anyway, unless it is in use.

        Raises CapacityError if not enough can leave: what is in use, pinned, or can't be read back stays.
        """
        if self._budget is None:
            return []
        staying = [version for version in self if not (version is replaced and version.num_leases == 0)]
        used = sum(version.num_bytes for version in staying)
        leaving = []
        for version in staying:
            if used + newcomer.num_bytes <= self._budget:
                break
            if version.evictable and version.folder is not None:
                leaving.append(version)
                used -= version.num_bytes
        if used + newcomer.num_bytes > self._budget:
            raise CapacityError(
                f"no host memory for adapter {newcomer.name!r} ({newcomer.num_bytes} bytes): {used} of {self._budget} "
                "bytes are in use by running requests, pinned adapters or adapters without a folder to be read back "
                "from. Raise StoreConfig.host_bytes, or unpin or unload some."
            )
        return leaving
