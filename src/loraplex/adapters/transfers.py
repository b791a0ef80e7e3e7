"""Weights on their way from host memory to a device, which goes on computing meanwhile."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from loraplex.adapters.large_memory import large_buffer

if TYPE_CHECKING:
    from loraplex.adapters.slots import PreparedAdapter, SlotWeights

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


def pack(adapter: "PreparedAdapter", *, pin: bool) -> "PreparedAdapter":
    """The same adapter with all its tensors in one buffer, which one copy moves; pinned, so that it needs no host."""
    tensors = _tensors(adapter.layers.values())
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pin else large_buffer(size)
    places = {id(tensor): offset for tensor, offset in zip(tensors, offsets, strict=True)}
    packed = _placed(adapter, places, buffer)
    for tensor, copy in zip(tensors, _tensors(packed.layers.values()), strict=True):
        copy.copy_(tensor)
    return packed


def moved(adapter: "PreparedAdapter", buffer: Tensor) -> "PreparedAdapter":
    """A packed adapter whose tensors are in a copy of its buffer."""
    assert adapter.buffer is not None, "only a packed adapter can be moved"
    start = adapter.buffer.data_ptr()
    places = {id(tensor): tensor.data_ptr() - start for tensor in _tensors(adapter.layers.values())}
    return _placed(adapter, places, buffer)


def _placed(adapter: "PreparedAdapter", places: dict[int, int], buffer: Tensor) -> "PreparedAdapter":
    def place(tensor: Tensor) -> Tensor:
        first = places[id(tensor)]
        part = buffer[first : first + tensor.numel() * tensor.element_size()]
        return part.view(tensor.dtype).view(tensor.shape)

    layers = {
        index: replace(
            weights,
            lora_a=place(weights.lora_a),
            lora_b=place(weights.lora_b),
            gain=None if weights.gain is None else place(weights.gain),
        )
        for index, weights in adapter.layers.items()
    }
    return replace(adapter, layers=layers, buffer=buffer)


def _tensors(layers: Iterable["SlotWeights"]) -> list[Tensor]:
    return [t for w in layers for t in (w.lora_a, w.lora_b, w.gain) if t is not None]
