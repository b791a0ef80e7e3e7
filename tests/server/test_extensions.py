"""Scalings, captured attention and steering over HTTP are the engine's."""

import base64
import json

import numpy as np
import pytest

from loraplex import Engine, EngineConfig, Request, SamplingParams
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.steering import Steering

PROMPT = "The protein folds"


def array(described: dict) -> np.ndarray:
    """What a client does with an array's description."""
    if isinstance(described["data"], list):
        return np.array(described["data"], dtype=described["dtype"])
    raw = np.frombuffer(base64.b64decode(described["data"]), dtype=np.dtype(described["dtype"]).newbyteorder("<"))
    return raw.reshape(described["shape"])


def ask(server, **fields):
    body = {"model": "mix-ab", "prompt": PROMPT, "max_tokens": 5, "temperature": 0} | fields
    answer = server.http().post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def ask_engine(server, **fields):
    with Engine(server.model, EngineConfig(cache_bytes=2**22)) as engine:
        request = Request(PROMPT, adapters="mix-ab", sampling=SamplingParams(max_tokens=5), **fields)
        return engine.generate([request])[0]


def test_scalings_of_every_token(server):
    choice = ask(server, return_scalings=True)
    (expected,) = ask_engine(server, return_scalings=True).scalings
    (told,) = choice["scalings"]
    assert (told["mixture"], told["experts"]) == ("mix-ab", ["a", "b"])
    assert told["layers"] == list(expected.layers)
    assert "".join(told["tokens"]).startswith(PROMPT)
    np.testing.assert_allclose(array(told["values"]), expected.values.numpy(), atol=1e-5)


def test_streamed_chunks_carry_their_tokens_scalings(server):
    body = {"model": "mix-ab", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True}
    with server.http().stream("POST", "/v1/completions", json=body | {"return_scalings": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    live = [choice["token_scalings"] for choice in choices if "token_scalings" in choice]
    values = [row for entry in live for row in entry["values"]]
    (expected,) = ask_engine(server, return_scalings=True).scalings
    means = expected.mean_by_token().numpy()[len(PROMPT) - 1 :]
    np.testing.assert_allclose(np.array(values)[:, 0], means, atol=1e-5)
    assert sum(len(entry["tokens"]) for entry in live) == len(values) == 5
    assert [choice["finish_reason"] for choice in choices].count("length") == 1
    np.testing.assert_allclose(array(choices[-1]["scalings"][0]["values"]), expected.values.numpy(), atol=1e-5)


@pytest.mark.parametrize("encoding", ["base64", "list"])
def test_captured_attention(server, encoding):
    wanted = {"layers": [1], "queries": "generated", "dtype": "float32"}
    choice = ask(server, capture_attention=wanted | {"encoding": encoding})
    expected = ask_engine(server, capture=CaptureRequest(layers=(1,), queries="generated")).capture
    told = choice["captured_attention"]
    np.testing.assert_allclose(array(told["weights"]), expected.weights, atol=1e-5)
    assert (told["layers"], told["heads"]) == ([1], [0, 1, 2, 3])
    assert told["query_positions"] == list(expected.query_positions)


def test_capture_over_the_budget_is_refused(server):
    server.server.state.config.limits.__dict__["max_capture_bytes"] = 100
    try:
        body = {"model": "a", "prompt": PROMPT, "capture_attention": {}}
        answer = server.http().post("/v1/completions", json=body)
    finally:
        server.server.state.config.limits.__dict__["max_capture_bytes"] = 2**24
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_large")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_scalings_over_the_budget_are_refused_before_they_are_made(server, path, stream):
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a b"}]}
    body = asked | {"model": "mix-ab", "max_tokens": 8, "return_scalings": True, "stream": stream}
    server.server.state.config.limits.__dict__["max_capture_bytes"] = 1000
    num_steps = server.server.state.engine.stats().counts.num_steps
    try:
        refused = server.http().post(path, json=body)
        assert server.server.state.engine.stats().counts.num_steps == num_steps
        plain = server.http().post(path, json=body | {"return_scalings": False})
    finally:
        server.server.state.config.limits.__dict__["max_capture_bytes"] = 2**24
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_large")
    assert "max_tokens" in refused.json()["error"]["message"]
    assert plain.status_code == 200
    assert server.http().post(path, json=body).status_code == 200


def test_steering_by_text_and_by_tokens(server):
    steering = Steering(spans=((4, 11),), strength=50.0)
    expected = ask_engine(server, steering=(steering,)).text
    assert ask(server, steer=[{"start": 4, "end": 11, "strength": 50}])["text"] == expected
    assert ask(server, steer=[{"text": "protein", "strength": 50}])["text"] == expected
    assert ask(server)["text"] != expected


def test_steering_to_a_share(server):
    expected = ask_engine(server, steering=(Steering(spans=((4, 11),), share=0.9),)).text
    assert ask(server, steer=[{"text": "protein", "share": 0.9}])["text"] == expected
    assert ask(server)["text"] != expected


@pytest.mark.parametrize(
    "steer",
    [
        {"text": "protein"},
        {"text": "protein", "share": 0.5, "strength": 2},
        {"text": "protein", "share": 1},
        {"text": "protein", "share": 0},
        {"strength": 2},
        {"start": 3, "strength": 2},
        {"start": 0, "end": 1, "text": "x", "strength": 2},
        {"text": "not there", "strength": 2},
        {"start": 5, "end": 500, "strength": 2},
        {"text": "The", "strength": -1},
        {"text": "The", "strength": 1, "layers": [99]},
    ],
)
def test_steering_that_cannot_be(server, steer):
    body = {"model": "a", "prompt": PROMPT, "steer": [steer]}
    assert server.http().post("/v1/completions", json=body).status_code == 400
