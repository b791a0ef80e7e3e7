"""Memory for many megabytes that come and go."""

import mmap

import torch
from torch import Tensor

_LEAST = 2**20  # bytes; less is the allocator's business
_HUGE_PAGE = 2**21


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
