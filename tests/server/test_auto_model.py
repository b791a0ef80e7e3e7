"""`model: "auto"` over HTTP: what was chosen is told, among what the key may use, and charged to it."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex import MultiLoraModel, SpectrConfig
from loraplex.models.auto.prompt_states import fit_centroids
from loraplex.server.auth.keys import KeyFile
from tests.server.tiny_server import Running, make_model, running, settings, wait_until_idle

ENDS = {"a": "where do the quick brown foxes go?", "b": "12 + 34 * 56 - 78 = ", "c": "WHO IS THAT OVER THERE"}
BACKGROUND = [f"{word} {word[::-1]}." for word in ("tree", "house", "apple", "river", "stone", "cloud", "bird")]


def fitted(root: Path) -> MultiLoraModel:
    model = make_model(root)
    tokenizer = model.tokenizer
    prompts = {name: [tokenizer(f"{i} {end}")["input_ids"] for i in range(5)] for name, end in ENDS.items()}
    background = [tokenizer(text)["input_ids"] for text in BACKGROUND]
    for name, centroid in fit_centroids(model.base, prompts, background).items():
        model.registry.set_centroid(name, centroid)
    model.create_mixture("spectr", ["a", "b"], SpectrConfig())
    return model


class Keyed:
    """A server with keys."""

    def __init__(self, server: Running, keys: dict[str, str]) -> None:
        self.server, self._keys = server, keys

    def client(self, name: str) -> httpx.Client:
        return self.server.http(self._keys[name])

    def usage(self, name: str) -> Any:
        (record,) = [r for r in self.server.server.state.keys.records() if r.note == name]
        return self.server.server.state.usages.of(record)


@pytest.fixture(scope="module")
def keyed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    keys = {
        "all": file.create(note="all", manage=True)[0],
        "ab": file.create(note="ab", use=("a", "b"))[0],
        "b only": file.create(note="b only", use=("b",), base=False, tokens_per_minute=10_000)[0],
        "nothing": file.create(note="nothing", use=("x",), base=False)[0],
        "base": file.create(note="base", use=("x",))[0],
    }
    with running(fitted(root), settings(keys=file)) as server:
        yield Keyed(server, keys)


def body(prompt: str | list[str], **fields: Any) -> dict[str, Any]:
    return {"model": "auto", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields


def ask(client: httpx.Client, content: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    answer = client.post(path, json=content)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def chunks(client: httpx.Client, content: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/completions", json=content | {"stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("name", ENDS)
def test_answer_names_what_it_chose_and_is_its_answer(keyed: Keyed, name: str) -> None:
    client, prompt = keyed.client("all"), f"9 {ENDS[name]}"
    found = ask(client, body(prompt, n=2))
    by_name = ask(client, body(prompt, n=2, model=name))
    assert found["model"] == name
    assert [choice["text"] for choice in found["choices"]] == [choice["text"] for choice in by_name["choices"]]
    assert all(choice["auto"]["model"] == name and choice["auto"]["score"] > 0.4 for choice in found["choices"])
    assert all("auto" not in choice for choice in by_name["choices"])
    assert found["usage"]["prompt_tokens"] == by_name["usage"]["prompt_tokens"]


def test_prompts_of_one_request_choose_for_themselves(keyed: Keyed) -> None:
    found = ask(keyed.client("all"), body([f"7 {end}" for end in ENDS.values()]))
    assert found["model"] == "auto"
    assert [choice["auto"]["model"] for choice in found["choices"]] == list(ENDS)


def test_streams_name_it_in_every_chunk(keyed: Keyed) -> None:
    found = chunks(keyed.client("all"), body(f"7 {ENDS['c']}", stream_options={"include_usage": True}))
    assert {chunk["model"] for chunk in found} == {"c"}
    assert all(choice["auto"]["model"] == "c" for chunk in found for choice in chunk["choices"])
    whole = ask(keyed.client("all"), body(f"7 {ENDS['c']}", model="c"))
    assert "".join(choice["text"] for chunk in found for choice in chunk["choices"]) == whole["choices"][0]["text"]


def test_chats_choose_too(keyed: Keyed) -> None:
    content = {"model": "auto", "messages": [{"role": "user", "content": ENDS["a"]}], "max_tokens": 3}
    found = ask(keyed.client("all"), content, "/v1/chat/completions")
    assert found["choices"][0]["auto"]["model"] == found["model"]
    assert found["model"] in ("tiny", *ENDS)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ENDS["c"]}]}),
        ("/v1/responses", {"input": ENDS["c"]}),
        ("/v1/embeddings", {"input": ENDS["c"]}),
        ("/v1/score", {"text_1": ENDS["c"], "text_2": ENDS["c"]}),
        ("/generate", {"inputs": ENDS["c"], "parameters": {"adapter_id": "auto"}}),
        ("/generate_stream", {"inputs": ENDS["c"], "parameters": {"adapter_id": "auto"}}),
    ],
)
def test_no_call_chooses_what_the_key_may_not_use(keyed: Keyed, path: str, content: dict[str, Any]) -> None:
    content = content if path.startswith("/generate") else content | {"model": "auto"}
    refused = keyed.client("nothing").post(path, json=content)
    assert "nothing to choose from" in refused.text
    assert refused.status_code in (400, 422)
    assert keyed.client("all").post(path, json=content).status_code == 200
    wait_until_idle(keyed.server)


def test_only_what_the_key_may_use_is_chosen(keyed: Keyed) -> None:
    prompt = f"9 {ENDS['c']}"
    assert ask(keyed.client("all"), body(prompt))["model"] == "c"
    assert ask(keyed.client("ab"), body(prompt))["model"] != "c"
    assert ask(keyed.client("b only"), body(f"9 {ENDS['b']}"))["model"] == "b"
    assert ask(keyed.client("base"), body(prompt))["model"] == "tiny"
    refused = keyed.client("b only").post("/v1/completions", json=body(prompt))
    assert refused.status_code == 400
    assert "may not answer" in refused.json()["error"]["message"]
    empty = keyed.client("nothing").post("/v1/completions", json=body(prompt))
    assert empty.status_code == 400
    assert "nothing to choose from" in empty.json()["error"]["message"]
    assert not any(name in text for text in (refused.text, empty.text) for name in ("'c'", "'a'"))
    wait_until_idle(keyed.server)


def test_models_list_auto_where_there_is_something_to_choose(keyed: Keyed) -> None:
    def listed(key: str) -> list[str]:
        return [model["id"] for model in keyed.client(key).get("/v1/models").json()["data"]]

    assert listed("all")[:2] == ["tiny", "auto"]
    assert listed("b only") == ["auto", "b"]
    assert listed("base") == ["tiny"]
    assert keyed.client("ab").get("/v1/models/auto").json()["kind"] == "auto"
    assert keyed.client("base").get("/v1/models/auto").status_code == 404
    assert keyed.client("ab").post("/tokenize", json={"model": "auto", "prompt": "abc"}).json()["count"] == 3


def test_both_passes_over_the_prompt_are_charged(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, spent = keyed.usage("b only"), []
    former = usage.spend_tokens
    monkeypatch.setattr(usage, "spend_tokens", lambda count: (spent.append(count), former(count)))
    prompt = f"9 {ENDS['b']}"
    ask(keyed.client("b only"), body(prompt))
    assert sum(spent) == 2 * len(prompt) + 4
    spent.clear()
    ask(keyed.client("b only"), body(prompt, model="b"))
    assert sum(spent) == len(prompt) + 4


def test_logs_and_metrics_name_it(keyed: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    client = keyed.client("all")

    def counted() -> float:
        text = client.get("/metrics").text
        lines = [
            line for line in text.splitlines() if line.startswith('loraplex_adapter_new_tokens_total{adapter="b"}')
        ]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = counted()
    with caplog.at_level(logging.INFO, logger="loraplex"):
        answer = client.post("/v1/completions", json=body(f"3 {ENDS['b']}"))
        wait_until_idle(keyed.server)
        stop, found = time.monotonic() + 10, list[logging.LogRecord]()
        while not found and time.monotonic() < stop:  # the line is written behind the answer
            time.sleep(0.01)
            found = [r for r in caplog.records if getattr(r, "request_id", "") == answer.headers["x-request-id"]]
    (line,) = found
    assert line.model == "b"  # type: ignore[attr-defined]
    assert line.auto_scores == [round(answer.json()["choices"][0]["auto"]["score"], 3)]  # type: ignore[attr-defined]
    assert counted() == before + 4


def test_a_client_that_leaves_while_it_is_chosen_leaves_nothing(keyed: Keyed) -> None:
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=keyed.server.url, timeout=0.02, headers=keyed.client("all").headers) as client,
    ):
        client.post("/v1/completions", json=body("abc " * 40, max_tokens=60))
    wait_until_idle(keyed.server)


def test_gates_of_routers_are_told_over_http(keyed: Keyed) -> None:
    found = ask(keyed.client("all"), body("abcdef", model="spectr", return_scalings=True))
    (told,) = found["choices"][0]["scalings"]
    assert (told["mixture"], told["experts"]) == ("spectr", ["a", "b"])
    assert told["values"]["shape"] == [len("abcdef") + 3, len(told["layers"]), 2]
    live = [
        entry
        for chunk in chunks(keyed.client("all"), body("abcdef", model="spectr", return_scalings=True))
        for choice in chunk["choices"]
        for entry in choice.get("token_scalings", {}).get("values", [])
    ]
    assert len(live) == 4
    assert all(sum(experts) == pytest.approx(1) for (experts,) in live)
