"""Tiers, eviction, leases, replacement: who has which weights, and when."""

import threading
from pathlib import Path

import pytest
import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.store.slots import Slots
from loraplex.adapters.store.store import AdapterStore, StoreConfig
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import (
    AdapterChangedError,
    AdapterExistsError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    NameFormatError,
)

BYTES = 4 * (2 * 4 + 2 * 4)  # of one adapter below


def make_adapter(value: float) -> Adapter:
    weights = LoraWeights(kind="linear", lora_a=torch.full((2, 4), float(value)), lora_b=torch.ones(2, 4), scaling=1.0)
    return Adapter(config=LoraConfig(r=2), layers={"m": weights})


def prepare(adapter: Adapter) -> PreparedAdapter:
    weights = adapter.layers["m"]
    return PreparedAdapter(layers={0: SlotWeights(lora_a=weights.lora_a, lora_b=weights.lora_b, scaling=1.0)})


class Disk:
    """Adapters as files that hold one number; counts what is read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reads = folder, []
        self.gate = threading.Event()
        self.gate.set()

    def write(self, name: str, value: float) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "value.json").write_text(str(value))
        return folder

    def read(self, folder: Path) -> Adapter:
        self.gate.wait(5)
        self.reads.append(folder.name)
        return make_adapter(float((folder / "value.json").read_text()))


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


def make_store(disk, names="", **options):
    config = StoreConfig(**({"num_slots": 2} | options))
    store = AdapterStore(Slots(config.num_slots, ["m"], torch.device("cpu")), disk.read, prepare, config)
    for value, name in enumerate(names):
        store.add(name, make_adapter(value), disk.write(name, value))
    return store


def tiers(store):
    return {state.name: state.tier for state in store.states()}


def value_in_slot(store, version):
    return store.slots.held(version.slot).layers[0].lora_a[0, 0].item()


def test_leased_adapters_are_in_slots_with_their_own_weights(disk):
    store = make_store(disk, "abc")
    with store.lease(["c", "b", "c"]) as leased:
        assert [value_in_slot(store, leased[name]) for name in "bc"] == [1, 2]
        assert tiers(store) == {"a": "host", "b": "slot", "c": "slot"}


def test_least_recently_used_adapter_leaves_its_slot(disk):
    store = make_store(disk, "abc")
    for name in "abac":
        with store.lease([name]):
            pass
    assert tiers(store) == {"a": "slot", "b": "host", "c": "slot"}


def test_pinned_adapter_stays_and_can_be_unpinned(disk):
    store = make_store(disk, "abc")
    store.pin("a")
    for name in "bcb":
        with store.lease([name]):
            pass
    assert tiers(store)["a"] == "slot"
    store.pin("a", False)
    with store.lease(["b", "c"]):
        assert tiers(store)["a"] == "host"


def test_more_adapters_at_once_than_slots_is_refused_and_changes_no_lease(disk):
    store = make_store(disk, "abc")
    with store.lease(["a"]):
        with pytest.raises(CapacityError, match="num_slots"), store.lease(["b", "c"]):
            pass
        assert {state.name: state.num_leases for state in store.states()} == {"a": 1, "b": 0, "c": 0}
    with store.lease(["b", "c"]):
        pass


def test_host_budget_sends_the_least_recently_used_to_disk_and_reads_it_back(disk):
    store = make_store(disk, "abcd", host_bytes=3 * BYTES)
    assert tiers(store) == {"a": "disk", "b": "host", "c": "host", "d": "host"}
    with store.lease(["a"]) as leased:
        assert value_in_slot(store, leased["a"]) == 0
    assert disk.reads == ["a"]
    assert tiers(store) == {"a": "slot", "b": "disk", "c": "host", "d": "host"}


def test_slot_budget_limits_the_bytes_in_slots(disk):
    store = make_store(disk, "abc", num_slots=3, slot_bytes=2 * BYTES)
    with store.lease(["a", "b"]), pytest.raises(CapacityError, match="slot_bytes"), store.lease(["c"]):
        pass
    with store.lease(["c"]):
        assert sorted(tiers(store).values()) == ["host", "slot", "slot"]


def test_adapter_without_a_folder_is_never_dropped(disk):
    store = make_store(disk, host_bytes=2 * BYTES)
    store.add("memory", make_adapter(7), None)
    for value, name in enumerate("ab"):
        store.add(name, make_adapter(value), disk.write(name, value))
    assert tiers(store)["memory"] == "host"
    store.add("memory2", make_adapter(8), None)
    with pytest.raises(CapacityError, match="host_bytes"):
        store.add("memory3", make_adapter(9), None)
    assert store.names() == ["a", "b", "memory", "memory2"]


def test_replacement_serves_new_requests_while_running_ones_keep_the_old_weights(disk):
    store = make_store(disk, "a")
    with store.lease(["a"]) as old:
        store.add("a", make_adapter(10), disk.write("a2", 10), replace=True)
        with store.lease(["a"]) as new:
            assert (value_in_slot(store, old["a"]), value_in_slot(store, new["a"])) == (0, 10)
    assert [(state.version, state.tier) for state in store.states()] == [(2, "slot")]
    with store.lease(["a"]):
        assert sum(version is not None for version in store.slots._held) == 1  # the old slot was freed


def test_unloading_lets_running_requests_finish(disk):
    store = make_store(disk, "a")
    with store.lease(["a"]) as leased:
        store.remove("a")
        assert value_in_slot(store, leased["a"]) == 0
        with pytest.raises(AdapterNotFoundError):
            store.version("a")
    assert store.slots._held == [None, None]


def test_files_that_changed_since_loading_are_not_served(disk):
    store = make_store(disk, "ab", host_bytes=BYTES)
    disk.write("a", 123.456)
    with pytest.raises(AdapterChangedError, match="replace=True"), store.lease(["a"]):
        pass
    with store.lease(["b"]) as leased:
        assert value_in_slot(store, leased["b"]) == 1


def test_loading_in_the_background_does_not_block_others(disk):
    store = make_store(disk, "abc", host_bytes=2 * BYTES)
    disk.gate.clear()
    (load,) = store.prefetch(["a"])
    with store.lease(["c"]):
        assert tiers(store) == {"a": "disk", "b": "host", "c": "slot"}
    disk.gate.set()
    load.result(5)
    assert tiers(store)["a"] == "host"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda store: store.add("a", make_adapter(1), None), AdapterExistsError),
        (lambda store: store.add("a:b", make_adapter(1), None), NameFormatError),
        (lambda store: store.add("", make_adapter(1), None), NameFormatError),
        (lambda store: store.remove("zzz"), AdapterNotFoundError),
        (lambda store: store.prefetch(["zzz"]), AdapterNotFoundError),
        (lambda store: store.lease(["a", "zzz"]).__enter__(), AdapterNotFoundError),
    ],
)
def test_refused_calls_leave_the_store_untouched(disk, call, error):
    store = make_store(disk, "ab")
    before = store.states()
    with pytest.raises(error):
        call(store)
    assert store.states() == before


@pytest.mark.parametrize("option", ["num_slots", "host_bytes", "slot_bytes", "loading_threads"])
def test_config_refuses_values_below_one(option):
    with pytest.raises(ConfigError, match=option):
        StoreConfig(**{option: 0})


def test_many_threads_leasing_replacing_and_evicting_never_see_foreign_weights(disk):
    """Values identify an adapter: name i holds i or, once replaced, i + 100."""
    store = make_store(disk, "abcdefgh", num_slots=6, host_bytes=7 * BYTES)
    failures: list[str] = []

    def use(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            chosen = [int(i) for i in torch.randperm(8, generator=generator)[:2]]
            with store.lease(["abcdefgh"[i] for i in chosen]) as leased:
                for i in chosen:
                    before = value_in_slot(store, leased["abcdefgh"[i]])
                    if before not in (i, i + 100):
                        failures.append(f"{i}: {before}")

    def replace() -> None:
        for i in range(8):
            name = "abcdefgh"[i]
            store.add(name, make_adapter(i + 100), disk.write(f"{name}2", i + 100), replace=True)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)] + [threading.Thread(target=replace)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {state.version for state in store.states()} == {2}
    assert all(state.num_leases == 0 for state in store.states())


def test_adapter_at_rest_is_that_of_its_folder_or_the_one_given(disk):
    store = make_store(disk, "ab")
    given = make_adapter(5)
    store.add("c", given, None)
    assert store.at_rest("c") is given
    assert store.at_rest("b").layers["m"].lora_a[0, 0].item() == 1
    disk.write("b", 12345)
    with pytest.raises(AdapterChangedError, match="'b'"):
        store.at_rest("b")
    with pytest.raises(AdapterNotFoundError):
        store.at_rest("d")
