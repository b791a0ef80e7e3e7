"""Copies of weights that run beside the computing thread, in the order that slots promise: on a CPU, in a thread."""

import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from loraplex.adapters.store.async_copy import moved, pack
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.store.slots import Slots

CPU = torch.device("cpu")


class ThreadLane:
    """Copies in a thread, which waits until it may begin."""

    def __init__(self) -> None:
        self.may_copy = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def start(self, source: Tensor) -> tuple[Tensor, "ThreadArrival"]:
        target = torch.zeros_like(source)

        def copy() -> None:
            assert self.may_copy.wait(timeout=30)
            target.copy_(source)

        return target, ThreadArrival(self._thread.submit(copy))


class ThreadArrival:
    def __init__(self, copy: "Future[None]") -> None:
        self._copy = copy

    def is_done(self) -> bool:
        return self._copy.done()

    def wait(self) -> None:
        self._copy.result(timeout=30)


def adapter(seed: int, *, dtype: torch.dtype = torch.bfloat16) -> PreparedAdapter:
    draw = torch.Generator().manual_seed(seed)

    def weights(rank: int, has_dora_scale: bool) -> SlotWeights:
        a, b = torch.randn(rank, 7, generator=draw).to(dtype), torch.randn(rank, 5, generator=draw).to(dtype)
        return SlotWeights(
            lora_a=a, lora_b=b, scaling=0.5, dora_scale=torch.randn(5, generator=draw) if has_dora_scale else None
        )

    return PreparedAdapter(layers={0: weights(3, False), 2: weights(4, True)}, invocation=(1, 2))


def tensors(prepared: PreparedAdapter) -> list[Tensor]:
    return [t for w in prepared.layers.values() for t in (w.lora_a, w.lora_b, w.dora_scale) if t is not None]


def same(one: PreparedAdapter, other: PreparedAdapter) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return list(one.layers) == list(other.layers) and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_adapter_is_the_same_in_one_aligned_buffer(dtype):
    original = adapter(0, dtype=dtype)
    packed = pack(original, pin=False)
    assert same(packed, original)
    assert packed.invocation == original.invocation
    assert packed.packed is not None
    buffer = packed.packed.buffer
    start, stop = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
    for tensor in tensors(packed):
        assert start <= tensor.data_ptr() < stop
        assert (tensor.data_ptr() - start) % 256 == 0
    assert same(moved(packed, buffer.clone()), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_packed_adapter_tells_without_its_tensors_is_what_they_tell(dtype):
    packed = pack(adapter(0, dtype=dtype), pin=False)
    told = PreparedAdapter(layers=dict(packed.layers))  # from its tensors, one by one
    assert told.packed is None
    assert (packed.num_bytes, packed.max_rank, packed.dora_scaled) == (told.num_bytes, told.max_rank, told.dora_scaled)
    assert packed.dora_scaled == {2}
    for ours, theirs in zip(packed.addresses, told.addresses, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_an_adapter_of_no_module_can_be_packed():
    packed = pack(PreparedAdapter(layers={}), pin=False)
    assert (packed.num_bytes, packed.max_rank, packed.dora_scaled, list(packed.layers)) == (0, 0, frozenset(), [])


def test_reading_an_adapters_addresses_leaves_no_tensor_for_each_module():
    packed = pack(adapter(0), pin=False)
    _ = packed.addresses
    assert num_tensors_in(packed) == 1  # the buffer
    _ = packed.layers[2]
    assert num_tensors_in(packed) > 3


def num_tensors_in(adapter: PreparedAdapter) -> int:
    assert adapter.packed is not None
    memory = adapter.packed.buffer.untyped_storage().data_ptr()
    return sum(type(t) is Tensor and t.untyped_storage().data_ptr() == memory for t in gc.get_objects())


def test_a_slot_is_ready_and_its_weights_are_there_only_after_the_copy():
    lane = ThreadLane()
    slots = Slots(2, ["a", "b", "c"], CPU, lane)
    original = adapter(0)
    slots.put(0, original)
    assert not slots.is_ready(0)
    assert not slots._held[0].layers[0].lora_a.any()  # nothing was copied yet
    threading.Timer(0.05, lane.may_copy.set).start()
    assert same(slots.held(0), original)  # waits for the copy
    assert slots.is_ready(0)


def test_the_table_points_into_the_copy():
    lane = ThreadLane()
    lane.may_copy.set()
    slots = Slots(2, ["a", "b", "c"], CPU, lane)
    slots.put(1, adapter(0))
    held = slots.held(1)
    assert slots.table[1, 2].tolist() == [held.layers[2].lora_a.data_ptr(), held.layers[2].lora_b.data_ptr(), 4]
    assert slots.table[1, 1].tolist() == [0, 0, 0]
    assert not slots.table[0].any()


def test_the_source_stays_until_its_copy_has_ended_even_if_the_slot_is_cleared():
    lane = ThreadLane()
    slots = Slots(2, ["a", "b", "c"], CPU, lane)
    source = slots.stage(adapter(0))
    assert source.packed is not None
    buffer = weakref.ref(source.packed.buffer)
    slots.put(0, source)
    slots.clear(0)
    del source
    gc.collect()
    assert buffer() is not None
    lane.may_copy.set()
    slots.put(0, adapter(1))
    assert same(slots.held(0), adapter(1))
    slots.put(1, adapter(2))  # lets go of what has ended
    gc.collect()
    assert buffer() is None


def test_on_a_cpu_staged_adapters_are_in_one_piece_and_slots_share_it():
    slots = Slots(1, ["a", "b", "c"], CPU)
    staged = slots.stage(adapter(0))
    assert same(staged, adapter(0))
    assert slots.stage(staged) is staged
    slots.put(0, staged)
    assert slots.is_ready(0)
    assert slots.held(0).layers[0].lora_a is staged.layers[0].lora_a
