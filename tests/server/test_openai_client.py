"""The official client, synchronous and asynchronous, streaming and not, against the engine's own answers."""

import asyncio
import json
import math

import openai
import pytest
import torch

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from tests.server.tiny_server import Running, character_tokenizer, running, settings

MODELS = ("tiny", "a", "a:0.7+b:0.3", "mix-ab")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is DNA?"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def expected(server: Running) -> dict[str, dict[str, str]]:
    """What the engine answers by itself."""
    choices = [None if model == "tiny" else model for model in MODELS]
    sampling = SamplingParams(max_tokens=8)
    with Engine(server.model, EngineConfig(cache_bytes=2**22)) as engine:
        completions = engine.generate([Request("The protein", adapters=c, sampling=sampling) for c in choices])
        chats = engine.generate([Request(MESSAGES, adapters=c, sampling=sampling) for c in choices])
    answers = {"completion": completions, "chat": chats}
    return {kind: dict(zip(MODELS, (r.text for r in given), strict=True)) for kind, given in answers.items()}


def without_special(text: str) -> str:
    """What is left of a text of single tokens in an answer's."""
    for token in character_tokenizer().all_special_tokens:
        text = text.replace(token, "")
    return text


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_the_engines(server, expected, model):
    client = server.client()
    whole = client.completions.create(model=model, prompt="The protein", **GREEDY)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected["completion"][model], "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 8)
    chunks = list(client.completions.create(model=model, prompt="The protein", stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected["completion"][model]
    assert chunks[-1].choices[0].finish_reason == "length"
    chat = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    assert chat.choices[0].message.content == expected["chat"][model]
    assert chat.choices[0].message.role == "assistant"


def test_async_client_streams_many_chats_at_once(server, expected):
    async def one(client, model):
        options = {"stream_options": {"include_usage": True}, "stream": True, **GREEDY}
        stream = await client.chat.completions.create(model=model, messages=MESSAGES, **options)
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 8
        return text

    async def main():
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, model) for model in MODELS * 4))

    assert asyncio.run(main()) == [expected["chat"][model] for model in MODELS * 4]


def test_models_are_listed_with_kinds_and_experts(server):
    found = {model.id: model for model in server.client().models.list()}
    assert set(found) == {"tiny", "a", "b", "c", "mix-ab", "mix-ac"}
    assert found["mix-ab"].experts == ["a", "b"]
    assert found["tiny"].kind == "base"
    assert server.client().models.retrieve("a").parent == "tiny"


def test_prompts_answers_and_seeds(server):
    client = server.client()
    ids = server.http().post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
    options = {"model": "a", "max_tokens": 6, "temperature": 1.0, "seed": 3, "n": 2}
    both = client.completions.create(prompt=["abc", "xyz"], **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    same = client.completions.create(prompt=ids, **options)
    assert [c.text for c in same.choices] == [c.text for c in both.choices[:2]]
    assert both.choices[0].text != both.choices[1].text
    assert client.completions.create(prompt=[ids, ids], echo=True, **options).choices[0].text.startswith("abc")


def test_stop_ends_the_answer_before_it(server, expected):
    stop = expected["completion"]["tiny"][3]
    answer = server.client().completions.create(model="tiny", prompt="The protein", stop=[stop], **GREEDY)
    assert answer.choices[0].text == expected["completion"]["tiny"].split(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_of_answers_and_echoed_prompts_are_the_models(server):
    client, prompt = server.client(), "The protein"
    ids = server.model.tokenizer(prompt)["input_ids"]
    for model, adapters in (("tiny", None), ("a", "a"), ("mix-ab", "mix-ab")):
        with torch.no_grad():
            logits = server.model(torch.tensor([ids]), adapters=[adapters]).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        options = {"model": model, "prompt": prompt, "temperature": 0, "logprobs": 2}
        told = client.completions.create(max_tokens=1, echo=True, **options).choices[0].logprobs
        true = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        assert told.token_logprobs[0] is None
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(true, abs=1e-3)
        assert told.tokens[: len(ids)] == list(prompt)
        assert told.text_offset[: len(ids)] == list(range(len(ids)))
        assert len(told.tokens) == len(ids) + 1
        assert max(told.top_logprobs[-1].values()) == pytest.approx(float(logprobs[-1].max()), abs=1e-3)
        only = client.completions.create(max_tokens=0, echo=True, **options)
        assert (only.choices[0].text, only.usage.completion_tokens) == (prompt, 0)
        assert only.choices[0].logprobs.token_logprobs == pytest.approx(told.token_logprobs[:-1], abs=1e-3, nan_ok=True)


def test_chat_logprobs(server):
    answer = server.client().chat.completions.create(
        model="b", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    assert without_special("".join(token.token for token in content)) == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in content)


@pytest.mark.slow  # loads SmolLM2: grammars need a tokenizer that knows bytes
@pytest.mark.needs("llguidance")
def test_answers_follow_a_json_schema(smollm2):
    schema = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with running(MultiLoraModel.from_pretrained(smollm2), settings()) as server:
        answer = server.client().chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=100, temperature=0, response_format=wanted
        )
        forms = (
            {"guided_choice": ["red", "green"]},
            {"guided_regex": "red|green"},
            {"guided_json": {"enum": ["red", "green"]}},
            {"structured_outputs": {"grammar": 'root ::= "red" | "green"'}},
        )
        bound = [
            server.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, extra_body=form)
            for form in forms
        ]
    assert json.loads(answer.choices[0].message.content)["x"] in (1, 2)
    assert {one.choices[0].message.content.strip('"') for one in bound} <= {"red", "green"}


