"""`loraplex generate` and the app around it."""

import json
import os
import shutil
import sys

import pytest
import torch
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.adapters.peft.writer import write_adapter
from loraplex.bench.random_adapters import random_adapter, tiny_llama
from loraplex.cli.app import cli
from loraplex.cli.errors import run
from loraplex.cli.generating.rows import Row, pair_rows, read_rows
from loraplex.cli.generating.streaming import WAITING, run_in_order
from loraplex.cli.options import named_values
from loraplex.engine.request import RequestResult
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
    assert [(row.prompt, row.adapters) for row in pair_rows(prompts, adapters)] == rows


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


def answer(model, prompt, adapters, max_tokens=8):
    """By transformers' generate, alone."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": max_tokens}
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


def test_standard_input_is_a_prompt_and_its_answer_the_output(folder):
    (whole,) = invoke(folder, "w5 w6 w7")
    arguments = ["--model", str(folder / "model"), "--raw", "--max-tokens", "8", "--temperature", "0"]
    for prompts in ([], ["-"]):
        result = runner.invoke(cli, ["generate", *arguments, *prompts], input="w5 w6 w7\n")
        assert (result.exit_code, result.stdout) == (0, whole["text"] + "\n"), result.output


def test_streamed_rows_are_the_rows_in_their_order(folder):
    choices = ["none", "a", "b", "a:0.7+b:0.3"]
    arguments = [word for choice in choices for word in ("--adapters", choice)]
    whole = invoke(folder, *arguments, "-n", "2", "w5 w6 w7")
    model = ["--model", str(folder / "model"), "--load-all", str(folder / "adapters"), "--raw", "--max-tokens", "8"]
    command = ["generate", *model, "--temperature", "0", "-n", "2", *arguments, "--stream", "w5 w6 w7"]
    result = runner.invoke(cli, command)
    assert result.exit_code == 0, result.output
    blocks = result.stdout.strip().split("\n\n")
    assert blocks == [f"{found['adapters'] or 'none'}  w5 w6 w7\n{found['text']}" for found in whole]
    lines = runner.invoke(cli, [*command, "--json"]).stdout.splitlines()
    assert [json.loads(line) for line in lines] == whole


def test_rows_of_json_lines_are_answered_in_order_with_all_that_they_have(folder, tmp_path):
    choices = [None, "a", "b", "a:0.5+b"]
    rows = [
        {"prompt": f"w{5 + i % 9} w{6 + i}", "id": i, "max_tokens": 1 + i % 7, "adapters": choices[i % 4]}
        for i in range(40)
    ]
    rows[7] = {"prompt": "w5", "adapters": "nope"}
    rows[9] = {"prompt": "w5", "temperature": -1}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), "no row"]) + "\n")
    model = ["--model", str(folder / "model"), "--load-all", str(folder / "adapters"), "--raw", "--temperature", "0"]
    for source, text in ((str(file), None), ("-", file.read_text())):
        result = runner.invoke(cli, ["generate", *model, "--input", source], input=text)
        assert result.exit_code == 1  # of the rows that failed
        *lines, last = [json.loads(line) for line in result.stdout.splitlines()]
        assert ":41 is not JSON" in last["error"]
        assert {**lines[7], "error": ""} == {**rows[7], "error": ""}
        assert lines[7]["error"].endswith("Load it first: --load nope=FOLDER.")
        assert "temperature is -1" in lines[9]["error"]
        good = [i for i in range(40) if i not in (7, 9)]
        assert [{**lines[i], **rows[i]} for i in good] == [lines[i] for i in good]
        assert [lines[i]["num_tokens"] <= 1 + i % 7 for i in good] == [True] * len(good)
    multi = MultiLoraModel.from_pretrained(folder / "model")
    for name in "ab":
        multi.load_adapter(name, folder / "adapters" / name)
    for i in (6, 13, 20, 27):  # the longest
        assert lines[i]["text"] == answer(multi, rows[i]["prompt"], choices[i % 4], max_tokens=7)


def test_rows_are_read_only_as_far_ahead_as_there_is_room(folder):
    multi = MultiLoraModel.from_pretrained(folder / "model")
    num_read = 0

    def requests():
        nonlocal num_read
        for i in range(200):
            num_read += 1
            # The first row takes long; all others wait for it.
            yield Request("w5 w6", sampling=SamplingParams(max_tokens=40 if i == 0 else 1, ignore_eos=True))

    with Engine(multi, EngineConfig(max_running=2)) as engine:
        events = run_in_order(engine, requests(), 2)
        next(event for number, event in events if isinstance(event, RequestResult))
        assert num_read <= 2 * WAITING + 2
        rest = [number for number, event in events if isinstance(event, RequestResult)]
    assert rest == list(range(1, 200))


@pytest.mark.timeout(120)
def test_a_row_of_standard_input_is_answered_before_the_next_one_comes(folder, monkeypatch):
    """A program that writes a row may wait for its answer."""
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    multi = MultiLoraModel.from_pretrained(folder / "model")
    options = {"max_tokens": 3}
    rows = read_rows("-", "none")
    requests = (row and row.request(options, system=None, raw=True) for row in rows)
    with Engine(multi, EngineConfig(max_running=2)) as engine:
        events = run_in_order(engine, requests, 2)
        for number in range(3):
            os.write(writing, b'{"prompt": "w5 w6"}\n')
            found = next(event for event in events if isinstance(event[1], RequestResult))
            assert (found[0], found[1].error) == (number, None)
        os.close(writing)
        assert list(events) == []


def test_a_conversation_is_answered_from_its_last_question(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": [*turns, turns[0]]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [row.prompt for row in read_rows(str(tmp_path / "rows.jsonl"), "none")]
    assert found == [turns[:1], [*turns, turns[0]]]


def test_a_system_message_stands_before_prompts_and_conversations_without_one():
    options = {"max_tokens": 1}
    system = {"role": "system", "content": "be brief"}
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "a"}]
    asked = Row(prompt="a").request(options, system="be brief", raw=False)
    assert asked.prompt == [system, {"role": "user", "content": "a"}]
    assert Row(prompt=own).request(options, system="be brief", raw=False).prompt == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw", "--system", "x", "w5"], "--system is a turn of a chat, but with --raw"),
        (["--input", "nowhere.jsonl"], "--input 'nowhere.jsonl' is no file"),
        (["--input", "-", "w5"], "leave out those of the command line"),
        (["-", "-"], "one prompt only"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(arguments, message):
    result = runner.invoke(cli, ["generate", "--model", "nowhere", *arguments], input="")
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).split())


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


@pytest.mark.slow
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
    assert shown == "Error: adapter 'x' is not loaded\n"
    assert "Traceback" not in shown


def test_debug_variable_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("LORAPLEX_DEBUG", "1")

    def fail() -> None:
        raise AdapterNotFoundError("x")

    with pytest.raises(AdapterNotFoundError):
        run(fail)
