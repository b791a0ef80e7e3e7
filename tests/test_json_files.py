"""JSON from outside: whatever a file holds, its reader raises a typed error that names the file."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex.adapters.peft.reader import read_adapter
from loraplex.cli.job_options import read_job_file
from loraplex.errors import (
    AdapterFormatError,
    CheckpointError,
    ConfigError,
    DatasetError,
    LoraplexError,
    ScalingsFileError,
)
from loraplex.json_files import MAX_DEPTH, parse_json, read_json
from loraplex.residual.format import read_residual
from loraplex.server.auth.keys import KeyFile
from loraplex.server.settings_sources import load_config
from loraplex.training.core.checkpoint import load_checkpoint
from loraplex.training.data.records import parse_record, read_records
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.scalings.file import read_scalings

DEEP = ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000]
WRONG = [*DEEP, "", "{", "\0", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', "9" * 5000, "null", "3", '"text"']


@pytest.mark.parametrize("text", WRONG[:10])
def test_what_is_wrong_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_depth_counts_brackets_outside_of_strings_up_to_the_limit() -> None:
    brackets = {"a": "[{" * 500 + '\\"[[', 'b"[': ["[" * 90]}
    assert parse_json(json.dumps(brackets)) == brackets
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH + " ") is not None
    assert parse_json(json.dumps([[]] * 1000)) == [[]] * 1000
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_whole_surrogate_pairs_and_large_finite_numbers_are_taken() -> None:
    assert parse_json('["\\ud83d\\ude00", 1e308, -1e-400, 12345678901234567890]')[0] == "\N{GRINNING FACE}"
    assert parse_json("[NaN, Infinity]", finite=False)[1] == float("inf")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # sparse
    tracemalloc.start()
    with pytest.raises(ValueError, match="bytes"):
        read_json(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def adapter_config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    read_adapter(folder)


def mixture_config(name: str) -> Callable[[Path, str], None]:
    def read(folder: Path, text: str) -> None:
        (folder / name).write_text(text)
        read_mixture_folder(folder)

    return read


def residual_config(folder: Path, text: str) -> None:
    (folder / "residual_config.json").write_text(text)
    save_file({"x": torch.zeros(1)}, folder / "residual_model.safetensors")
    read_residual(folder)


def checkpoint(folder: Path, text: str) -> None:
    save_file({"x": torch.zeros(1)}, folder / "checkpoint.safetensors", metadata={"loraplex_training": text})
    load_checkpoint(folder, [], {})


def scalings(folder: Path, text: str) -> None:
    save_file({"x": torch.zeros(1)}, folder / "scalings.safetensors", metadata={"loraplex_scalings": text})
    read_scalings(folder / "scalings.safetensors")


def records(folder: Path, text: str) -> None:
    (folder / "data.jsonl").write_text(text)
    read_records(folder / "data.jsonl")


def keys(folder: Path, text: str) -> None:
    (folder / "keys.json").write_text(text)
    KeyFile(folder / "keys.json").records()


def settings(folder: Path, text: str) -> None:
    (folder / "serve.json").write_text(text)
    load_config(folder / "serve.json", {})


READERS: dict[str, tuple[Callable[[Path, str], None], type[LoraplexError]]] = {
    "adapter_config.json": (adapter_config, AdapterFormatError),
    "X-LoRA in PEFT's layout": (mixture_config("adapter_config.json"), AdapterFormatError),
    "X-LoRA in the original layout": (mixture_config("xlora_config.json"), AdapterFormatError),
    "residual_config.json": (residual_config, AdapterFormatError),
    "checkpoint": (checkpoint, CheckpointError),
    "scalings": (scalings, ScalingsFileError),
    "training data": (records, DatasetError),
    "keys": (keys, ConfigError),
    "settings": (settings, ConfigError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:12])
def test_every_reader_raises_its_own_error(reader: str, text: str, tmp_path: Path) -> None:
    read, error = READERS[reader]
    with pytest.raises(error) as raised:
        read(tmp_path, text)
    assert str(tmp_path) in str(raised.value)
    assert len(str(raised.value)) < 1000 + 3 * len(str(tmp_path))


@pytest.mark.parametrize("reader", ["settings", "jobs"])
def test_toml_that_is_nested_too_deeply_is_refused(reader: str, tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(file, {}) if reader == "settings" else read_job_file(file)


def test_a_record_is_not_refused_for_what_its_text_quotes() -> None:
    content: dict[str, Any] = {"prompt": "[" * 1000, "completion": json.dumps([[[{"a": "\\"}]]] * 99)}
    assert parse_record(json.dumps(content), "x:1").prompt == "[" * 1000
