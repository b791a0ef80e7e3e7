"""vLLM's own OpenAI server with the plugin: names, links, errors, scalings, and many requests at once."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.vllm.residual_worlds import add_residuals
from tests.vllm.worlds import LINK, TOLERANCE, make_server_world, prompts

NUM_TOKENS = 6
NUM_REQUESTS = 200
CHOICES = [None, "protein", "materials", "chemistry", LINK, "mix1", "mix6"]
STATIC = {"static": "protein", "both": "protein:0.5+chemistry:2", "gated": "mix6"}  # vLLM's --lora-modules


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A world, and the address of a server for it: `loraplex serve --engine vllm`."""
    world = make_server_world(tmp_path_factory.mktemp("served"))
    world.own = add_residuals(world)
    port = free_port()
    vllm_args = (
        "--enforce-eager --dtype float32 --max-model-len 256 --max-num-seqs 32 --num-gpu-blocks-override 256 "
        f"--block-size 32 --max-lora-rank 16 --max-logprobs 10 --lora-modules static={world.named / 'protein'} "
        f"both=protein:0.5+chemistry:2 gated={world.named / 'mix6'} "
        """--additional-config '{"loraplex": {"attention": true}}'"""
    )
    command = [sys.executable, "-c", "from loraplex.cli.app import app; app()", "serve", "--engine", "vllm"]
    command += ["--model", world.model]
    command += ["--served-name", "base", "--watch", str(world.named), "--port", str(port), "--vllm-args", vllm_args]
    address = f"http://127.0.0.1:{port}"
    with open(world.folder / "server.log", "w") as log:
        variables = os.environ | {"VLLM_PLUGINS": ""}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)
        try:
            wait_until_ready(server, address, Path(log.name))
            yield world, address
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_ready(server: subprocess.Popen, address: str, log: Path, timeout_s: float = 900) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(f"no server after {timeout_s} s: {log.read_text()[-4000:]}")


def body(choice, prompt, **more):
    return {
        "model": choice or "base",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": 5,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
        **more,
    }


def check(world, choice, prompt, response, expected_choice=None):
    assert response.status_code == 200, response.text
    found = response.json()["choices"][0]["logprobs"]
    expected = world.expected(expected_choice or choice, prompt, NUM_TOKENS)
    assert [int(token.removeprefix("token_id:")) for token in found["tokens"]] == expected.tokens, choice
    for logprob, token, top in zip(found["token_logprobs"], expected.tokens, expected.logprobs, strict=True):
        assert abs(logprob - top[token]) <= TOLERANCE


pytestmark = pytest.mark.timeout(1200)


def test_names_links_and_static_modules(served):
    world, address = served
    for i, choice in enumerate([*CHOICES, *STATIC]):
        prompt = prompts(len(CHOICES) + len(STATIC))[i]
        response = httpx.post(f"{address}/v1/completions", json=body(choice, prompt), timeout=300)
        check(world, choice, prompt, response, STATIC.get(choice))


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("nobody", 404, "nobody"),
        ("protein+nobody", 404, "nobody"),
        ("protein:heavy", 400, "heavy"),
        ("protein:0.5+../outside", 400, "outside"),
        ("mix1+materials", 400, "mix1"),  # rank 15 + 8 with max_lora_rank 16
    ],
)
def test_what_cant_be_served_is_answered_with_an_error(served, model, status, words):
    _, address = served
    response = httpx.post(f"{address}/v1/completions", json=body(model, prompts(1)[0]), timeout=300)
    assert response.status_code == status, response.text
    assert words in response.text
    assert httpx.get(f"{address}/health").status_code == 200


def test_paths_of_clients_are_refused(served):
    world, address = served
    response = httpx.post(
        f"{address}/v1/load_lora_adapter",
        json={"lora_name": "stolen", "lora_path": str(world.folder / "model")},
        timeout=300,
    )
    assert response.status_code >= 400
    assert "lies outside" in response.text


