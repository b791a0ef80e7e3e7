"""Memory that goes back to the system."""

import gc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from loraplex.large_memory import LargeMemory, large_buffer
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


def test_kept_tensors_lie_side_by_side_and_keep_their_values() -> None:
    memory = LargeMemory()
    weights = [torch.randn(300, 700).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    held = [memory.keep(weight.t()) for weight in weights]
    for part, weight in zip(held, weights, strict=True):
        assert torch.equal(part, weight.t())
        assert part.is_contiguous()
    places = [part.data_ptr() for part in held]
    assert all(place % 64 == 0 for place in places)
    assert [after - before for before, after in pairwise(places)] == [840_000, 420_032]  # whole lines
    held[0].zero_()
    assert torch.equal(held[1], weights[1].t())


def test_what_is_larger_than_a_slab_has_its_own() -> None:
    memory = LargeMemory()
    first, large, last = (
        memory.keep(torch.ones(10)),
        memory.keep(torch.ones(2**25)),
        memory.keep(torch.full((10,), 2.0)),
    )
    assert (float(first.sum()), float(large.sum()), float(last.sum())) == (10, 2**25, 20)


def test_parameter_moves_once_and_stays_the_module_s_own() -> None:
    module, memory = nn.Linear(500, 600), LargeMemory()
    tied, before = module.weight, module.weight.detach().clone()
    memory.move(module.weight)
    place = module.weight.data_ptr()
    memory.move(module.weight)
    assert (module.weight is tied, module.weight.data_ptr()) == (True, place)
    assert torch.equal(tied, before)
    assert torch.equal(module(torch.ones(1, 500)), nn.functional.linear(torch.ones(1, 500), before, module.bias))


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
