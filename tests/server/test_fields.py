"""Fields of vLLM's and OpenAI's APIs: what changes nothing passes, the rest is served or refused with a reason."""

import json
import math
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex import Engine, Request, SamplingParams
from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.bodies import ChatBody, CompletionBody
from loraplex.server.api.engine_requests import Truncation, encode_truncated
from loraplex.server.api.refused_fields import REFUSED, as_markdown
from loraplex.server.api.structures import structure_of
from tests.server.tiny_server import ENGINE, Running, make_model

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PROMPT = "The protein"
BODY = {"model": "a", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
CHAT = {"model": "a", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0}
PATHS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}


def post(server: Running, body: dict, **fields):
    path = PATHS["prompt" if "prompt" in body else "messages"]
    return server.http().post(path, json=body | fields)


def chunks(server: Running, body: dict, **fields) -> list[dict]:
    text = post(server, body, stream=True, **fields).text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("body", [BODY, CHAT], ids=["completion", "chat"])
def test_null_and_neutral_values_change_nothing(server, body):
    plain = post(server, body).json()["choices"]
    kind = CompletionBody if "prompt" in body else ChatBody
    given = set(body) | {"stream"}
    nulls = {name: None for name in (*kind.model_fields, *REFUSED, "unheard_of") if name not in given}
    neutral = {name: field.neutral[0] for name, field in REFUSED.items() if field.neutral}
    passing = {
        "metadata": {"run": "7"},
        "user": "u",
        "session_id": "s",
        "skip_special_tokens": True,
        "request_id": "abc",
        "best_of": 1,
        "n": 1,
        "echo": False,
    }
    passing |= {} if "prompt" in body else {"add_generation_prompt": True, "chat_template_kwargs": {}}
    for fields in (nulls, neutral, passing):
        answer = post(server, body, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain
    assert post(server, body, request_id="abc").json()["id"].endswith("-abc")


def test_null_is_no_value_in_messages_and_tools_too(server):
    nulls = {"unheard_of": None, "name": None, "tool_calls": None}
    (message,) = CHAT["messages"]
    plain = post(server, CHAT).json()["choices"]
    assert post(server, CHAT | {"messages": [message | nulls]}).json()["choices"] == plain
    function = {"name": "f", "description": None, "strict": None, "unheard_of": None}
    tools = [{"type": "function", "function": function, "unheard_of": None}]
    assert post(server, CHAT, tools=tools, tool_choice="none").json()["choices"] == plain


def test_tokenize_reads_a_chat_as_it_is_answered(server):
    tokenizer = server.server.state.base_row_tokenizer.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, "{{ mood }}:{{ messages[0].content }}"
    body = {"messages": CHAT["messages"], "chat_template_kwargs": {"mood": "glad"}, "unheard_of": None}
    try:
        told = server.http().post("/tokenize", json=body).json()
        answered = post(server, CHAT, return_token_ids=True, chat_template_kwargs={"mood": "glad"}).json()
    finally:
        tokenizer.chat_template = own
    assert told["tokens"] == answered["prompt_token_ids"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields_are_refused_with_their_reason(server, name):
    answer = post(server, BODY, **{name: "something else"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
    assert REFUSED[name].reason in error["message"]


def test_the_documentation_has_the_table_of_refused_fields():
    text = PAGE.read_text(encoding="utf-8")
    assert as_markdown() in text, "run: python -m scripts.refused_fields"


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {str(i): "x" for i in range(17)}},
        {"metadata": {"a": 1}},
        {"request_id": "a b"},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [10**6]},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 300},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": -1},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": 10**6},
        {"truncation_side": "middle"},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"whitespace_pattern": " "}},
        {"guided_regex": "a", "guided_choice": ["b"]},
        {"guided_json": {"type": "object"}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": '{"type":'}},
        {"guided_json": "true"},
        {"guided_json": '{"items":' * 40 + "{}" + "}" * 40},
        {"best_of": 3, "n": 4},
        {"best_of": 1000},
        {"best_of": 2, "stream": True},
        {"prompt_logprobs": 2, "stream": True},
    ],
    ids=str,
)
def test_values_that_cant_be_served_are_400s_that_name_the_field(server, fields):
    answer = post(server, BODY, **fields)
    assert answer.status_code == 400, answer.text
    assert any(name in str(answer.json()["error"]) for name in fields)


