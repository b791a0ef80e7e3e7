"""A writer is killed at random moments: the adapter is whole, old or new, and nothing else is ever taken for one."""

import random
import time
from pathlib import Path

import pytest

from loraplex import MultiLoraModel
from loraplex.adapters import atomic_dir as atomic_folder_module
from loraplex.adapters.atomic_dir import exchange
from loraplex.adapters.leftovers import claim_temporary, is_leftover, remove_leftovers, restore_replaced
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.cli.options import adapters_in
from loraplex.models.adapter_watcher import AdapterWatcher
from tests.adapters.replacing_writer import Writer, version_of, versioned_adapter
from tests.parts import skip_here
from tests.tiny_models import tiny_model

KILLS = [8, pytest.param(40, marks=pytest.mark.slow)]


def loaded_version(model: MultiLoraModel, name: str) -> int:
    with model.store.lease([name]) as leased:
        slot = leased[name].slot
        assert slot is not None
        held = model.store.slots.held(slot)
        values = {value for weights in held.layers.values() for value in weights.lora_a.unique().tolist()}
        values |= {weights.scaling for weights in held.layers.values()}
    assert len(values) == 1, f"half of one version and half of another: {values}"
    return int(values.pop())


def wait_for_gap(folder: Path) -> None:
    """Return while nothing is at the folder, which its writer has moved aside for a moment."""
    end = time.monotonic() + 30
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.001)


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("num_kills", KILLS)
def test_adapter_is_whole_whenever_its_writer_is_killed(tmp_path: Path, num_kills: int, can_exchange: bool) -> None:
    folder, draw, first = tmp_path / "adapter", random.Random(num_kills), 1
    model = MultiLoraModel(tiny_model("llama"))
    num_missing = 0
    for kill in range(num_kills):
        writer = Writer(folder, can_exchange=can_exchange, first=first)
        time.sleep(draw.uniform(0, 0.1))
        if kill % 4 == 1 and not can_exchange:
            wait_for_gap(folder)
        writer.kill()
        assert folder.is_dir() or not can_exchange, "the folder was away for a moment"
        num_missing += not folder.is_dir()
        assert adapters_in(tmp_path) == {"adapter": folder}
        AdapterWatcher(model, tmp_path).look()
        assert model.names() == ["adapter"]
        found = version_of(read_adapter(folder))
        assert found in (writer.finished, writer.finished + 1), "neither the old version nor the new one"
        assert loaded_version(model, "adapter") == found
        model.unload("adapter")
        first = found + 1
    assert can_exchange or num_missing, "no kill hit the gap that is to be restored"
    write_adapter(versioned_adapter(1), folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "leftovers stayed"


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two-renames"])
def test_watched_folder_follows_a_writer_that_is_killed(tmp_path: Path, can_exchange: bool) -> None:
    model, draw, first = MultiLoraModel(tiny_model("llama")), random.Random(0), 1
    watched = AdapterWatcher(model, tmp_path)
    for _ in range(4):
        writer = Writer(tmp_path / "adapter", can_exchange=can_exchange, first=first)
        end = time.monotonic() + draw.uniform(0.05, 0.2)
        while time.monotonic() < end:
            watched.look()
            assert set(model.names()) <= {"adapter"}
            if model.names():
                loaded_version(model, "adapter")  # is of one version
        writer.kill()
        watched.look()
        assert watched.errors == {}
        assert loaded_version(model, "adapter") in (writer.finished, writer.finished + 1)
        first = loaded_version(model, "adapter") + 1


def test_watched_folder_restores_what_it_had_given_up(tmp_path: Path) -> None:
    """The writer lives through the looks that unload the adapter, and is killed then."""
    model, folder = MultiLoraModel(tiny_model("llama")), tmp_path / "adapter"
    write_adapter(versioned_adapter(1), folder)
    watched = AdapterWatcher(model, tmp_path)
    watched.look()
    with claim_temporary(folder) as temporary:
        folder.rename(temporary.with_suffix(".old"))
        for _ in range(3):
            watched.look()
        assert model.names() == []
    watched.look()
    assert loaded_version(model, "adapter") == 1


def test_reader_beside_a_writer_never_sees_two_versions(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    writer = Writer(folder, can_exchange=True)
    versions = []
    for _ in range(150):
        before = writer.finished
        versions.append(version_of(read_adapter(folder)))
        assert before <= versions[-1] <= writer.finished + 1
    writer.kill()
    assert len(set(versions)) > 1, "the writer wrote nothing meanwhile"


def test_exchange_swaps_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        skip_here("a file system that swaps folders")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


def test_living_writer_keeps_its_temporary(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with claim_temporary(folder) as temporary:
        remove_leftovers(folder)
        assert temporary.is_dir()
        assert all(is_leftover(path) for path in tmp_path.iterdir())
        assert adapters_in(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_folder_is_restored_only_where_nothing_is(tmp_path: Path) -> None:
    folder, aside = tmp_path / "adapter", tmp_path / ".adapter.0123abcd.old"
    write_adapter(versioned_adapter(2), folder)
    write_adapter(versioned_adapter(1), aside)
    restore_replaced(folder)
    assert version_of(read_adapter(folder)) == 2
    write_adapter(versioned_adapter(3), folder, overwrite=True)
    assert not aside.exists(), "a write removes what a dead writer had moved aside"
    write_adapter(versioned_adapter(1), aside)
    folder.rename(tmp_path / "elsewhere")
    assert version_of(read_adapter(folder)) == 1


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    for name in (".adapter.old", ".adapter2.0123abcd.old", ".adapter.0123abcd.tmp.bak"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "adapter")
    restore_replaced(tmp_path / "adapter")
    assert len(list(tmp_path.iterdir())) == 3


def test_two_renames_are_used_where_folders_cant_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_folder_module, "exchange", lambda one, other: False)
    for version in (1, 2):
        write_adapter(versioned_adapter(version), tmp_path / "adapter", overwrite=True)
        assert version_of(read_adapter(tmp_path / "adapter")) == version
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
