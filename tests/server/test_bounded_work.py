"""What a request may cost before it is refused or answered, and what is left of it when its client leaves."""

import asyncio
import base64
import contextlib
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
import torch

from loraplex.errors import RequestError
from loraplex.residual.steering import Steering, TokenOffsets, log_strengths, ranges_of_text
from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.bodies import Steer
from loraplex.server.api.engine_requests import encode_text, steerings
from loraplex.server.api.json_route import check_num_values
from loraplex.server.api.response_parts import array_json
from loraplex.server.api.streaming import json_pieces
from loraplex.server.state import Workers
from tests.server.tiny_server import TIMEOUT_S, Running, character_tokenizer, wait_until_idle

BODY = {"model": "a", "prompt": "abc", "max_tokens": 2, "temperature": 0}
TOO_LONG = BODY | {"prompt": "a" * 300_000, "steer": [{"text": "a", "strength": 2}]}


def refusal(server: Running, path: str = "/v1/completions", **fields: object) -> tuple[int, str, str]:
    answer = server.http().post(path, json=BODY | fields)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_clients_that_send_much_and_leave_hold_up_nobody(server: Running) -> None:
    def leave() -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=TOO_LONG, timeout=0.5)

    with ThreadPoolExecutor(8) as clients:
        for _ in range(8):
            clients.submit(leave)
    began = time.perf_counter()
    assert server.http().post("/v1/completions", json=BODY | {"steer": [{"text": "b", "strength": 2}]}).is_success
    assert time.perf_counter() - began < 10, "their work was still done"
    wait_until_idle(server)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompts_that_are_too_long_are_refused_before_they_are_searched(server: Running, path: str) -> None:
    field = "messages" if "chat" in path else "prompt"
    text = TOO_LONG["prompt"]
    prompt = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    body = {key: value for key, value in TOO_LONG.items() if key != "prompt"} | prompt
    answer = server.http().post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert len(answer.content) < 1000, "the answer repeats what was sent"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 128, "n": 3}, "n"),
        ({"prompt": [[1]] * 5000}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids"),
        ({"logit_bias": {str(token): 1.0 for token in range(2000)}}, "logit_bias"),
        ({f"field{number}": 1 for number in range(200)}, None),
        ({"prompt": [1] * 2**18}, None),
        ({"metadata": {"x": [1] * 2**18}}, None),
        ({"steer": [{"start": 0, "end": 1, "strength": 2}] * 65}, "steer"),
        ({"capture_attention": {"layers": [0] * 5000}}, "capture_attention.layers"),
    ],
)
def test_what_grows_with_the_body_has_a_bound(server: Running, fields: dict, param: str | None) -> None:
    status, _, named = refusal(server, **fields)
    assert (status, named) == (400, param)


def test_chats_have_bounds_too(server: Running) -> None:
    part = {"type": "text", "text": "x"}
    messages = [{"role": "user", "content": [part] * 2000}]
    assert refusal(server, "/v1/chat/completions", prompt=None, messages=messages)[0] == 400
    assert refusal(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}] * 5000)[0] == 400


def test_values_in_texts_do_not_count() -> None:
    body = orjson.dumps({"prompt": '[1,2,{"a":3}],\\"' * 1000})
    check_num_values(body, 10)
    with pytest.raises(ApiError, match="more than 10 JSON values"):
        check_num_values(orjson.dumps({"prompt": [1] * 11}), 10)


def test_one_owner_has_half_of_the_threads_and_cancelled_work_is_not_begun() -> None:
    async def run() -> None:
        workers, go, begun = Workers(4, "test"), threading.Event(), []

        def hold(name: str) -> None:
            begun.append(name)
            go.wait(TIMEOUT_S)

        theirs = [asyncio.create_task(workers.run("hostile", lambda: hold("hostile"))) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(workers.run("other", lambda: 5), TIMEOUT_S) == 5
        for task in theirs:
            task.cancel()
        await asyncio.gather(*theirs, return_exceptions=True)
        late = asyncio.create_task(workers.run("hostile", lambda: hold("late")))
        await asyncio.sleep(0.1)
        assert begun == ["hostile", "hostile"], "an owner's place was free before its work had ended"
        go.set()
        await asyncio.wait_for(late, TIMEOUT_S)
        assert begun == ["hostile", "hostile", "late"]

    asyncio.run(run())


def test_requests_that_wait_for_the_engine_are_not_read_once_their_clients_left(server: Running, monkeypatch) -> None:
    go, begun = threading.Event(), []
    engine = server.server.state.engine._engine
    add = engine.take_request

    def slow(request, request_id):
        begun.append(request_id)
        go.wait(TIMEOUT_S)
        return add(request, request_id)

    monkeypatch.setattr(engine, "take_request", slow)

    def leave() -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=1)

    with ThreadPoolExecutor(12) as clients:
        for _ in range(12):
            clients.submit(leave)
    time.sleep(0.3)
    monkeypatch.undo()
    num_begun = len(begun)
    go.set()
    wait_until_idle(server)
    assert len(begun) == num_begun < 12


