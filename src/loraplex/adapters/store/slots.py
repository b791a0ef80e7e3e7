"""The device tier: numbered slots whose weights the kernels read."""

from collections.abc import Mapping, Sequence

import torch

from loraplex.adapters.store.async_copy import Arrival, CopyLane, CudaLane, moved, pack
from loraplex.adapters.store.expert_table import ExpertTable
from loraplex.adapters.store.prepared import PreparedAdapter


class Slots:
    """What each slot holds, as Python objects and as the table of addresses that the compiled kernels read.

    Keeping addresses instead of one padded tensor lets every adapter have its own rank, and makes filling a
    slot from host memory on a CPU a matter of pointers: no weight is copied. On a GPU the weights are copied while it
    computes, and who uses the slot waits for them. The table stays where it is, on the device that reads it.
    """

    def __init__(
        self,
        num_slots: int,
        module_paths: Sequence[str],
        device: torch.device,
        lane: CopyLane | None = None,
        *,
        num_experts: Mapping[str, int] | None = None,  # by path, of those that stack feed-forward experts
    ) -> None:
        self.module_index = {path: index for index, path in enumerate(module_paths)}
        self.device = device
        self.table = torch.zeros(num_slots, len(module_paths), 3, dtype=torch.int64, device=device)
        self.scalings = torch.zeros(num_slots, len(module_paths), dtype=torch.float32, device=device)
        stacked = {self.module_index[path]: count for path, count in (num_experts or {}).items()}
        self.experts = ExpertTable(num_slots, stacked, device)
        self._held: list[PreparedAdapter | None] = [None] * num_slots
        if lane is None and device.type == "cuda":
            lane = CudaLane(device)
        self._lane = lane
        self._arrivals: dict[int, Arrival] = {}  # of the slots' weights
        self._sources: list[tuple[Arrival, PreparedAdapter]] = []  # kept until their copies have ended

    @property
    def num_slots(self) -> int:
        return len(self._held)

    def put(self, slot: int, adapter: PreparedAdapter) -> None:
        """Let `slot` hold `adapter`; what it held before must not be in use."""
        if self._lane is not None:
            held = self._begin_copy(slot, adapter).changes_to(self.device)
        else:
            held = adapter if self.device.type == "cpu" else adapter.to(self.device)
        indices, rows, scalings = held.addresses
        self.table[slot] = 0
        self.table[slot, indices] = rows.to(self.device)
        self.scalings[slot, indices] = scalings.to(self.device)
        self.experts.put(slot, held.layers)
        self._held[slot] = held

    def clear(self, slot: int) -> None:
        self.table[slot] = 0
        self.experts.clear(slot)
        self._held[slot] = None
        self._arrivals.pop(slot, None)

    def held(self, slot: int) -> PreparedAdapter:
        """The slot's adapter; what the caller gives to the device from now on comes after its weights' arrival."""
        adapter = self._held[slot]
        assert adapter is not None, f"slot {slot} is empty but a routing plan points to it"
        if self._lane is not None:
            self._arrivals[slot].wait()
        return adapter

    # Copies to a device

    def stage(self, adapter: PreparedAdapter) -> PreparedAdapter:
        """The adapter as host memory should keep it for `put`: in one buffer, pinned where it will be copied.

        On a CPU too: memory that adapters leave in one piece is what the next ones need.
        """
        pin = self.device.type == "cuda"
        if adapter.packed is None or (pin and not adapter.packed.buffer.is_pinned()):
            adapter = pack(adapter, pin=pin)
        if self._lane is None:
            _ = adapter.addresses  # now: `put` runs between the model's steps
        return adapter

    def is_ready(self, slot: int) -> bool:
        """Whether the slot's weights have arrived: using it doesn't make the device wait."""
        arrival = self._arrivals.get(slot)
        return arrival is None or arrival.is_done()

    def _begin_copy(self, slot: int, adapter: PreparedAdapter) -> PreparedAdapter:
        assert self._lane is not None, "on a CPU nothing is copied"
        self._sources = [(arrival, source) for arrival, source in self._sources if not arrival.is_done()]
        source = self.stage(adapter)
        assert source.packed is not None, "a staged adapter is in one buffer"
        target, arrival = self._lane.start(source.packed.buffer)
        self._arrivals[slot] = arrival
        self._sources.append((arrival, source))
        return moved(source, target)
