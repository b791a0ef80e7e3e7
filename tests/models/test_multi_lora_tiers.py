"""Where adapters lie (slot, host memory, disk) never shows in what they compute."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loraplex.models.registry
from loraplex import MultiLoraModel, StoreConfig
from loraplex.errors import AdapterChangedError, CapacityError
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

NAMES = "abcdef"
IDS = torch.randint(3, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root, base = tmp_path_factory.mktemp("adapters"), tiny_model("llama")
    targets = linear_targets("llama")
    options = {"use_dora": True}
    return {
        name: random_peft_adapter(
            base, root / name, targets=targets, r=4, seed=seed, options=options if name == "f" else None
        )
        for seed, name in enumerate(NAMES)
    }


def make_model(folders: dict[str, Path], names: str = NAMES, **store: int | None) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(**store))
    for name in names:
        model.load_adapter(name, folders[name])
    return model


def budget_for(folders: dict[str, Path], num_adapters: int) -> int:
    """Bytes of the largest adapters."""
    sizes = sorted(state.num_bytes for state in make_model(folders).adapters())
    return sum(sizes[-num_adapters:])


@torch.no_grad()
def logits(model: MultiLoraModel, adapters: list[str | None]) -> Tensor:
    return model(IDS, adapters=adapters).logits


def refuse_reading(version):
    raise AssertionError(f"{version.name} was read")


def tiers(model: MultiLoraModel) -> dict[str, str]:
    return {state.name: state.tier for state in model.adapters()}


@pytest.mark.parametrize("num_in_host", [None, 3, 2])
def test_adapters_that_come_and_go_compute_what_resident_ones_do(folders, num_in_host):
    host_bytes = None if num_in_host is None else budget_for(folders, num_in_host)
    scarce = make_model(folders, num_slots=2, host_bytes=host_bytes)
    resident = make_model(folders)
    draw = random.Random(0)
    seen_tiers = set()
    for _ in range(40):
        one, other = draw.sample(NAMES, 2)
        seen_tiers.update(tiers(scarce)[name] for name in (one, other))
        if draw.random() < 0.5:
            scarce.prefetch(draw.sample(NAMES, 2))
        rows = [one, None, f"{other}:0.5+{one}"]
        assert torch.equal(logits(scarce, rows), logits(resident, rows))
    assert seen_tiers == ({"slot", "host"} if num_in_host is None else {"slot", "host", "disk"})
    assert list(tiers(scarce).values()).count("slot") == 2


def test_decoding_equals_resident_adapters_after_a_reload(folders):
    scarce = make_model(folders, num_slots=2, host_bytes=budget_for(folders, 2))
    resident = make_model(folders)
    options = {"max_new_tokens": 8, "do_sample": False}
    for rows in (["a", "b", None], ["f", None, "f:0.5+a"], ["c", "d", "c"], ["a", "b", None]):
        tokens = scarce.generate(IDS, torch.ones_like(IDS), adapters=rows, **options)
        assert torch.equal(tokens, resident.generate(IDS, torch.ones_like(IDS), adapters=rows, **options))


def test_prefetched_adapter_is_not_read_again_by_its_request(folders, monkeypatch):
    model = make_model(folders, num_slots=2, host_bytes=budget_for(folders, 3))
    assert tiers(model)["a"] == "disk"
    for load in model.store.prefetch(["a", "b"]):
        load.result(20)
    assert {tiers(model)[name] for name in "ab"} == {"host"}

    monkeypatch.setattr(model.store, "_read_unchanged", refuse_reading)
    assert torch.equal(logits(model, ["a", "b", None]), logits(make_model(folders), ["a", "b", None]))


def test_what_there_is_no_host_memory_for_is_not_read(folders, monkeypatch):
    model = make_model(folders, num_slots=2, host_bytes=budget_for(folders, 2))
    model.pin("e")
    model.pin("f")
    monkeypatch.setattr(model.store, "_read_unchanged", refuse_reading)
    with pytest.raises(CapacityError, match="no host memory for adapter 'a'"):
        model.store.prefetch(["a"])[0].result(20)


def test_pinned_adapter_stays_in_its_slot(folders):
    model = make_model(folders, num_slots=2)
    model.pin("a")
    for name in "bcdef":
        logits(model, [name, "a", None])
    assert tiers(model)["a"] == "slot"


def test_folder_given_by_a_relative_path_is_found_from_another_working_directory(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(folders["a"].parent)
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(host_bytes=budget_for(folders, 1)))
    model.load_adapter("a", "a")
    model.load_adapter("b", folders["b"])
    monkeypatch.chdir(tmp_path)
    assert tiers(model)["a"] == "disk"
    assert torch.equal(logits(model, ["a"] * 3), logits(make_model(folders), ["a"] * 3))


def test_folder_that_is_overwritten_while_it_is_loaded_is_never_served_from_disk_as_what_was_loaded(
    folders, monkeypatch, tmp_path
):
    read_adapter = loraplex.models.registry.read_adapter
    base, targets = tiny_model("llama"), linear_targets("llama")
    folder = random_peft_adapter(base, tmp_path / "a", targets=targets, seed=0)

    def read_and_overwrite(path, **options):
        adapter = read_adapter(path, **options)
        random_peft_adapter(base, path, targets=targets, seed=1)
        return adapter

    model = MultiLoraModel(base, store=StoreConfig(host_bytes=budget_for(folders, 1)))
    monkeypatch.setattr(loraplex.models.registry, "read_adapter", read_and_overwrite)
    model.load_adapter("a", folder)
    monkeypatch.undo()
    model.load_adapter("b", folders["b"])
    assert tiers(model)["a"] == "disk"
    with pytest.raises(AdapterChangedError, match="replace=True"):
        logits(model, ["a"] * 3)
