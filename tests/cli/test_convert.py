"""`loraplex convert` as it is typed."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.errors import AdapterExistsError
from tests.tiny_models import random_peft_adapter, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with its weights in a pickle file."""
    base = tiny_model("llama")
    base.config.save_pretrained(tmp_path / "base")
    made = random_peft_adapter(base, tmp_path / "protein", targets=("q_proj", "v_proj"))
    torch.save(load_file(made / "adapter_model.safetensors"), made / "adapter_model.bin")
    (made / "adapter_model.safetensors").unlink()
    return made


def test_peft_folder_is_written_beside_the_source(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["convert", str(folder), "--dtype", "bfloat16"])
    assert run.exit_code == 0, run.output
    assert run.output == f"4 modules: {tmp_path / 'protein-peft'}\n"
    tensors = load_file(tmp_path / "protein-peft" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = CliRunner().invoke(cli, ["convert", str(folder)])
    assert isinstance(again.exception, AdapterExistsError)


def test_gguf_file_is_written_and_converted_back(folder: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    run = CliRunner().invoke(cli, ["convert", str(folder), "--to", "gguf", "--base", base])
    assert run.exit_code == 0, run.output
    assert len(gguf.GGUFReader(tmp_path / "protein.gguf").tensors) == 8
    back = CliRunner().invoke(cli, ["convert", str(tmp_path / "protein.gguf"), str(tmp_path / "back"), "--base", base])
    assert back.exit_code == 0, back.output
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)


def test_unknown_settings_are_ignored_on_request(folder: Path, tmp_path: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"a_future_setting": 3}))
    assert CliRunner().invoke(cli, ["convert", str(folder)]).exit_code == 1
    assert CliRunner().invoke(cli, ["convert", str(folder), "--ignore-unknown"]).exit_code == 0
    assert CliRunner().invoke(cli, ["inspect", str(tmp_path / "protein-peft")]).exit_code == 0


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--dtype", "float16", "--to", "gguf"], ["--to", "onnx"]])
def test_wrong_options_are_usage_errors(folder: Path, options: list[str]) -> None:
    assert CliRunner().invoke(cli, ["convert", str(folder), *options]).exit_code == 2