def test_listing_asks_the_store_once(server: Running, monkeypatch) -> None:
    calls, adapters = [], server.model.adapters
    monkeypatch.setattr(server.model, "adapters", lambda: calls.append(1) or adapters())
    assert len(server.http().get("/v1/adapters").json()["data"]) == 5
    assert len(calls) == 1, "it costs the square of the number of adapters"


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "PATCH"])
def test_long_names_are_not_repeated(server: Running, method: str) -> None:
    body = {"PUT": {"path": "a"}, "PATCH": {"pinned": True}}.get(method)
    answer = server.http().request(method, "/v1/adapters/" + "x" * 20_000, json=body)
    assert answer.status_code == 404
    assert len(answer.content) < 1000


def test_settings_of_many_megabytes_are_not_parsed(server: Running, root: Path) -> None:
    folder = shutil.copytree(root / "a", root / "large")
    (folder / "adapter_config.json").write_bytes(b'{"x": [' + b"1," * 2**21 + b"1]}")
    answer = server.http().post("/v1/adapters", json={"name": "x", "path": "large"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_large")
    shutil.copy(root / "a" / "adapter_config.json", folder)
    (folder / "tokenizer.json").write_bytes(b"[" * 2**23)  # is not read
    assert server.http().post("/v1/adapters", json={"name": "x", "path": "large"}).status_code == 200
    assert server.http().delete("/v1/adapters/x").status_code == 200
    shutil.rmtree(folder)


def test_offsets_are_found_as_by_trying_all_tokens() -> None:
    draw = random.Random(0)
    for _ in range(200):
        stops = sorted(draw.sample(range(1, 60), draw.randint(1, 20)))
        offsets = [(start, stop) for start, stop in zip([0, *stops], stops, strict=False) if draw.random() < 0.8]
        offsets = [(0, 0), *offsets, (0, 0)]  # special tokens stand for no characters
        start = draw.randint(0, 58)
        stop = draw.randint(start + 1, 60)
        hit = [place for place, (first, last) in enumerate(offsets) if first < stop and last > start]
        if hit:
            assert TokenOffsets(offsets).spans([(start, stop)], "x") == ((hit[0], hit[-1] + 1),)
        else:
            with pytest.raises(RequestError, match="no token"):
                TokenOffsets(offsets).spans([(start, stop)], "x")


def test_a_text_that_is_there_too_often_is_refused() -> None:
    assert len(ranges_of_text("a" * 256, "a")) == 256
    with pytest.raises(RequestError, match="more than 256 times"):
        ranges_of_text("a" * 257, "a")


@pytest.mark.parametrize(("letters", "param"), [("a", "steer.0"), ("bc", "steer")])
def test_steerings_have_a_bound_on_their_spans(letters: str, param: str) -> None:
    prompt = encode_text(character_tokenizer(), "aaaaabcbcbc", add_special_tokens=False, most=99)
    wanted = [Steer(text=letter, strength=2.0) for letter in letters]
    assert len(steerings(wanted, prompt, 6)) == len(letters)
    with pytest.raises(ApiError) as refused:
        steerings(wanted, prompt, 4)
    assert refused.value.param == param


@pytest.mark.parametrize("strength", [2.0, 0.0])
def test_strengths_of_overlapping_spans_multiply(strength: float) -> None:
    steering = Steering(spans=((1, 4), (3, 6), (5, 90)), strength=strength, heads=(1,))
    added = log_strengths([(0, (steering,), 2)], 1, 2, 1, 8, torch.device("cpu"))
    times = torch.tensor([0, 0, 1, 1, 2, 1, 2, 1])  # keys 1 to 8, two of padding
    expected = torch.where(times > 0, times * steering.log_strength, 0.0)
    assert torch.allclose(added[0, 1], expected)
    assert not added[0, 0].any()


@pytest.mark.parametrize("shape", [(3,), (200_000,), (2, 3, 4), (2, 100_000), (7, 11, 5000), (0,), (2, 0)])
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_arrays_written_in_pieces_are_those_written_at_once(shape: tuple[int, ...], kind: str) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(kind)
    assert orjson.loads(b"".join(json_pieces(array_json(array, "list"))))["data"] == array.tolist()
    packed = base64.b64decode(orjson.loads(b"".join(json_pieces(array_json(array, "base64"))))["data"])
    assert packed == array.tobytes()