def test_prompt_logprobs_are_vllms_shape_and_the_engines_values(server, root):
    told = post(server, BODY, prompt_logprobs=2).json()["choices"][0]["prompt_logprobs"]
    chat = post(server, CHAT, prompt_logprobs=0, return_token_ids=True).json()
    model = make_model(root)
    with Engine(model, ENGINE) as engine:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=2)
        ids = tuple(model.tokenizer(PROMPT)["input_ids"])
        (result,) = engine.generate([Request(ids, adapters="a", sampling=sampling)])
    assert told[0] is None
    for entry, expected in zip(told[1:], result.prompt_logprobs[1:], strict=True):
        ids = dict.fromkeys([expected.token_id, *(token for token, _ in expected.top)])
        assert list(entry) == [str(token) for token in ids]
        own = entry[str(expected.token_id)]
        assert own["rank"] == expected.rank
        assert math.isclose(own["logprob"], expected.logprob, rel_tol=1e-4)
        assert own["decoded_token"] == model.tokenizer.decode([expected.token_id])
        assert [entry[str(token)]["rank"] for token, _ in expected.top] == [1, 2]
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])
    assert {len(entry) for entry in chat["prompt_logprobs"][1:]} == {1}


def test_token_ids_come_whole_and_in_streams(server):
    whole = post(server, BODY, return_token_ids=True).json()["choices"][0]
    told = chunks(server, BODY, return_token_ids=True)
    assert len(whole["token_ids"]) == 6
    assert len(whole["prompt_token_ids"]) == len(PROMPT)
    assert [token for chunk in told for token in chunk["choices"][0]["token_ids"]] == whole["token_ids"]
    assert told[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in chunk["choices"][0] for chunk in told[1:])
    chat = post(server, CHAT, return_token_ids=True).json()
    streamed = chunks(server, CHAT, return_token_ids=True)
    assert streamed[0]["prompt_token_ids"] == chat["prompt_token_ids"]
    assert [t for c in streamed for t in c["choices"][0]["token_ids"]] == chat["choices"][0]["token_ids"]


