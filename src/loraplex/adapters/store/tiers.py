"""The tiers: which versions are in slots and in host memory, and who leaves when another one needs room."""

from collections.abc import Iterable, Iterator, Sequence

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slots import Slots
from loraplex.adapters.store.version import AdapterVersion
from loraplex.errors import CapacityError
from loraplex.validation import listed


class SlotTier:
    """Fills slots within their number and a budget of bytes; the store's lock guards it."""

    def __init__(self, slots: Slots, budget_bytes: int | None) -> None:
        self._slots = slots
        self._budget = budget_bytes
        self._held: dict[int, AdapterVersion] = {}

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
        slot = next(slot for slot in range(self._slots.num_slots) if slot not in self._held)
        self._slots.put(slot, version.prepared)
        self._held[slot] = version
        version.slot = slot

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
