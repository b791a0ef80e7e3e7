"""Slots of a GPU filled from pinned memory while it computes."""

import pytest
import torch

from loraplex.adapters.store.slots import Slots
from tests.adapters.test_transfers import adapter, same

pytestmark = pytest.mark.gpu
PATHS = ["a", "b", "c"]


@pytest.fixture
def slots() -> Slots:
    return Slots(4, PATHS, torch.device("cuda"))


def busy(milliseconds: int) -> None:
    """Keep the current stream computing for about so long."""
    torch.cuda._sleep(milliseconds * 1_000_000)


def test_the_host_copy_is_pinned_and_the_slot_gets_the_weights(slots):
    staged = slots.stage(adapter(0))
    assert staged.buffer.is_pinned()
    slots.put(0, staged)
    held = slots.held(0)
    torch.cuda.synchronize()
    assert slots.is_ready(0)
    assert all(weights.lora_a.is_cuda and weights.lora_a.data_ptr() % 16 == 0 for weights in held.layers.values())
    assert same(held.to(torch.device("cpu")), adapter(0))
    assert slots.table.is_cuda
    assert slots.table[0, 2].tolist() == [held.layers[2].lora_a.data_ptr(), held.layers[2].lora_b.data_ptr(), 4]


def test_the_copy_does_not_wait_for_what_the_device_computes(slots):
    staged = slots.stage(adapter(0))
    slots.put(1, staged)  # the first use of stream and memory
    torch.cuda.synchronize()
    busy(300)
    computing = torch.cuda.Event()
    computing.record()
    slots._arrivals[2] = slots._lane.start(staged.buffer)[1]
    while not slots.is_ready(2):
        pass
    assert not computing.query()


def test_what_uses_a_slot_comes_after_its_copy(slots):
    """The copy's stream is kept busy: without the wait, a product would read memory that nothing was written to."""
    for seed in range(10):
        with torch.cuda.stream(slots._lane._stream):
            busy(20)
        slots.put(0, slots.stage(adapter(seed)))
        held = slots.held(0)
        sums = [weights.lora_a.float().sum() for weights in held.layers.values()]
        expected = [weights.lora_a.float().sum() for weights in adapter(seed).layers.values()]
        assert all(torch.allclose(a.cpu(), b, rtol=1e-4) for a, b in zip(sums, expected, strict=True))
        slots.clear(0)


def test_a_cleared_slots_memory_is_not_reused_under_a_running_product(slots):
    slots.put(0, slots.stage(adapter(0)))
    held = slots.held(0)
    busy(50)
    sums = [weights.lora_a.float().sum() for weights in held.layers.values()]
    expected = [weights.lora_a.float().sum() for weights in adapter(0).layers.values()]
    del held
    slots.clear(0)
    for seed in range(1, 4):
        slots.put(seed, slots.stage(adapter(seed)))
    assert all(torch.allclose(a.cpu(), b, rtol=1e-4) for a, b in zip(sums, expected, strict=True))
