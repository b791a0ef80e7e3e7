"""Answers over HTTP that end in one step, requests that can never run, and an engine that fails."""

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import httpx
import openai
import pytest

from loraplex import EngineConfig, MultiLoraModel, StoreConfig
from loraplex.engine.sampling.sampler import Sampler
from loraplex.engine.sched.scheduler import Scheduler
from loraplex.server.settings import LogSettings, ModelSettings, NetworkSettings, ServeConfig
from tests.server.tiny_server import (
    ENGINE,
    TIMEOUT_S,
    Running,
    character_tokenizer,
    make_model,
    running,
    wait_until_idle,
)
from tests.tiny_models import tiny_model

BODY = {"model": "tiny", "prompt": "The protein", "max_tokens": 4, "temperature": 1.0, "seed": 1}


def config(engine: EngineConfig = ENGINE) -> ServeConfig:
    return ServeConfig(
        model=ModelSettings(served_name="tiny"),
        network=NetworkSettings(port=0, drain_s=10),
        logs=LogSettings(log_requests=True),
        engine=engine,
    )


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def choices_of(chunks: list[dict]) -> dict[int, tuple[str, str | None]]:
    """By index: the whole text, and how it ended."""
    texts, ends = defaultdict(str), {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends.get(choice["index"])
    return {index: (text, ends[index]) for index, text in texts.items()}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("stop", [None, ["a", "e", "s"]])
def test_streamed_answers_are_those_of_the_whole(server: Running, n: int, stop: list[str] | None) -> None:
    body = BODY | {"n": n, "max_tokens": 12 if stop else 4, "prompt": ["The protein", "Silk"], "stop": stop}
    with server.http() as http:
        whole = http.post("/v1/completions", json=body).json()
        chunks = events(http.post("/v1/completions", json=body | {"stream": True}).text)
    expected = {choice["index"]: (choice["text"], choice["finish_reason"]) for choice in whole["choices"]}
    assert choices_of(chunks) == expected
    assert len(expected) == 2 * n
    assert all(reason is not None for _, reason in expected.values())


def test_streamed_chats_have_every_answer(server: Running) -> None:
    messages = [{"role": "user", "content": "x"}]
    options = {"model": "a", "messages": messages, "max_tokens": 3, "n": 4, "temperature": 1.0, "seed": 1}
    client = server.client()
    try:
        whole = client.chat.completions.create(**options)
    except openai.BadRequestError:
        pytest.skip("the tiny tokenizer has no chat template")
    texts, ends = defaultdict(str), {}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert dict(texts) == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}


def test_a_failing_answer_ends_its_stream_and_no_other(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Sampler.choose

    def fails(chooser: Sampler, logits: object) -> int:
        if chooser.sampling.max_tokens == 5 and chooser._generator.initial_seed() == 8 and chooser._counts.total() == 2:
            raise ZeroDivisionError("a sampler that fails")
        return choose(chooser, logits)

    monkeypatch.setattr(Sampler, "choose", fails)

    async def main() -> list[httpx.Response]:
        bodies = [BODY | {"n": 3, "seed": 7, "max_tokens": tokens, "stream": True} for tokens in (5, 6)]
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    failed, good = (events(answer.text) for answer in asyncio.run(main()))
    assert failed[-1]["error"]["code"] == "internal_error"
    assert "a sampler that fails" in failed[-1]["error"]["message"]
    assert len(choices_of(failed[:-1])) == 3, "what came before the failure was not told"
    assert {reason for _, reason in choices_of(good).values()} == {"length"}
    wait_until_idle(server)


# What can never run is a 400


@pytest.mark.parametrize(
    ("store", "code"),
    [(StoreConfig(num_slots=1), "too_large"), (StoreConfig(slot_bytes=30_000), "too_large")],
    ids=["slots", "bytes"],
)
def test_a_link_that_never_fits_is_refused_at_once(root: Path, store: StoreConfig, code: str) -> None:
    model = MultiLoraModel(tiny_model("llama"), store=store)
    model.__dict__["tokenizer"] = character_tokenizer()
    for name in "ab":
        model.load_adapter(name, root / name)
    sizes = {state.name: state.num_bytes for state in model.adapters()}
    assert max(sizes.values()) <= 30_000 < sum(sizes.values()), sizes
    with running(model, config()) as server, server.http() as http:
        for stream in (False, True):
            answer = http.post("/v1/completions", json=BODY | {"model": "a+b", "stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
            assert "retry-after" not in answer.headers
        assert http.post("/v1/completions", json=BODY | {"model": "a"}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 129},
        {"prompt": "\ud800"},
        {"prompt": ["x", "\udfff"]},
        {"priority": "x"},
        {"logit_bias": {"128": 1}},
        {"model": "a:1e300"},
        {"cache_salt": 5},
    ],
    ids=str,
)
def test_what_cant_be_served_is_a_400(server: Running, fields: dict) -> None:
    with server.http() as http:
        content = json.dumps(BODY | fields).encode()
        answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert http.get("/health").json() == {"status": "ok"}


# An engine that fails


def test_open_requests_are_told_of_a_fault_and_the_next_are_answered(root: Path, monkeypatch) -> None:
    plan = Scheduler.plan

    def failing(scheduler: Scheduler) -> list:
        """Nothing runs before all have come, and all have got a token when it fails: none has ended, on any machine."""
        if len(scheduler.running) + len(list(scheduler.waiting)) < 4:
            return []
        if len(scheduler.running) == 4 and all(sequence.num_new for sequence in scheduler.running):
            monkeypatch.setattr(Scheduler, "plan", plan)
            raise ZeroDivisionError("a scheduler that fails")
        return plan(scheduler)

    async def main(server: Running) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
            options = {"max_tokens": 100, "ignore_eos": True}
            bodies = [BODY | options | {"model": "ab"[i % 2], "stream": i > 1} for i in range(4)]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    with running(make_model(root), config()) as server, server.http() as http:
        expected = http.post("/v1/completions", json=BODY).json()["choices"]
        monkeypatch.setattr(Scheduler, "plan", failing)
        answers = asyncio.run(main(server))
        for answer in answers[:2]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
            assert "a scheduler that fails" in answer.json()["error"]["message"]
        for answer in answers[2:]:
            assert "a scheduler that fails" in events(answer.text)[-1]["error"]["message"]
        assert http.post("/v1/completions", json=BODY).json()["choices"] == expected
        assert http.get("/health").json() == {"status": "ok", "faults": 1, "last_fault": "ZeroDivisionError"}
        assert "loraplex_engine_faults_total 1.0" in http.get("/metrics").text
        wait_until_idle(server)
        assert all(state.num_leases == 0 for state in server.model.adapters())


def test_a_stopped_engine_is_a_503_at_once(root: Path, monkeypatch) -> None:
    def failing(scheduler: Scheduler) -> list:
        raise ZeroDivisionError("a scheduler that fails")

    engine = EngineConfig(cache_bytes=2**22, max_restarts=1)
    with running(make_model(root), config(engine)) as server, server.http() as http:
        monkeypatch.setattr(Scheduler, "plan", failing)
        for _ in range(2):
            assert http.post("/v1/completions", json=BODY).status_code == 500
        for stream in (False, True):
            answer = http.post("/v1/completions", json=BODY | {"stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
        health = http.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_stopped")
        assert "ZeroDivisionError" in health.json()["error"]["message"]
        assert http.get("/metrics").status_code == 200
        assert http.get("/v1/models").status_code == 200
