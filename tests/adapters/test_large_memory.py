"""Memory that goes back to the system."""

import gc
from pathlib import Path

import pytest
import torch

from loraplex.adapters.store.large_memory import large_buffer
from tests.parts import skip_here


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, 2**20, 2**21, 5_000_001])
def test_zeros_of_the_size_that_can_be_written(num_bytes: int) -> None:
    buffer = large_buffer(num_bytes)
    assert (buffer.shape, buffer.dtype) == ((num_bytes,), torch.uint8)
    assert int(buffer.sum()) == 0
    buffer.fill_(7)
    assert int(buffer.sum()) == 7 * num_bytes


def test_a_part_keeps_it_and_the_last_one_gives_it_back() -> None:
    if not Path("/proc/self/statm").exists():
        skip_here("the memory of a process, which Linux tells")
    size = 2**29  # more than what earlier tests have left that the system takes back meanwhile
    before = _resident()
    part = large_buffer(size).fill_(1)[size // 2 :][:10]
    gc.collect()
    assert int(part.sum()) == 10
    assert _resident() > before + size // 2
    del part
    gc.collect()
    assert _resident() < before + size // 2


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
