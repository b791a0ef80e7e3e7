"""`loraplex auto fit`, and what `loraplex generate --adapters auto` then does."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex import MultiLoraModel
from loraplex.adapters.prompt_centroid import read_centroid
from loraplex.cli.app import cli
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_tokenizer, write_records

ENDS = {"a": "where do the quick brown foxes go?", "b": "12 + 34 * 56 - 78 = "}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, (name, end) in enumerate(ENDS.items()):
        random_peft_adapter(base, tmp_path / "adapters" / name, targets=linear_targets("llama"), seed=seed)
        write_records(tmp_path / f"{name}.jsonl", [{"prompt": f"{i} {end}", "completion": "x"} for i in range(9)])
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(part) for part in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_folders_learn_their_prompts_and_prompts_choose(root: Path) -> None:
    data = [part for name in ENDS for part in ("--data", f"{root / 'adapters' / name}={root / name}.jsonl")]
    told = run("auto", "fit", "--model", root / "base", *data, "--limit", 6, "--raw")
    assert "1.00" in told
    for name in ENDS:
        centroid = read_centroid(root / "adapters" / name)
        assert centroid is not None
        assert centroid.num_prompts == 6
    options = ["--model", root / "base", "--load-all", root / "adapters", "--raw", "--max-tokens", 3, "--json"]
    asked = [f"7 {end}" for end in ENDS.values()]
    found = json.loads(run("generate", *asked, "--adapters", "auto", "--adapters", "auto", *options))
    named = json.loads(run("generate", *asked, "--adapters", "a", "--adapters", "b", *options))
    assert [row["adapters"] for row in found] == ["a", "b"]
    assert [row["text"] for row in found] == [row["text"] for row in named]
    assert all(row["auto_score"] > 0.4 for row in found)
    table = run("generate", *asked, "--adapters", "auto", "--adapters", "auto", *options[:-1])
    assert "auto: a" in table
    one = CliRunner().invoke(cli, [str(part) for part in ("generate", asked[0], "--adapters", "auto", *options[:-1])])
    assert one.stdout.strip() == named[0]["text"]
    assert "auto: a\n" in one.stderr


def test_what_can_not_be_fitted_is_refused(root: Path) -> None:
    result = CliRunner().invoke(cli, ["auto", "fit", "--data", f"{root / 'nowhere'}={root / 'a.jsonl'}"])
    assert result.exit_code == 2
    assert "folder" in result.output


def test_python_fits_and_saves(root: Path) -> None:
    model = MultiLoraModel.from_pretrained(root / "base")
    model.load_adapter("a", root / "adapters" / "a")
    model.fit_auto({"a": [f"{i} {ENDS['a']}" for i in range(5)]}, chat=False, save=True)
    again = MultiLoraModel.from_pretrained(root / "base")
    again.load_adapter("a", root / "adapters" / "a")
    assert again.registry.auto.names() == ["a"]
    ids = tiny_tokenizer()(f"9 {ENDS['a']}", return_tensors="pt")["input_ids"]
    (choice,) = again.choose_adapters(ids)
    assert choice.name == "a"
    assert choice == model.choose_adapters(ids)[0]
