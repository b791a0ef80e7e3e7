"""The device tier: numbered slots whose weights the kernels read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraplex.adapters.transfers import Arrival, CopyLane, CudaLane, moved, pack


@dataclass(frozen=True, kw_only=True)
class SlotWeights:
    """One module's factors as the kernels want them: contiguous, in the base model's dtype."""

    lora_a: Tensor  # [rank, in]; [rank, vocab] for an embedding
    lora_b: Tensor  # [rank, out]; for DoRA multiplied by c per output
    scaling: float
    gain: Tensor | None = None  # [out], c - 1 of DoRA: the share of the base output to add

    @property
    def num_bytes(self) -> int:
        tensors = [self.lora_a, self.lora_b] + ([] if self.gain is None else [self.gain])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> "SlotWeights":
        return SlotWeights(
            lora_a=self.lora_a.to(device),
            lora_b=self.lora_b.to(device),
            scaling=self.scaling,
            gain=None if self.gain is None else self.gain.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class PreparedAdapter:
    """An adapter ready for a slot, by module index of the base model."""

    layers: Mapping[int, SlotWeights]
    invocation: tuple[int, ...] | None = None  # aLoRA: the tokens from which on it is active
    buffer: Tensor | None = None  # [bytes], if all tensors are in one
    read_back: "Callable[[], PreparedAdapter] | None" = None  # reads it again, from a file that is as it was

    def to(self, device: torch.device) -> "PreparedAdapter":
        layers = {index: weights.to(device) for index, weights in self.layers.items()}
        return PreparedAdapter(layers=layers, invocation=self.invocation)

    @cached_property
    def gained(self) -> frozenset[int]:
        """The modules where DoRA takes a share of the base output."""
        return frozenset(index for index, weights in self.layers.items() if weights.gain is not None)

    @cached_property
    def max_rank(self) -> int:
        return max((weights.lora_a.shape[0] for weights in self.layers.values()), default=0)

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.layers.values())

    @cached_property
    def addresses(self) -> tuple[Tensor, Tensor, Tensor]:  # [modules], [modules, 3], [modules]
        """The modules, and what the table has for each: addresses and rank, and the LoRA scaling."""
        rows = [(w.lora_a.data_ptr(), w.lora_b.data_ptr(), w.lora_a.shape[0]) for w in self.layers.values()]
        scalings = [w.scaling for w in self.layers.values()]
        indices = torch.tensor(list(self.layers), dtype=torch.int64)
        return indices, torch.tensor(rows, dtype=torch.int64).view(-1, 3), torch.tensor(scalings, dtype=torch.float32)


class Slots:
    """What each slot holds, as Python objects and as the table of addresses that the compiled kernels read.

    Keeping addresses instead of one padded tensor lets every adapter have its own rank, and makes filling a
    slot from host memory on a CPU a matter of pointers: no weight is copied. On a GPU the weights are copied while it
    computes, and who uses the slot waits for them. The table stays where it is, on the device that reads it.
    """

    def __init__(
        self, num_slots: int, module_paths: Sequence[str], device: torch.device, lane: CopyLane | None = None
    ) -> None:
        self.module_index = {path: index for index, path in enumerate(module_paths)}
        self.device = device
        self.table = torch.zeros(num_slots, len(module_paths), 3, dtype=torch.int64, device=device)
        self.scalings = torch.zeros(num_slots, len(module_paths), dtype=torch.float32, device=device)
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
            held = self._begin_copy(slot, adapter)
        else:
            held = adapter if self.device.type == "cpu" else adapter.to(self.device)
        indices, rows, scalings = held.addresses
        self.table[slot] = 0
        self.table[slot, indices] = rows.to(self.device)
        self.scalings[slot, indices] = scalings.to(self.device)
        self._held[slot] = held

    def clear(self, slot: int) -> None:
        self.table[slot] = 0
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
        if adapter.buffer is None or (pin and not adapter.buffer.is_pinned()):
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
        assert source.buffer is not None, "a staged adapter is in one buffer"
        target, arrival = self._lane.start(source.buffer)
        self._arrivals[slot] = arrival
        self._sources.append((arrival, source))
        return moved(source, target)
