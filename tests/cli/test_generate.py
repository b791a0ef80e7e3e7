"""`loraplex generate` and the app around it."""

import json
import shutil

import pytest
import torch
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.adapters.peft.writer import write_adapter
from loraplex.bench.random_adapters import random_adapter, tiny_llama
from loraplex.cli.app import cli
from loraplex.cli.errors import run
from loraplex.cli.generate import pair_rows
from loraplex.cli.options import named_values
from loraplex.errors import AdapterNotFoundError, BaseModelError, RequestError
from loraplex.residual.format import write_residual
from loraplex.residual.modules import BaseFingerprint, SteeringVector
from tests.tiny_models import tiny_model

runner = CliRunner()


@pytest.mark.parametrize(
    ("prompts", "adapters", "rows"),
    [
        (["p"], [], [("p", "none")]),
        (["p", "q"], [], [("p", "none"), ("q", "none")]),
        (["p"], ["a", "b:0.5"], [("p", "a"), ("p", "b:0.5")]),
        (["p", "q"], ["a", "none"], [("p", "a"), ("q", "none")]),
    ],
)
def test_prompts_and_adapters_become_rows(prompts, adapters, rows):
    assert pair_rows(prompts, adapters) == rows


def test_unequal_numbers_of_prompts_and_adapters_are_refused():
    with pytest.raises(typer.BadParameter, match="3 prompts but 2"):
        pair_rows(["p", "q", "r"], ["a", "b"])


@pytest.mark.parametrize("options", [["a"], ["=x"], ["a="], ["a=1", "a=2"]])
def test_malformed_names_are_refused(options):
    with pytest.raises(typer.BadParameter, match="--load"):
        named_values(options, "--load")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk with a word tokenizer, two adapters and a mixture of them."""
    folder = tmp_path_factory.mktemp("generate")
    base = tiny_llama()
    base.save_pretrained(folder / "model")
    vocabulary = {"[UNK]": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "model")
    model = MultiLoraModel(base, source=folder / "model")
    for seed, name in enumerate("ab"):
        adapter = random_adapter(model.adaptable.shapes, 4, model.dtype, seed, std_b=0.3)
        write_adapter(adapter, folder / "adapters" / name)
        model.load_adapter(name, folder / "adapters" / name)
    model.create_mixture("mixed", ["a", "b"], XLoraConfig(layerwise_scalings=True))
    model.save_mixture("mixed", folder / "mixture")
    return folder


def invoke(folder, *arguments):
    model = ["--model", str(folder / "model"), "--load-all", str(folder / "adapters")]
    options = ["--raw", "--json", "--max-tokens", "8", "--temperature", "0"]
    result = runner.invoke(cli, ["generate", *model, *options, *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


def answer(model, prompt, adapters):
    """By transformers' generate, alone."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 8}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), adapters=[adapters], **options)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_every_row_is_answered_through_its_own_adapters(folder):
    choices = ["none", "a", "a:0.7+b:0.3", "mixed"]
    arguments = [word for choice in choices for word in ("--adapters", choice)]
    answers = invoke(folder, *arguments, "--load-mixture", f"mixed={folder / 'mixture'}", "w5 w6 w7")
    model = MultiLoraModel.from_pretrained(folder / "model")
    for name in "ab":
        model.load_adapter(name, folder / "adapters" / name)
    model.load_mixture("mixed", folder / "mixture")
    rows = [None, *choices[1:]]
    assert len({found["text"] for found in answers}) == 4
    assert [found["text"] for found in answers] == [answer(model, "w5 w6 w7", row) for row in rows]
    assert [found["adapters"] for found in answers] == rows
    assert {(found["num_tokens"], found["finish_reason"]) for found in answers} == {(8, "length")}


def test_residual_folders_are_loaded_as_adapters_are(folder, tmp_path):
    identity = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=64, vocab_size=128, num_heads=(4, 4))
    write_residual(SteeringVector(vectors={0: torch.linspace(-3, 3, 64)}, base=identity), tmp_path / "steer")
    model = MultiLoraModel.from_pretrained(folder / "model")
    model.load_adapter("steer", tmp_path / "steer")
    (found,) = invoke(folder, "--load", f"steer={tmp_path / 'steer'}", "--adapters", "steer", "w5 w6")
    assert found["text"] == answer(model, "w5 w6", "steer")
    assert found["text"] != answer(model, "w5 w6", None)


def test_seeds_and_filters_decide_what_is_sampled(folder):
    hot = ("--temperature", "5", "w5 w6")
    first, again, other = (invoke(folder, "--seed", seed, "-n", "2", *hot) for seed in "337")
    assert first == again
    assert [found["text"] for found in first] != [found["text"] for found in other]
    assert first[0]["text"] != first[1]["text"]
    (greedy,) = invoke(folder, "w5 w6")
    for narrow in (["--top-k", "1"], ["--min-p", "1"], ["--top-p", "0.0001"]):
        assert invoke(folder, *narrow, *hot)[0]["text"] == greedy["text"]


def test_stop_texts_end_an_answer_before_them(folder):
    (whole,) = invoke(folder, "w5 w6")
    words = whole["text"].split()
    stop = next(word for word in words if word != words[0])
    (stopped,) = invoke(folder, "--stop", stop, "w5 w6")
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)].strip()
    assert stopped["finish_reason"] == "stop"


def test_table_shows_every_answer(folder):
    arguments = ["generate", "--model", str(folder / "model"), "--raw", "--max-tokens", "3", "-n", "2", "w5 w6"]
    result = runner.invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("w5 w6") == 2
    assert "tokens/s" in result.stdout


def test_model_without_a_chat_template_is_told_how_to_be_asked(folder):
    result = runner.invoke(cli, ["generate", "--model", str(folder / "model"), "w5"])
    assert isinstance(result.exception, RequestError)
    assert "--raw" in str(result.exception)


def test_encoder_decoder_models_are_refused_with_what_to_use_instead(folder, tmp_path):
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "t5")
    result = runner.invoke(cli, ["generate", "--model", str(tmp_path / "t5"), "--raw", "w5"])
    assert isinstance(result.exception, BaseModelError)
    assert "MultiLoraModel" in str(result.exception)


@pytest.mark.slow
def test_answers_follow_a_json_schema(smollm2, tmp_path):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema | {"additionalProperties": False}))
    arguments = ["--json-schema", str(tmp_path / "schema.json"), "What is the capital of France, as JSON?", "--json"]
    result = runner.invoke(cli, ["generate", *arguments])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert json.loads(found["text"])["city"] in ("Paris", "Rome")


def test_real_model_answers_on_the_command_line(smollm2):
    options = ["--json", "--max-tokens", "12", "--temperature", "0"]
    result = runner.invoke(cli, ["generate", "What is the capital of France?", *options])
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)
    assert "Paris" in answer["text"]
    assert answer["adapters"] is None


def test_error_is_shown_without_a_traceback(capsys):
    def fail() -> None:
        raise AdapterNotFoundError("adapter 'x' is not loaded")

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "AdapterNotFoundError" in shown
    assert "adapter 'x' is not loaded" in shown
    assert "Traceback" not in shown


def test_debug_variable_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("LORAPLEX_DEBUG", "1")

    def fail() -> None:
        raise AdapterNotFoundError("x")

    with pytest.raises(AdapterNotFoundError):
        run(fail)


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["generate"], ["inspect"], ["train", "adapters"], ["bench", "engine", "churn"]]
)
def test_every_command_explains_itself(command):
    result = runner.invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