def test_scalings_of_a_request_that_asks(served):
    from loraplex import MultiLoraModel

    world, address = served
    prompt = prompts(1, seed=9)[0]
    asked = body("mix1", prompt, vllm_xargs={"loraplex_scalings": 1})
    answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=300).json()
    response = httpx.get(f"{address}/v1/loraplex/scalings/{answer['id']}", timeout=60)
    assert response.status_code == 200, response.text
    (request,) = response.json()["requests"]
    (mixture,) = request["mixtures"]
    tokens = [int(token.removeprefix("token_id:")) for token in answer["choices"][0]["logprobs"]["tokens"]]
    assert mixture["mixture"] == "mix1"
    assert mixture["positions"] == list(range(len(prompt) + NUM_TOKENS - 1))  # the last token is never run

    import torch

    model = MultiLoraModel.from_pretrained(world.model, dtype="float32")
    model.load_mixture("mix1", world.named / "mix1")
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    hidden = model.base.model(input_ids=ids).last_hidden_state
    expected = model.mixtures.get("mix1").head(hidden)[0]
    torch.testing.assert_close(torch.tensor(mixture["scalings"]), expected, atol=1e-3, rtol=0)
    assert httpx.get(f"{address}/v1/loraplex/scalings/{answer['id']}", timeout=60).status_code == 404  # given once


def test_residuals_steering_and_captures_of_requests(served):
    import numpy as np
    import torch

    from loraplex.residual import AttentionRequest, CaptureRequest, Steering

    world, address = served
    prompt = prompts(1, seed=4)[0]
    steer = json.dumps([{"start": 1, "end": 4, "strength": 5, "layers": [1]}])
    capture = json.dumps({"layers": [1], "queries": 2})
    both = {"loraplex_steer": steer, "loraplex_capture": capture}
    for choice, more in (("linked", {}), ("calm:0.5+protein", {}), ("block+protein", both)):
        response = httpx.post(f"{address}/v1/completions", json=body(choice, prompt, vllm_xargs=more), timeout=300)
        assert response.status_code == 200, response.text
        found = response.json()["choices"][0]["logprobs"]
        tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        request = AttentionRequest(
            steering=[Steering(spans=((1, 4),), strength=5, layers=(1,)) if more else None],
            capture=CaptureRequest(layers=(1,)) if more else None,
            prompt_lengths=[len(prompt)],
        )
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        logits = world.own(ids, adapters=[choice], attention=request, use_cache=False).logits[0, len(prompt) - 1 :]
        expected = torch.log_softmax(logits.float(), dim=-1)
        assert expected.argmax(dim=-1).tolist() == tokens
        assert (expected.max(dim=-1).values - torch.tensor(found["token_logprobs"])).abs().max() <= TOLERANCE
        captured = httpx.get(f"{address}/v1/loraplex/attention/{response.json()['id']}", timeout=60)
        assert captured.status_code == (200 if more else 404)
        if more:
            (own,) = captured.json()["requests"]
            assert own["query_positions"] == [len(prompt) - 2, len(prompt) - 1]
            weights = request.captures[0].weights[:, :, len(prompt) - 2 : len(prompt)]
            np.testing.assert_allclose(np.array(own["weights"]), weights, atol=1e-4)
    refused = {"loraplex_steer": '[{"start": 1, "end": 400, "strength": 5}]'}
    response = httpx.post(f"{address}/v1/completions", json=body("protein", prompt, vllm_xargs=refused), timeout=300)
    assert response.status_code == 400, response.text
    assert "(1, 400)" in response.text


def test_many_mixed_requests_at_once(served):
    world, address = served
    kinds = [(choice, prompts(9, seed=1)[i]) for i, choice in enumerate(CHOICES)]

    async def run():
        limits = httpx.Limits(max_connections=NUM_REQUESTS)
        async with httpx.AsyncClient(timeout=900, limits=limits) as client:
            calls = [
                client.post(f"{address}/v1/completions", json=body(*kinds[i % len(kinds)])) for i in range(NUM_REQUESTS)
            ]
            return await asyncio.gather(*calls)

    responses = asyncio.run(run())
    assert len(responses) == NUM_REQUESTS
    for i, response in enumerate(responses):
        check(world, *kinds[i % len(kinds)], response)
    assert json.loads(httpx.get(f"{address}/v1/models").text)["data"]
