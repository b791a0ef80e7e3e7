"""A run writes over nothing that it reads, and over nothing that loraplex didn't write."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.bench.report import save_json
from loraplex.errors import ConfigError, LoraplexError, OutputError
from loraplex.output_files import MARK, check_replaceable, save_figure, whole_file
from loraplex.residual.format import write_residual
from loraplex.training import MixtureTrainConfig, StepsConfig, TrainConfig, train_adapters, train_mixture
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.scalings.file import write_scalings
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import records, tiny_job, tiny_tokenizer, write_records


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def train(folder: Path, resume: bool, **options: Any) -> None:
    job = tiny_job(folder.parent, "j", max_steps=2, **options)
    config = TrainConfig(output=folder, plots=True, resume=resume, progress=False)
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "place", ["j.jsonl", "j.png", "j/data.jsonl", "j.diverged/data.jsonl", "checkpoint.safetensors"]
)
@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_data_in_the_place_of_an_output_is_refused_and_stays(
    tmp_path: Path, option: str, place: str, resume: bool
) -> None:
    output = tmp_path / "out"
    (output / place).parent.mkdir(parents=True)
    write_records(output / place, records("text", 24))
    before = content(output)
    with pytest.raises(ConfigError, match=f"{option} of job 'j' is"):
        train(output, resume, **{option: output / place})
    assert content(output) == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_data_that_a_log_is_a_link_to_is_refused_and_stays(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    data = write_records(tmp_path / "mine.jsonl", records("text", 24))
    (tmp_path / "out").mkdir()
    link(data, tmp_path / "out" / "j.jsonl")
    before = data.read_bytes()
    with pytest.raises(ConfigError, match="data of job 'j'"):
        train(tmp_path / "out", False, data=data)
    assert data.read_bytes() == before


def test_adapter_to_start_from_is_not_replaced(tmp_path: Path) -> None:
    random_peft_adapter(tiny_model("llama"), tmp_path / "out" / "j", targets=("q_proj", "v_proj"))
    before = content(tmp_path / "out")
    for option, value in (("init_from", tmp_path / "out" / "j"), ("after", [(tmp_path / "out" / "j", 1.0)])):
        with pytest.raises(ConfigError, match=option):
            train(tmp_path / "out", False, **{option: value})
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["j.jsonl", "j.png", "checkpoint.safetensors"])
def test_file_of_somebody_else_in_the_place_of_an_output_stays(tmp_path: Path, name: str, resume: bool) -> None:
    output = tmp_path / "out"
    output.mkdir()
    if name == "checkpoint.safetensors":
        save_file({"a": torch.ones(3)}, output / name, metadata={"format": "pt"})
    elif name == "j.png":
        Figure().savefig(output / name)
    else:
        write_records(output / name, records("text", 3))
    before = content(output)
    with pytest.raises(OutputError, match="not known to be of loraplex"):
        train(output, resume)
    assert content(output) == before


def test_folder_and_device_in_the_place_of_an_output_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "j.jsonl").mkdir(parents=True)
    with pytest.raises(OutputError):
        train(tmp_path / "out", False)
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other" / "j.jsonl")
    with pytest.raises(OutputError):
        train(tmp_path / "other", False)


def test_a_run_replaces_what_a_run_has_left_and_goes_on_without_its_log(tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(output, True)
    train(output, False)
    (output / "j.jsonl").unlink()
    train(output, True)
    assert b"\0" not in (output / "j.jsonl").read_bytes()
    (output / "checkpoint.safetensors").write_bytes((output / "checkpoint.safetensors").read_bytes()[:500])
    train(output, False)  # ours, though it is damaged
    assert [json.loads(line)["step"] for line in (output / "j.jsonl").read_text().splitlines()][-1] == 2


@pytest.mark.parametrize("place", ["m.jsonl", "m.png", "m/data.jsonl", "checkpoint.safetensors"])
@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_data_of_a_mixture_in_the_place_of_an_output_stays(tmp_path: Path, option: str, place: str) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    for name in "ab":
        model.load_adapter(name, random_peft_adapter(model.base, tmp_path / name, targets=("q_proj",)))
    model.create_mixture("m", ["a", "b"], XLoraConfig(), seed=0)
    output = tmp_path / "out"
    (output / place).parent.mkdir(parents=True)
    taken = write_records(output / place, records("text", 24))
    other = write_records(tmp_path / "other.jsonl", records("text", 24))
    data, held_out = (taken, other) if option == "data" else (other, taken)
    config = MixtureTrainConfig(
        run=TrainConfig(output=output, resume=False, progress=False),
        steps=StepsConfig(max_steps=1),
        eval_data=[held_out],
    )
    before = content(output)
    with pytest.raises(ConfigError, match="data source"):
        train_mixture(model, "m", [data], config)
    assert content(output) == before


WRITERS: dict[str, Callable[[Path], None]] = {
    "plot.png": lambda path: save_figure(Figure(), path, 50),
    "plot.svg": lambda path: save_figure(Figure(), path, 50),
    "plot.pdf": lambda path: save_figure(Figure(), path, 50),
    "scalings.safetensors": lambda path: write_scalings([], path),
    "report.json": lambda path: save_json(path, {}, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writer_replaces_its_own_file_and_no_other(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    WRITERS[name](path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "temporary files stayed"
    path.write_text("mine")
    with pytest.raises(LoraplexError, match="not known to be of loraplex"):
        WRITERS[name](path)
    assert path.read_text() == "mine"


def test_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text(f"{MARK} 1")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text(f"{MARK} 2")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        fail()
    assert path.read_text() == f"{MARK} 1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    check_replaceable(path)


@pytest.mark.parametrize("name", ["loop", "a\0b", "x" * 300])
def test_place_that_can_not_be_written_is_told_by_every_writer(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    model = MultiLoraModel(tiny_model("llama"))
    adapter = read_adapter(random_peft_adapter(model.base, tmp_path / "a", targets=("q_proj",)))
    model.load_adapter("a", adapter)
    model.create_mixture("m", ["a"], XLoraConfig())
    writers: list[Callable[[Path], object]] = [
        *WRITERS.values(),
        lambda path: write_adapter(adapter, path, overwrite=True),
        lambda path: write_residual(random_linked(model.registry.linked.layers, 1), path, overwrite=True),
        lambda path: model.save_mixture("m", path, overwrite=True),
        lambda path: train(path, resume=False),
    ]
    for write in writers:
        with pytest.raises(LoraplexError):
            write(tmp_path / name)
