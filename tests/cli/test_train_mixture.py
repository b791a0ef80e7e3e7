"""`loraplex train mixture`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.cli.train import train_app
from loraplex.cli.train_mixture import read_sources
from loraplex.errors import ConfigError, LoraplexError
from loraplex.xlora.formats.folders import read_mixture_folder
from tests.tiny_models import tiny_model
from tests.training.mixture.tiny_mixture import FORMS, tiny_sources, write_experts
from tests.training.tiny_jobs import tiny_tokenizer


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A base model, three experts and three data files."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_experts(tmp_path)
    tiny_sources(tmp_path)
    return tmp_path


def train(folder: Path, *more: str) -> Result:
    arguments = ["mixture", "--model", str(folder / "base"), "--output", str(folder / "out"), "--name", "science"]
    arguments += ["--experts", f"a={folder / 'expert-0'},b={folder / 'expert-1'}"]
    arguments += ["--experts", f"c={folder / 'expert-2'}"]
    for form in FORMS:
        arguments += ["--data", f"{form}={folder / form}.jsonl"]
    arguments += ["--steps", "4", "--batch-size", "4", "--eval-every", "2", "--max-length", "200", "--no-plots"]
    return CliRunner().invoke(train_app, [*arguments, *more], catch_exceptions=False)


@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_trains_from_the_command_line(workplace: Path, layout: str) -> None:
    shares = ["--share", "messages=2", "--share", "prompt=1", "--share", "text=1"]
    options = ["--layerwise-scalings", "--xlora-depth", "2", "--xlora-size", "16", "--xlora-dropout-p", "0.1"]
    options += ["--scaling-pass-value", "none", "--top-k-lora", "2", "--softmax-temperature", "0.5"]
    result = train(workplace, "--layout", layout, *shares, *options, "--max-grad-norm", "none")
    assert result.exit_code == 0, result.output
    assert "held-out" in result.output
    folder = read_mixture_folder(workplace / "out" / "science")
    assert folder.layout == layout
    wanted = XLoraConfig(
        layerwise_scalings=True,
        xlora_depth=2,
        xlora_size=16,
        xlora_dropout_p=0.1,
        scaling_pass_value=1 / 3,  # the folder has no "none"
        top_k_lora=2,
        softmax_temperature=0.5,
    )
    assert folder.config == wanted
    assert list(folder.expert_names) == ["a", "b", "c"]
    entries = [json.loads(line) for line in (workplace / "out" / "science.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert entries[-1]["sources"].keys() == set(FORMS)
    model = MultiLoraModel.from_pretrained(workplace / "base")
    model.load_mixture("science", workplace / "out" / "science")
    assert "science" in model.names()


def test_a_trained_mixture_is_trained_on(workplace: Path) -> None:
    train(workplace, "--xlora-depth", "2", "--xlora-size", "16")
    arguments = ["mixture", "--model", str(workplace / "base"), "--output", str(workplace / "on"), "--name", "science"]
    arguments += ["--init-from", str(workplace / "out" / "science"), "--data", str(workplace / f"{FORMS[0]}.jsonl")]
    arguments += ["--steps", "1", "--batch-size", "4", "--max-length", "200", "--no-plots", "--learning-rate", "1e-5"]
    result = CliRunner().invoke(train_app, [*arguments, "--use-trainable-adapters"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    first, on = (read_mixture_folder(workplace / folder / "science") for folder in ("out", "on"))
    assert on.config == replace(first.config, use_trainable_adapters=True)
    assert on.expert_names == first.expert_names
    moved = {key: float((on.head[key] - first.head[key]).abs().max()) for key in first.head}
    assert 0 < max(moved.values()) < 1e-4, "it starts where the first ended"
    a, b = (
        read_adapter(read_mixture_folder(workplace / folder / "science").experts["a"]).layers
        for folder in ("out", "on")
    )
    assert any(not torch.equal(a[path].lora_b, b[path].lora_b) for path in a), "the experts train too"
    with pytest.raises(ConfigError, match="'xlora_size' can't be changed"):
        CliRunner().invoke(train_app, [*arguments, "--xlora-size", "8"], catch_exceptions=False)


def test_the_same_command_goes_on_or_is_finished(workplace: Path) -> None:
    first = train(workplace)
    log = (workplace / "out" / "science.jsonl").read_bytes()
    again = train(workplace)
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert (workplace / "out" / "science.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init-from", "elsewhere"], "not both"),
        (["--top-k-lora", "4"], "--top-k-lora is 4, but the mixture has 3 experts"),
        (["--xlora-depth", "0"], "--xlora-depth is 0"),
        (["--layout", "zip"], "layout is 'zip'"),
        (["--share", "physics=2"], r"--share names 'physics', but --data has \['messages', 'prompt', 'text'\]"),
        (["--share", "text=2"], r"shares for \['text'\] only"),
        (["--epochs", "2"], "--steps is 4 and --epochs is 2"),
        (["--experts", "d=nowhere/at/all"], "nowhere/at/all"),
        (["--data", "text=again.jsonl"], "several sources called 'text'"),
    ],
)
def test_refuses_bad_input_before_anything_is_written(workplace: Path, options: list[str], message: str) -> None:
    with pytest.raises(LoraplexError, match=message):
        train(workplace, *options)
    assert not (workplace / "out").exists()


def test_usage_errors_name_the_option(workplace: Path) -> None:
    for options, message in (
        (["--experts", "a=elsewhere"], "--experts names 'a' twice"),
        (["--experts", "folder"], "is not NAME=VALUE"),
        (["--max-grad-norm", "much"], "'much' is no number"),
        (["--share", "text=none"], "'none' is no number"),
    ):
        result = train(workplace, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())


def test_data_needs_no_names() -> None:
    sources = read_sources(["a.jsonl", "b=dir/b.jsonl"], ["b=0.5", "a.jsonl=1"], "--data")
    assert [(source.name, source.data, source.share) for source in sources] == [
        ("a.jsonl", "a.jsonl", 1.0),
        ("b", "dir/b.jsonl", 0.5),
    ]