@pytest.mark.needs("llguidance")
@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {}}}])
def test_a_schema_beside_a_tokenizer_that_the_grammars_cant_read_is_a_400(server, form):
    with pytest.raises(openai.BadRequestError, match="can't be followed with this model's"):
        server.client().chat.completions.create(model="tiny", messages=MESSAGES, response_format=form)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"temperature": -1}, "temperature"),
        ({"n": 10_000}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"extra_body": {"capture_attention": {"layers": [99]}}}, None),
        ({"model": "a:1e9"}, "model"),
        ({"model": "a:nan"}, "model"),
        ({"model": "+".join(f"x{i}" for i in range(9))}, "model"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_it(server, fields, param):
    body = {"model": "tiny", "messages": MESSAGES} | fields
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().chat.completions.create(**body)
    assert refused.value.body["param"] == param
    assert refused.value.body["type"] == "invalid_request_error"


def test_values_that_change_nothing_are_accepted(server):
    answer = server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": [{"type": "text", "text": "x"}]}, MESSAGES[1]],
        tools=[],
        tool_choice="none",
        store=False,
        user="someone",
        presence_penalty=0.0,
        service_tier="auto",
        extra_body={"ignore_eos": True},
        **GREEDY,
    )
    assert answer.usage.completion_tokens == 8


def test_numbers_that_are_none_are_refused_as_json(server):
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"model": "tiny", "prompt": "x", "temperature": {number}}}'
        answer = server.http().post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, number
        assert answer.json()["error"]["code"] == "invalid_request"


def test_unknown_models_and_paths_are_404(server):
    with pytest.raises(openai.NotFoundError) as refused:
        server.client().completions.create(model="unknown", prompt="x")
    assert refused.value.code == "model_not_found"
    assert server.http().get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert server.http().delete("/v1/completions").status_code == 405


def test_tokenize_and_detokenize_are_inverse(server):
    http = server.http()
    tokens = http.post("/tokenize", json={"model": "a", "prompt": "DNA!", "return_token_strs": True}).json()
    assert (tokens["count"], tokens["token_strs"], tokens["max_model_len"]) == (4, list("DNA!"), 256)
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "DNA!"}
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": chat}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\n")
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_metrics_and_request_ids(server):
    client = server.client()
    answer = client.completions.with_raw_response.create(
        model="a+b", prompt="x", max_tokens=3, extra_headers={"x-request-id": "my-id.1"}
    )
    assert answer.headers["x-request-id"] == "my-id.1"
    text = server.http().get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['loraplex_adapter_new_tokens_total{adapter="b"}']) >= 3
    assert float(values["loraplex_new_tokens_total"]) >= 3
    for name in ("requests_waiting", "requests_running", "cache_blocks", "drafts_total", "drafts_accepted_total"):
        assert math.isfinite(float(values[f"loraplex_{name}"]))
    assert 'loraplex_adapters{tier="slot"}' in values
