"""Weights on their way from host memory to a device, which goes on computing meanwhile."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from loraplex.adapters.store.prepared import PackedLayers, PreparedAdapter
from loraplex.large_memory import large_buffer

_ALIGNMENT = 256  # bytes, as torch aligns what it allocates on a device


class Arrival(Protocol):
    """One copy that was started."""

    def is_done(self) -> bool:
        """Whether the copy has ended."""
        ...

    def wait(self) -> None:
        """Let what this thread gives to the device from now on come after the copy."""
        ...


class CopyLane(Protocol):
    """What copies buffers to a device, beside what the device computes."""

    def start(self, source: Tensor) -> tuple[Tensor, Arrival]:
        """Begin to copy; the source must stay as it is until the copy has ended."""
        ...


class CudaLane:
    """Copies from pinned memory on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, source: Tensor) -> tuple[Tensor, Arrival]:
        with torch.cuda.stream(self._stream):
            target = torch.empty_like(source, device=self._device)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return target, CudaArrival(target, event)


class CudaArrival:
    """Every stream that uses the target waits for the copy once, and its memory isn't reused before they are done."""

    def __init__(self, target: Tensor, event: torch.cuda.Event) -> None:
        self._target, self._event = target, event
        self._waiting: set[int] = set()

    def is_done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self._target.device)
        if stream.stream_id not in self._waiting:
            self._waiting.add(stream.stream_id)
            stream.wait_event(self._event)
            self._target.record_stream(stream)


def pack(adapter: PreparedAdapter, *, pin: bool) -> PreparedAdapter:
    """The same adapter with all its tensors in one buffer, which one copy moves; pinned, so that it needs no host."""
    dtypes = {tensor.dtype for weights in adapter.layers.values() for tensor in (weights.lora_a, weights.lora_b)}
    assert len(dtypes) <= 1, f"a prepared adapter has one dtype, not {dtypes}"
    size, places = 0, []
    for weights in adapter.layers.values():
        row = []
        for tensor in (weights.lora_a, weights.lora_b, weights.dora_scale):
            row.append(-1 if tensor is None else size)
            size += 0 if tensor is None else -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        places.append([*row, *weights.lora_a.shape, weights.lora_b.shape[1]])
    layers = PackedLayers(
        torch.empty(size, dtype=torch.uint8, pin_memory=True) if pin else large_buffer(size),
        dtypes.pop() if dtypes else torch.float32,
        tuple(adapter.layers),
        torch.tensor(places, dtype=torch.int64).view(-1, 6),
        [weights.scaling for weights in adapter.layers.values()],
        [weights.num_experts for weights in adapter.layers.values()],
    )
    # What is copied through isn't kept: these tensors are not those that the layers make when they are asked.
    for weights, copies in zip(adapter.layers.values(), layers.on(layers.buffer).values(), strict=True):
        copies.lora_a.copy_(weights.lora_a)
        copies.lora_b.copy_(weights.lora_b)
        if weights.dora_scale is not None and copies.dora_scale is not None:
            copies.dora_scale.copy_(weights.dora_scale)
    return replace(adapter, layers=layers)


def moved(adapter: PreparedAdapter, buffer: Tensor) -> PreparedAdapter:
    """A packed adapter whose tensors are in a copy of its buffer."""
    assert adapter.packed is not None, "only a packed adapter can be moved"
    return replace(adapter, layers=adapter.packed.on(buffer))