def test_usage_is_told_with_each_chunk_where_that_is_wanted(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *told, last = chunks(server, BODY, n=2, seed=3, temperature=1.0, stream_options=options)
    seen = {0: 0, 1: 0}
    for chunk in told:
        (choice,), usage = chunk["choices"], chunk["usage"]
        assert usage["prompt_tokens"] == len(PROMPT)
        assert usage["completion_tokens"] >= seen[choice["index"]]
        seen[choice["index"]] = usage["completion_tokens"]
    assert last["choices"] == []
    assert sum(seen.values()) == last["usage"]["completion_tokens"]
    assert all("usage" not in chunk for chunk in chunks(server, BODY, stream_options={"continuous_usage_stats": True}))


def test_obfuscation_hides_the_sizes_of_texts(server):
    told = chunks(server, CHAT, stream_options={"include_obfuscation": True})
    sizes = {len(c["choices"][0]["delta"].get("content", "").encode()) + len(c["obfuscation"]) for c in told}
    assert {size % 32 for size in sizes} == {0}
    assert len({chunk["obfuscation"] for chunk in told}) == len(told)
    assert "obfuscation" not in chunks(server, CHAT)[0]


@pytest.mark.parametrize("body", [BODY, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_cut_on_the_side_that_is_asked_for(server, body, side):
    whole = post(server, body, return_token_ids=True).json()
    cut = post(server, body, return_token_ids=True, truncate_prompt_tokens=5, truncation_side=side).json()
    place = (lambda answer: answer["choices"][0]) if "prompt" in body else (lambda answer: answer)
    ids = place(whole)["prompt_token_ids"]
    assert place(cut)["prompt_token_ids"] == (ids[-5:] if side == "left" else ids[:5])
    assert cut["usage"]["prompt_tokens"] == 5


def test_texts_too_long_for_the_model_can_be_cut(server):
    long = BODY | {"prompt": "x" * 1000}
    assert post(server, long).status_code == 400
    answer = post(server, long, truncate_prompt_tokens=-1).json()
    assert answer["usage"]["prompt_tokens"] == 255
    assert post(server, BODY | {"prompt": "x" * 100_000}, truncate_prompt_tokens=-1).status_code == 400


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [2, 3, 7, 100])  # the special tokens alone are two
def test_without_a_side_prompts_are_cut_as_transformers_does(smollm2, side, length):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2)
    from tokenizers.processors import TemplateProcessing

    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    template = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.truncation_side = side
    text = "The protein of spider silk is strong."
    expected = tokenizer(text, truncation=True, max_length=length)["input_ids"]
    found = encode_truncated(tokenizer, text, Truncation(length), add_special_tokens=True, most=1000)
    assert list(found.ids) == list(expected)


def test_allowed_tokens_and_bad_words_reach_the_engine(server):
    ids = post(server, BODY, return_token_ids=True, allowed_token_ids=[70, 71, 72]).json()["choices"][0]["token_ids"]
    assert set(ids) <= {70, 71, 72}
    text = post(server, CHAT).json()["choices"][0]["message"]["content"]
    bound = post(server, CHAT, bad_words=list(set(text.strip()))).json()["choices"][0]["message"]["content"]
    assert not set(text.strip()) & set(bound)


def test_stop_strings_can_be_in_the_text(server):
    text = post(server, BODY | {"max_tokens": 30}).json()["choices"][0]["text"]
    stop = text[1:3]
    for include in (False, True):
        choice = post(server, BODY | {"max_tokens": 30}, stop=stop, include_stop_str_in_output=include).json()[
            "choices"
        ][0]
        assert choice["text"].endswith(stop) == include
        assert choice["finish_reason"] == "stop"


def test_best_of_gives_the_likeliest_answers_a_token(server):
    options = {"temperature": 1.5, "seed": 5, "logprobs": 0}
    all_of_them = post(server, BODY, n=6, **options).json()["choices"]
    best = post(server, BODY, n=2, best_of=6, **options).json()
    means = {
        c["text"]: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in all_of_them
    }
    expected = sorted(means, key=means.get, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 36
    silent = post(server, BODY, best_of=6, temperature=1.5, seed=5).json()["choices"][0]
    assert (silent["text"], silent["logprobs"]) == (expected[0], None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"response_format": {"type": "text"}, "guided_regex": "a+"}, {"regex": "a+"}),
        ({"structured_outputs": {"json": {"type": "object"}}}, {"json_schema": {"type": "object"}}),
        ({"structured_outputs": {"json": '{"type": "object"}', "regex": None}}, {"json_schema": {"type": "object"}}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"json_schema": {"type": "object"}, "json_whitespace": False},
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}),
        ({"guided_grammar": "root ::= [a-z]"}, {"grammar": "root ::= [a-z]"}),
        ({"guided_json": {"enum": [1]}}, {"json_schema": {"enum": [1]}}),
    ],
)
def test_all_forms_of_structures_become_sampling_parameters(fields, expected):
    assert structure_of(CompletionBody.model_validate(BODY | fields)) == expected


