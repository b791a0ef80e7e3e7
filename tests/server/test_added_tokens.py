"""Over HTTP, an adapter with added tokens and a chat template of its own, beside rows of the base model."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex import MultiLoraModel
from tests.parity.content_adapters import alone, base_model, content_adapter, resized, with_peft
from tests.parity.oracle import LOGIT_TOLERANCE
from tests.server.tiny_server import Running, character_tokenizer, running, settings
from tests.tiny_models import VOCAB_SIZE

NEW = ["<|tool|>", "<|call|>", "<|done|>"]
TEMPLATE = "{% for m in messages %}<|tool|>{{ m['content'] }}<|call|>{% endfor %}"
NUM_TOKENS = 6


def base_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as the base model has rows."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<filler {i}>" for i in range(VOCAB_SIZE - len(tokenizer))])
    return tokenizer


def own_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = base_tokenizer()
    tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.eos_token = "<|done|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Served:
    def __init__(self, root: Path) -> None:
        self.base = base_model("llama")
        self.tokenizer = own_tokenizer()
        larger = resized(self.base, VOCAB_SIZE + 3)
        folders = {}
        for seed, name in enumerate(("tools", "others")):
            options: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
            folders[name] = content_adapter(larger, root / name, targets=["q_proj", "v_proj"], seed=seed, **options)
        self.tokenizer.save_pretrained(folders["tools"])
        others = own_tokenizer()
        others.chat_template = TEMPLATE.replace("<|call|>", "<|done|>")
        others.save_pretrained(folders["others"])
        content_adapter(self.base, root / "plain", targets=["q_proj"], seed=7)
        self.peft = with_peft(larger, folders["tools"])
        self.model = MultiLoraModel(base_model("llama"))
        self.model.__dict__["tokenizer"] = base_tokenizer()
        for name in ("tools", "others", "plain"):
            self.model.load_adapter(name, root / name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[Running]:
    with running(served.model, settings()) as server:
        yield server


def chat(server: Running, model: str, content: str, **options: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    with server.http() as client:
        answer = client.post("/v1/chat/completions", json=body | options)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def check_answer(served: Served, prompt: str, choice: dict[str, Any], bias: int | None = None) -> None:
    """Every token and probability is PEFT's, for the prompt as the adapter's own tokenizer reads it."""
    ids = served.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    entries = choice["logprobs"]["content"]
    told = [served.tokenizer.convert_tokens_to_ids(entry["token"]) for entry in entries]
    logits = alone(served.peft, torch.tensor([*ids, *told[:-1]])).double()[len(ids) - 1 :]
    tolerance = LOGIT_TOLERANCE * float(logits.max() - logits.min())
    expected = logits.log_softmax(dim=-1)
    for place, entry in enumerate(entries):
        for other in [entry, *entry["top_logprobs"]]:
            token = served.tokenizer.convert_tokens_to_ids(other["token"])
            assert abs(other["logprob"] - float(expected[place, token])) <= tolerance
        if bias is None:
            assert float(expected[place].max() - expected[place, told[place]]) <= tolerance


def test_answers_are_pefts_and_base_rows_beside_keep_their_bits(served: Served, server: Running) -> None:
    contents = ["sort abc", "hello", "what is 2+2?"]
    before = [chat(server, "tiny", content) for content in contents]
    with ThreadPoolExecutor(2 * len(contents)) as pool:
        own = [pool.submit(chat, server, "tools", content) for content in contents]
        beside = [pool.submit(chat, server, "tiny", content) for content in contents]
        answers, others = [one.result() for one in own], [one.result() for one in beside]
    assert others == before
    for content, answer in zip(contents, answers, strict=True):
        check_answer(served, f"<|tool|>{content}<|call|>", answer)


def test_added_tokens_can_be_asked_for_and_end_answers(served: Served, server: Running) -> None:
    called = chat(server, "tools", "abc", logit_bias={str(VOCAB_SIZE + 1): 100})
    check_answer(served, "<|tool|>abc<|call|>", called, bias=VOCAB_SIZE + 1)
    assert {entry["token"] for entry in called["logprobs"]["content"]} == {"<|call|>"}
    ended = chat(server, "tools", "abc", logit_bias={str(VOCAB_SIZE + 2): 100})
    assert ended["finish_reason"] == "stop"
    assert [entry["token"] for entry in ended["logprobs"]["content"]] == ["<|done|>"]
    with server.http() as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "logit_bias": {str(VOCAB_SIZE): 1}}
        assert client.post("/v1/chat/completions", json=body).status_code == 400


def test_completions_streams_and_token_routes_use_the_rows_tokenizer(served: Served, server: Running) -> None:
    prompt = "<|tool|>abc<|call|>"
    ids = served.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert max(ids) >= VOCAB_SIZE
    with server.http() as client:
        body: dict[str, Any] = {"model": "tools", "max_tokens": 4, "temperature": 0}
        texts = [
            client.post("/v1/completions", json=body | {"prompt": one}).json()["choices"][0]["text"]
            for one in (prompt, ids)
        ]
        assert texts[0] == texts[1]
        tokens = client.post(
            "/tokenize", json={"model": "tools", "messages": [{"role": "user", "content": "abc"}]}
        ).json()
        assert tokens["tokens"] == ids
        assert client.post("/detokenize", json={"model": "tools", "tokens": ids}).json()["prompt"] == prompt
        assert client.post("/detokenize", json={"tokens": ids}).status_code == 400
        assert client.post("/v1/completions", json=body | {"model": "tiny", "prompt": ids}).status_code == 400
        stream = body | {"messages": [{"role": "user", "content": "abc"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=stream) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    whole = chat(server, "tools", "abc", max_tokens=4)["message"]["content"]
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines) == whole


def test_control_tokens_of_the_adapter_that_a_message_spells_are_text(served: Served, server: Running) -> None:
    with server.http() as client:
        body = {"model": "tools", "messages": [{"role": "user", "content": "a<|call|>b"}]}
        tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert tokens.count(VOCAB_SIZE + 1) == 1  # the template's own


def test_links_of_adapters_with_different_tokens_are_refused_by_name(served: Served, server: Running) -> None:
    assert chat(server, "tools+plain:0.5", "abc")["finish_reason"] in ("stop", "length")
    with server.http() as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            body = {"model": "tools+others", "messages": [{"role": "user", "content": "abc"}]}
            answer = client.post(path, json=body)
            assert answer.status_code == 400
            assert "'tools' and 'others', whose tokens differ" in answer.text
