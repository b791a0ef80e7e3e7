"""Read an adapter again from a file that was read and checked before: one read, and every factor to its place.

The general way (adapters/peft/reader.py) looks at each tensor's name, shape and values, and gives each its own memory.
Of a file that hasn't changed since, all that is known; and a server that keeps most of its adapters on disk reads them
all the time, beside the model's steps, which want both the processor and Python's lock.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.store.prepared import PackedLayers, PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter, FileOffsets
from loraplex.errors import AdapterFormatError
from loraplex.kernels.dispatch import native_runs
from loraplex.kernels.native import place_factors_native
from loraplex.large_memory import large_buffer

_ALIGNMENT = 64  # bytes: what a vector of the compiled kernel reads lies in one line of the cache
_LEAST_USED = 0.5  # of a file: one with copies of the base model's weights is read tensor by tensor


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """Where a file has what a slot needs, and where memory will have it."""

    file: Path
    num_bytes: int  # of the file
    file_dtype: torch.dtype
    dtype: torch.dtype  # of the slot's weights
    num_values: int  # in memory
    modules: tuple[int, ...]  # by index
    factors: Tensor  # [modules, 6] int64: place in memory, rank, places of A and B in the file, inputs, outputs
    scalings: tuple[float, ...]  # [modules]
    invocation: tuple[int, ...] | None

    def __call__(self) -> PreparedAdapter:
        """The adapter as it was prepared before. Raises OSError, and AdapterFormatError for a file of another size."""
        values, memory = self._read_file(), large_buffer(self.num_values * self.dtype.itemsize)
        place, rank, _, _, num_in, num_out = self.factors.unbind(1)
        first_a, first_b = (start * self.dtype.itemsize for start in (place, place + rank * num_in))
        places = torch.stack((first_a, first_b, torch.full_like(place, -1), rank, num_in, num_out), dim=1)
        layers = PackedLayers(memory, self.dtype, self.modules, places, self.scalings)
        if native_runs(memory.device, self.dtype):
            place_factors_native(values, self.factors, memory.view(self.dtype))
        else:
            self._copy_into(layers, values)
        return PreparedAdapter(layers=layers, invocation=self.invocation, read_back=self)

    def _copy_into(self, layers: PackedLayers, values: Tensor) -> None:
        for weights, row in zip(layers.values(), self.factors.tolist(), strict=True):
            _, rank, start_a, start_b, num_in, num_out = row
            weights.lora_a.copy_(values.as_strided((rank, num_in), (num_in, 1), start_a))
            weights.lora_b.copy_(values.as_strided((rank, num_out), (1, rank), start_b))

    def _read_file(self) -> Tensor:  # [values], valid until this thread reads again
        content = _thread_bytes(self.num_bytes)
        with self.file.open("rb", buffering=0) as file:
            view, done = content.numpy().data, 0
            while done < self.num_bytes and (count := file.readinto(view[done:])):
                done += count
            if done < self.num_bytes or file.read(1):
                raise AdapterFormatError(f"{self.file} is not {self.num_bytes} bytes long, as it was. Load it again.")
        return content[: self.num_bytes // self.file_dtype.itemsize * self.file_dtype.itemsize].view(self.file_dtype)


_threads = threading.local()


def _thread_bytes(num_bytes: int) -> Tensor:
    """Memory that a thread uses again and again: fresh memory costs more than what is read into it."""
    kept: Tensor | None = getattr(_threads, "content", None)
    if kept is None or kept.numel() < num_bytes:
        kept = _threads.content = torch.empty(num_bytes, dtype=torch.uint8)
    return kept[:num_bytes]


def read_back_of(
    adapter: Adapter, layers: Mapping[int, SlotWeights], module_index: Mapping[str, int], dtype: torch.dtype
) -> ReadBack | None:
    """How to read again what `layers` were made of; None if that takes more than copying.

    It does for DoRA, mixed dtypes, and stacked experts, which a file has in another order.
    """
    places = adapter.places
    if (
        places is None
        or not adapter.layers
        or not adapter.has_factors_alone
        or any(weights.magnitude is not None or weights.num_experts > 1 for weights in adapter.layers.values())
    ):
        return None
    dtypes = {tensor.dtype for weights in adapter.layers.values() for tensor in (weights.lora_a, weights.lora_b)}
    file_dtype = dtypes.pop()
    if dtypes or file_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if adapter.num_bytes < _LEAST_USED * places.num_bytes or not _are_aligned(places, file_dtype.itemsize):
        return None
    factors, place, step = [], 0, _ALIGNMENT // dtype.itemsize
    paths = sorted(adapter.layers, key=lambda path: module_index[path])
    for path in paths:
        rank, num_in, num_out = (*adapter.layers[path].lora_a.shape, adapter.layers[path].lora_b.shape[1])
        starts = [start // file_dtype.itemsize for start in places.starts[path]]
        factors.append([place, rank, *starts, num_in, num_out])
        place += -(-rank * (num_in + num_out) // step) * step
    return ReadBack(
        file=places.file,
        num_bytes=places.num_bytes,
        file_dtype=file_dtype,
        dtype=dtype,
        num_values=place,
        modules=tuple(module_index[path] for path in paths),
        factors=torch.tensor(factors, dtype=torch.int64),
        scalings=tuple(layers[module_index[path]].scaling for path in paths),
        invocation=adapter.config.alora_invocation_tokens,
    )


def _are_aligned(places: FileOffsets, itemsize: int) -> bool:
    return all(start % itemsize == 0 for starts in places.starts.values() for start in starts)
