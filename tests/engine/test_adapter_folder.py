"""A watched folder: what appears is loaded, what changes replaced, what goes unloaded, what is broken told."""

import json
import os
import shutil

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.errors import ConfigError
from loraplex.models.adapter_watcher import AdapterWatcher
from tests.tiny_models import random_peft_adapter, tiny_model

IDS = torch.arange(5, 15)[None]


@pytest.fixture
def model() -> MultiLoraModel:
    return MultiLoraModel(tiny_model("llama"))


def write(model, folder, seed, targets=("q_proj", "v_proj")):
    folder.parent.mkdir(parents=True, exist_ok=True)
    return random_peft_adapter(model.base, folder, targets=targets, seed=seed)


def logits(model, name):
    with torch.no_grad():
        return model(IDS, adapters=[name]).logits


def test_adapters_come_change_and_go(model, tmp_path):
    folder = AdapterWatcher(model, tmp_path)
    write(model, tmp_path / "protein", 1)
    write(model, tmp_path / "team" / "materials", 2)
    folder.look()
    assert model.names() == ["protein", "team/materials"]
    before = logits(model, "protein")
    shutil.rmtree(tmp_path / "protein")
    write(model, tmp_path / "protein", 3)
    folder.look()
    assert not torch.equal(logits(model, "protein"), before)
    shutil.rmtree(tmp_path / "team")
    folder.look()
    assert "team/materials" in model.names(), "away for a moment is not gone"
    folder.look()
    assert model.names() == ["protein"]
    assert folder.errors == {}


def test_what_cant_be_loaded_is_told_and_what_was_there_stays(model, tmp_path):
    write(model, tmp_path / "protein", 1)
    write(model, tmp_path / "broken", 2)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"half")
    folder = AdapterWatcher(model, tmp_path)
    folder.look()
    assert model.names() == ["protein"]
    assert list(folder.errors) == ["broken"]
    before = logits(model, "protein")
    config = tmp_path / "protein" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 99}))
    folder.look()
    assert set(folder.errors) == {"broken", "protein"}
    assert torch.equal(logits(model, "protein"), before)
    shutil.rmtree(tmp_path / "broken")
    write(model, tmp_path / "broken", 2)
    folder.look()
    assert "broken" in model.names()
    assert "broken" not in folder.errors


def test_a_folder_that_was_away_while_it_was_read_is_read_again(model, tmp_path, monkeypatch):
    """A writer without exchange moves the old folder aside, and may be killed before the new one is in its place."""
    written = write(model, tmp_path / "protein", 1)
    load = model.load_adapter

    def read_while_away(name, path, **options):
        path.rename(tmp_path / ".aside")
        load(name, path, **options)

    folder = AdapterWatcher(model, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(model, "load_adapter", read_while_away)
        folder.look()
    (tmp_path / ".aside").rename(written)  # the same files
    assert list(folder.errors) == ["protein"]
    folder.look()
    assert model.names() == ["protein"]
    assert folder.errors == {}


def test_half_written_folders_are_left_alone(model, tmp_path):
    write(model, tmp_path / ".protein.1234.tmp", 1)
    folder = AdapterWatcher(model, tmp_path)
    folder.look()
    assert model.names() == []


def test_a_folder_is_watched_until_it_is_stopped(model, tmp_path):
    folder = AdapterWatcher(model, tmp_path, interval_s=0.02)
    folder.start()
    staged = write(model, tmp_path / ".staged", 1)
    staged.rename(tmp_path / "protein")
    for _ in range(500):
        if "protein" in model.names():
            break
        folder._ended.wait(0.02)
    folder.stop()
    assert model.names() == ["protein"]


@pytest.mark.parametrize(("path", "interval"), [("nothing-here", 1.0), (".", 0)])
def test_what_cant_be_watched_is_refused(model, tmp_path, path, interval):
    with pytest.raises(ConfigError):
        AdapterWatcher(model, tmp_path / path, interval_s=interval)


class Unexpected(Exception):
    """What no reader of files is known to raise."""


def test_thread_lives_on_whatever_a_folder_raises(model, tmp_path, monkeypatch):
    load = model.load_adapter

    def failing(name, *args, **options):
        if name == "bad":
            raise Unexpected("of all things")
        load(name, *args, **options)

    monkeypatch.setattr(model, "load_adapter", failing)
    write(model, tmp_path / "bad", 1)
    folder = AdapterWatcher(model, tmp_path, interval_s=0.02)
    folder.start()
    write(model, tmp_path / ".staged", 2).rename(tmp_path / "good")
    wait_for(lambda: model.names() == ["good"], folder)
    assert "Unexpected: of all things" in folder.errors["bad"]
    looked = []
    monkeypatch.setattr(folder, "_adapter_folders", lambda: looked.append(1) or 1 / 0)
    wait_for(lambda: len(looked) > 2, folder)
    assert "ZeroDivisionError" in folder.fault
    monkeypatch.undo()
    wait_for(lambda: folder.fault is None and "bad" in model.names(), folder, touch=tmp_path / "bad")
    folder.stop()


def test_link_to_itself_is_told_and_the_others_are_loaded(model, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name.split(".")[0]).mkdir()
        write(model, tmp_path / name.split(".")[0], 1)
        (tmp_path / name.split(".")[0] / name).unlink()
        (tmp_path / name.split(".")[0] / name).symlink_to(name)
    write(model, tmp_path / "good", 2)
    folder = AdapterWatcher(model, tmp_path)
    folder.look()
    folder.look()
    assert model.names() == ["good"]
    assert folder.errors


def test_what_cant_be_seen_is_not_taken_for_gone(model, tmp_path, monkeypatch):
    watched = tmp_path / "watched"
    write(model, watched / "team" / "a", 1)
    write(model, watched / "b", 2)
    folder = AdapterWatcher(model, watched)
    folder.look()
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("team"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    for _ in range(3):
        folder.look()
    assert model.names() == ["b", "team/a"]
    assert "Permission denied" in folder.errors["team"]
    monkeypatch.undo()
    watched.rename(tmp_path / "away")
    for _ in range(3):
        folder._look_on()
    assert model.names() == ["b", "team/a"]
    assert "FileNotFoundError" in folder.fault


def wait_for(is_so, folder, touch=None):
    for _ in range(500):
        if is_so():
            return
        if touch is not None:
            os.utime(touch / "adapter_config.json")
        folder._ended.wait(0.02)
    raise AssertionError(f"never happened: {folder.errors} {folder.fault}")
