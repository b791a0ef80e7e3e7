"""A watched folder: what appears is loaded, what changes replaced, what goes unloaded, what is broken told."""

import json
import shutil

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.adapter_folder import AdapterFolder
from loraplex.errors import ConfigError
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
    folder = AdapterFolder(model, tmp_path)
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
    folder = AdapterFolder(model, tmp_path)
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


def test_half_written_folders_are_left_alone(model, tmp_path):
    write(model, tmp_path / ".protein.1234.tmp", 1)
    folder = AdapterFolder(model, tmp_path)
    folder.look()
    assert model.names() == []


def test_a_folder_is_watched_until_it_is_stopped(model, tmp_path):
    folder = AdapterFolder(model, tmp_path, interval_s=0.02)
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
        AdapterFolder(model, tmp_path / path, interval_s=interval)
