"""The second tier: which versions are in host memory, and who leaves for disk when another one needs room."""

from collections.abc import Iterator

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.version import AdapterVersion
from loraplex.errors import CapacityError


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
