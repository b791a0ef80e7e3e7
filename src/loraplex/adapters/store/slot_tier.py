"""The first tier: which versions are in slots, and who leaves when another one needs room."""

from collections.abc import Iterable, Sequence

from loraplex.adapters.listing import listed
from loraplex.adapters.store.slots import Slots
from loraplex.adapters.store.version import AdapterVersion
from loraplex.errors import CapacityError


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
