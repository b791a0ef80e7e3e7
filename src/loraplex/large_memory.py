"""Memory of many megabytes in huge pages, where the system has them."""

import mmap

import torch
from torch import Tensor

_LEAST = 2**20  # bytes; less is the allocator's business
_HUGE_PAGE = 2**21
_SLAB = 2**26  # bytes that tensors share; what none has used is never touched
_IS_LARGE = "loraplex_is_in_large_memory"
_ALIGNED = 64  # bytes: a line of a processor's cache, and of its vectors


def large_buffer(num_bytes: int) -> Tensor:  # [bytes] uint8, zeros
    """Memory of its own, which goes back to the system with the last tensor that shares it.

    An allocator would keep what adapters of other sizes and other threads left, up to twice the budget. Huge pages,
    where the system has them, are as many page faults less, and fewer addresses for the processor to look up.
    """
    if num_bytes < _LEAST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # touched: num_bytes
    content = torch.frombuffer(memory, dtype=torch.uint8)
    start = -content.data_ptr() % _HUGE_PAGE
    whole_pages = num_bytes // _HUGE_PAGE * _HUGE_PAGE
    if whole_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole_pages)
    return content[start : start + num_bytes]


class LargeMemory:
    """Where tensors that are read from end to end, and kept, lie side by side.

    A weight of a megabyte or two, in memory of its own, has no whole huge page. Decoding reads all weights for each
    token; the addresses of small pages, which a virtual machine looks up twice, can take as long as the values.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)  # what is left of the last slab

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor's values, contiguous, in this memory, which goes back with the last tensors of a slab."""
        if tensor.device.type != "cpu":
            return tensor
        room = -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if room > self._free.numel():
            self._free = large_buffer(max(room, _SLAB))
        part, self._free = self._free[: tensor.nbytes], self._free[room:]
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def move(self, parameter: Tensor) -> None:
        """Let a parameter have its values in this memory, unless it has them in such a one."""
        if not hasattr(parameter, _IS_LARGE):
            parameter.data = self.keep(parameter.data)
            setattr(parameter, _IS_LARGE, True)