def test_a_schema_deeper_than_python_can_follow_is_a_400(server):
    depth = 1015  # in a body that may be 1,024 deep
    schema = '{"items":' * depth + "true" + "}" * depth
    form = '{"type":"json_schema","json_schema":{"name":"x","schema":' + schema + "}}"
    body = json.dumps(BODY)[:-1] + ',"response_format":' + form + "}"
    headers = {"content-type": "application/json"}
    answer = server.http().post("/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


def test_two_structures_are_an_error_that_names_both():
    body = CompletionBody.model_validate(BODY | {"guided_regex": "a", "structured_outputs": {"choice": ["b"]}})
    with pytest.raises(ApiError, match=r"structured_outputs.choice and guided_regex"):
        structure_of(body)


def test_template_variables_reach_the_template_and_control_tokens_dont(server):
    tokenizer = server.server.state.base_row_tokenizer.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, "{{ mood }}:{{ messages[0].content }}"
    try:
        plain = post(server, CHAT, return_token_ids=True).json()["prompt_token_ids"]
        glad = post(server, CHAT, return_token_ids=True, chat_template_kwargs={"mood": "glad"}).json()
        assert tokenizer.decode(glad["prompt_token_ids"]) == "glad" + tokenizer.decode(plain)
        for variables in ({"mood": "<|im_end|>"}, {"mood": ["x", {"y": "<"}]}, {"mood": list(range(2000))}):
            assert post(server, CHAT, chat_template_kwargs=variables).status_code == 400
        for name in ("chat_template", "tokenize", "messages", "tools", "continue_final_message", "a b"):
            refused = post(server, CHAT, chat_template_kwargs={name: 1})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template_kwargs")
    finally:
        tokenizer.chat_template = own


def test_a_chat_without_a_generation_prompt_ends_with_its_last_turn(server):
    with_prompt = post(server, CHAT, return_token_ids=True).json()["prompt_token_ids"]
    without = post(server, CHAT, return_token_ids=True, add_generation_prompt=False).json()["prompt_token_ids"]
    assert with_prompt[: len(without)] == without
    assert len(without) < len(with_prompt)


def test_more_tokens_than_are_allowed_are_as_many_as_models_tells(server):
    told = server.http().get("/v1/models/a").json()
    assert told["max_new_tokens"] == told["max_model_len"] - 1 == 255
    answer = post(server, BODY | {"max_tokens": 10**6}, ignore_eos=True).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 256


@pytest.mark.parametrize(
    ("content_type", "told"),
    [(None, "is missing"), ("text/plain", "text/plain"), ("application/x-www-form-urlencoded", "form")],
)
def test_a_body_that_isnt_json_is_told_so(server, content_type, told):
    headers = {} if content_type is None else {"content-type": content_type}
    answer = server.http().post("/v1/completions", content=json.dumps(BODY), headers=headers)
    assert answer.status_code == 415
    assert told in answer.json()["error"]["message"]
    assert "application/json" in answer.json()["error"]["message"]


def test_sampling_defaults_are_the_models(root):
    from transformers import GenerationConfig

    from loraplex.errors import ConfigError
    from loraplex.models.text.sampling_defaults import sampling_defaults
    from tests.tiny_models import tiny_model

    base = tiny_model("llama")
    assert dict(sampling_defaults(base)) == {"temperature": 1.0}
    base.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, do_sample=False, max_new_tokens=5)
    assert dict(sampling_defaults(base)) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert dict(sampling_defaults(base, "none")) == {"temperature": 1.0}
    with pytest.raises(ConfigError, match="generation_config"):
        sampling_defaults(base, "vllm")


def test_probabilities_of_many_prompts_have_a_bound(server):
    many = BODY | {"prompt": ["x" * 120] * 128, "max_tokens": 1}
    few = BODY | {"prompt": ["x" * 120] * 16, "max_tokens": 1, "n": 10, "temperature": 1.0}
    for body, fields, param in (
        (many, {"prompt_logprobs": 20}, "prompt_logprobs"),
        (many, {"echo": True, "logprobs": 20}, "logprobs"),
        (few, {"echo": True, "logprobs": 20}, "logprobs"),
    ):
        answer = post(server, body, **fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
    assert post(server, BODY, echo=True, logprobs=20).status_code == 200
