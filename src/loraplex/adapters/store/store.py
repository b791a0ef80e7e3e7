"""Every loaded adapter, in tiers: slots on the device, host memory, disk.

A name points to its newest version. A request leases the versions it starts with: until the lease ends they
keep their slots, whatever is loaded, replaced or unloaded meanwhile.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.names import check_name
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slots import Slots
from loraplex.adapters.store.version import (
    AdapterState,
    AdapterVersion,
    Fingerprint,
    HostTier,
    SlotTier,
    folder_fingerprint,
)
from loraplex.adapters.vocabulary import Vocabulary
from loraplex.adapters.weights import Adapter
from loraplex.errors import (
    AdapterChangedError,
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
)
from loraplex.json_files import damaged_as
from loraplex.threads import compute_alone
from loraplex.validation import listed


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How much the tiers hold. A budget of None is unlimited."""

    num_slots: int = 64  # adapters that one forward pass can use
    slot_bytes: int | None = None
    host_bytes: int | None = None  # on a CPU slots share their weights with host memory
    loading_threads: int = 1

    def __post_init__(self) -> None:
        for option in ("num_slots", "loading_threads", "slot_bytes", "host_bytes"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"{option} is {value}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class StoreCounts:
    """How often weights have moved since the store began."""

    num_disk_reads: int  # into host memory, after an eviction from it
    num_host_evictions: int
    num_slot_loads: int
    num_slot_evictions: int


class AdapterStore:
    """Registers adapters, moves them between tiers, and leases them to requests. Safe to use from many threads."""

    def __init__(
        self,
        slots: Slots,
        read: Callable[[Path], Adapter],
        prepare: Callable[[Adapter], PreparedAdapter],
        config: StoreConfig,
    ) -> None:
        self.slots = slots
        self.config = config
        self._read = read
        self._prepare = prepare
        self._lock = threading.RLock()
        self._versions: dict[str, AdapterVersion] = {}  # the newest of each name
        self._slot_tier = SlotTier(slots, config.slot_bytes)
        self._host_tier = HostTier(config.host_bytes)
        self._loads: dict[int, Future[PreparedAdapter]] = {}
        self._num_disk_reads = self._num_host_evictions = 0
        self._loader = ThreadPoolExecutor(
            config.loading_threads, thread_name_prefix="loraplex-load", initializer=compute_alone
        )

    # Registering

    def add(
        self,
        name: str,
        adapter: Adapter,
        folder: Path | None,
        *,
        replace: bool = False,
        fingerprint: Fingerprint | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Register a checked adapter under `name`; with `replace`, requests from now on get the new version.

        `folder` is where its weights can be read again after an eviction, as long as it has the `fingerprint` it was
        read with (None: the one it has now); without a folder they stay in host memory.
        Raises AdapterExistsError, NameFormatError, CapacityError (over the host budget); then nothing has changed.
        """
        check_name(name)
        prepared = self.slots.stage(self._prepare(adapter))
        with self._lock:
            old = self._versions.get(name)
            if old is not None and not replace:
                raise AdapterExistsError(
                    f"adapter {name!r} is loaded already. Pass replace=True to load a new version, or choose another "
                    f"name. Loaded: {sorted(self._versions)}."
                )
            version = AdapterVersion(
                name=name,
                number=1 if old is None else old.number + 1,
                folder=folder,
                fingerprint=fingerprint if folder is None or fingerprint else folder_fingerprint(folder),
                num_bytes=prepared.num_bytes,
                modules=frozenset(prepared.layers),
                changed=frozenset(prepared.changes),
                invocation=prepared.invocation,
                is_dora=bool(prepared.dora_scaled),
                end_tokens=adapter.end_tokens,
                vocabulary=vocabulary,
                read_back=None if folder is None else prepared.read_back,
                original=adapter if folder is None else None,
                pinned=old is not None and old.pinned,
            )
            self._make_host_room(version, replaced=old)
            if old is not None:
                self._retire(old)
            self._host_tier.keep(version, prepared)
            self._versions[name] = version

    def remove(self, name: str) -> None:
        """Forget `name`; requests that lease it finish with its weights."""
        with self._lock:
            version = self.version(name)
            del self._versions[name]
            self._retire(version)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep `name` in its slot, or allow its eviction again; a pinned adapter is put into a slot at once."""
        with self.lease([name]), self._lock:
            self.version(name).pinned = pinned

    def prefetch(self, names: Sequence[str]) -> list["Future[PreparedAdapter]"]:
        """Start reading adapters from disk into host memory in the background."""
        with self._lock:
            versions = [self.version(name) for name in names]
            return [self._load(version) for version in versions if version.prepared is None]

    # Asking

    def __contains__(self, name: str) -> bool:
        return name in self._versions

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._versions)

    def version(self, name: str) -> AdapterVersion:
        """The newest version of `name`, or AdapterNotFoundError."""
        with self._lock:
            if name not in self._versions:
                raise AdapterNotFoundError(
                    f"adapter {name!r} is not loaded. Loaded: {listed(self._versions, most=20) or 'none'}. "
                    f"Load it first: model.load_adapter({name!r}, path)."
                )
            return self._versions[name]

    def states(self) -> list[AdapterState]:
        """Where every adapter is, sorted by name."""
        with self._lock:
            return [self._versions[name].state() for name in sorted(self._versions)]

    def counts(self) -> StoreCounts:
        """How often weights have moved between the tiers."""
        with self._lock:
            return StoreCounts(
                num_disk_reads=self._num_disk_reads,
                num_host_evictions=self._num_host_evictions,
                num_slot_loads=self._slot_tier.num_loads,
                num_slot_evictions=self._slot_tier.num_evictions,
            )

    # Leasing

    @contextmanager
    def lease(self, names: Sequence[str]) -> Iterator[dict[str, AdapterVersion]]:
        """Put the adapters into slots and keep them there until the block ends.

        Raises AdapterNotFoundError, CapacityError (more adapters at once than slots or budgets allow) and
        AdapterChangedError; then nothing is leased.
        """
        with self._lock:
            versions = {name: self.version(name) for name in dict.fromkeys(names)}
            for version in versions.values():
                version.num_leases += 1
        try:
            self._bring_to_slots(list(versions.values()))
            yield versions
        finally:
            with self._lock:
                for version in versions.values():
                    version.num_leases -= 1
                    if version.retired and version.num_leases == 0:
                        self._drop(version)

    def _bring_to_slots(self, versions: list[AdapterVersion]) -> None:
        missing = [version for version in versions if version.slot is None]
        with self._lock:
            self._slot_tier.check_room(missing)
            loads = [(version, self._load(version)) for version in missing if version.prepared is None]
        for _, load in loads:
            load.result()
        with self._lock:
            for version in versions:
                if version.prepared is not None:
                    self._host_tier.keep(version, version.prepared)  # now the most recently used
            for version in missing:
                if version.slot is None:
                    self._slot_tier.fill(version, self._host_tier)

    # Reading back from disk

    def at_rest(self, name: str) -> Adapter:
        """An adapter as it was given or as its folder has it, in its own dtype; slots have it in the base model's.

        Raises AdapterNotFoundError, and AdapterChangedError where its files are no longer those that were loaded.
        """
        version = self.version(name)
        if version.folder is None:
            assert version.original is not None, f"{name!r} has neither folder nor weights"
            return version.original
        with damaged_as(AdapterFormatError, version.folder):
            _check_unchanged(version)
            adapter = self._read(version.folder)
            _check_unchanged(version)
        return adapter

    def _load(self, version: AdapterVersion) -> "Future[PreparedAdapter]":
        """Read a version from disk in the background; a second call joins the first."""
        load = self._loads.get(id(version))
        if load is None:
            load = self._loads[id(version)] = self._loader.submit(self._read_back, version)
        return load

    def _read_back(self, version: AdapterVersion) -> PreparedAdapter:
        try:
            with self._lock:
                self._host_tier.leaving_for(version)  # nothing is read that there is no room for
            prepared = self.slots.stage(self._read_unchanged(version))
            with self._lock:
                self._num_disk_reads += 1
                self._make_host_room(version)
                if not (version.retired and version.num_leases == 0):
                    self._host_tier.keep(version, prepared)
                self._loads.pop(id(version), None)  # at once: after an eviction a lease must not join this load
            return prepared
        finally:
            with self._lock:
                self._loads.pop(id(version), None)

    def _read_unchanged(self, version: AdapterVersion) -> PreparedAdapter:
        """Read the files of a version, which are the same before and after."""
        assert version.folder is not None, f"{version.name!r} has no folder but left host memory"
        with damaged_as(AdapterFormatError, version.folder):
            _check_unchanged(version)
            try:
                if version.read_back is not None:
                    return version.read_back()
                return self._prepare(self._read(version.folder))
            finally:
                _check_unchanged(version)

    # Leaving

    def _make_host_room(self, newcomer: AdapterVersion, replaced: AdapterVersion | None = None) -> None:
        for version in self._host_tier.leaving_for(newcomer, replaced):
            self._drop(version)
            self._num_host_evictions += 1

    def _retire(self, version: AdapterVersion) -> None:
        version.retired = True
        if version.num_leases == 0:
            self._drop(version)

    def _drop(self, version: AdapterVersion) -> None:
        self._slot_tier.leave(version)
        self._host_tier.leave(version)


def _check_unchanged(version: AdapterVersion) -> None:
    if version.folder is None:
        return
    if _of_weights(folder_fingerprint(version.folder)) != _of_weights(version.fingerprint or ()):
        raise AdapterChangedError(
            f"the files of adapter {version.name!r} in {version.folder} changed since it was loaded. "
            f"Load the new ones: model.load_adapter({version.name!r}, path, replace=True)."
        )


def _of_weights(fingerprint: Fingerprint) -> Fingerprint:
    """Without the file that tells what the adapter is for, which may be made later."""
    return tuple(entry for entry in fingerprint if entry[0] != CENTROID_FILE)
