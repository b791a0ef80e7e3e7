"""The Tinker API of a real server on a tiny model, against PEFT and transformers."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel

from loraplex import MultiLoraModel
from loraplex.server.auth.keys import KeyFile
from loraplex.server.settings import TrainingSettings
from tests.server.tinker.tinker_client import TinkerClient
from tests.server.tiny_server import Running, character_tokenizer, running, settings
from tests.tiny_models import tiny_model

TOKENS = [5, 9, 17, 3, 44, 71, 20, 8]
DATUM = {"tokens": TOKENS[:-1], "target_tokens": TOKENS[1:], "weights": [0, 1, 1, 1, 1, 1, 1]}
OTHER = {"tokens": [7, 7, 2], "target_tokens": [7, 2, 9], "weights": [1, 1, 1]}


def model() -> MultiLoraModel:
    made = MultiLoraModel(tiny_model("llama"))
    made.__dict__["tokenizer"] = character_tokenizer()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    config = replace(settings(), training=TrainingSettings(training=True, training_folder=str(folder)))
    with running(model(), config) as server:
        yield server


def logprobs_of(folder: Path | None, tokens: list[int]) -> torch.Tensor:
    """PEFT's, of each token but the first."""
    base = tiny_model("llama")
    with torch.no_grad():
        logits = (base if folder is None else PeftModel.from_pretrained(base, folder))(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_what_is_trained_is_what_is_sampled_saved_and_loaded_by_peft(server: Running, folder: Path) -> None:
    client = TinkerClient(server.url)
    assert client.create()["model_id"] == f"{client.session}:train:0"
    first, _ = client.losses([DATUM, OTHER])
    for _ in range(5):
        client.step()
        last, _ = client.losses([DATUM, OTHER])
    assert last < first
    client.step()
    saved = client.call("save_weights", path="five", type="save_weights")["path"]
    assert saved == f"tinker://{client.model_id}/weights/five"
    expected = logprobs_of(folder / "runs" / client.model_id / "weights" / "five", TOKENS)
    _, (own,) = client.losses([DATUM], forward_only=True)
    torch.testing.assert_close(torch.tensor(own), expected, rtol=1e-4, atol=1e-4)

    sampler = client.call("save_weights_for_sampler", sampling_session_seq_id=0)["sampling_session_id"]
    answer = client.sample(
        TOKENS, sampling_session_id=sampler, seq=0, prompt_logprobs=True, topk_prompt_logprobs=2, count=2
    )
    prompt = np.frombuffer(answer.prompt_logprobs, dtype=np.float32)
    assert np.isnan(prompt[0])
    torch.testing.assert_close(torch.tensor(prompt[1:]), expected, rtol=1e-4, atol=1e-4)
    assert (answer.topk_prompt_logprobs.k, answer.topk_prompt_logprobs.length) == (2, len(TOKENS))
    for sequence in answer.sequences:
        tokens = np.frombuffer(sequence.tokens, dtype=np.int32).tolist()
        told = np.frombuffer(sequence.logprobs, dtype=np.float32)
        whole = logprobs_of(folder / "runs" / client.model_id / "weights" / "five", [*TOKENS, *tokens])
        torch.testing.assert_close(torch.tensor(told), whole[-len(tokens) :], rtol=1e-3, atol=1e-3)
        assert sequence.stop_reason == 1  # cut off

    named = client.call("save_weights_for_sampler", path="named")["path"]
    completion = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": named, "prompt": TOKENS, "max_tokens": 5, "temperature": 0},
        timeout=60,
    )
    assert completion.json()["model"] == named
    assert completion.json()["choices"][0]["text"] == character_tokenizer().decode(tokens)


def test_losses_that_clients_send_at_once_are_theirs_alone(server: Running) -> None:
    clients = [TinkerClient(server.url) for _ in range(3)]
    for number, client in enumerate(clients):
        client.create(seed=number + 10)
    together = [[client.losses([DATUM])[0]] for client in clients]
    for losses, client in zip(together, clients, strict=True):
        client.step()
        losses.append(client.losses([OTHER, DATUM])[0])
    for number, losses in enumerate(together):
        alone = TinkerClient(server.url)
        alone.create(seed=number + 10)
        found = [alone.losses([DATUM])[0]]
        alone.step()
        assert [*found, alone.losses([OTHER, DATUM])[0]] == pytest.approx(losses, rel=1e-4)


def test_a_run_goes_on_from_a_checkpoint_with_and_without_the_optimizer(server: Running) -> None:
    client = TinkerClient(server.url)
    client.create()
    for _ in range(3):
        client.losses([DATUM])
        client.step()
    path = client.call("save_weights", path="a")["path"]
    expected = client.losses([DATUM])[0]
    client.step()
    after = client.losses([DATUM])[0]
    info = client.post("weights_info", tinker_path=path)
    assert (info["base_model"], info["lora_rank"], info["is_lora"]) == ("tiny", 4, True)
    for number, optimizer in ((1, True), (2, False)):
        other = TinkerClient(server.url)
        fields = {"session_id": other.session, "model_seq_id": number, "path": path, "optimizer": optimizer}
        loaded = other.result(other.post("load_weights", **fields)["request_id"])
        other.model_id = loaded["model_id"]
        assert other.model_id == f"{other.session}:train:{number}"
        assert other.losses([DATUM])[0] == pytest.approx(expected, rel=1e-5)
        other.step()
        assert (other.losses([DATUM])[0] == pytest.approx(after, rel=1e-5)) == optimizer


def test_requests_that_come_again_are_the_same(server: Running) -> None:
    client = TinkerClient(server.url)
    client.create()
    client.create()
    first = client.losses([DATUM])
    client.seq -= 1
    assert client.losses([OTHER])[0] == first[0]
    client.losses([DATUM])
    client.step()
    again = client.sample(TOKENS, sampling_session_id=None, base_model="tiny")
    assert again.sequences[0].tokens


@pytest.mark.parametrize(
    ("data", "loss", "options", "told"),
    [
        ([DATUM], "stable_reinforce", {}, "public"),
        ([DATUM], "ppo", {}, "advantages"),
        ([DATUM], "cross_entropy", {"beta": 1.0}, "beta"),
        ([], "cross_entropy", {}, "no data"),
        ([{**DATUM, "tokens": [1, 2, 1000, 4, 5, 6, 7]}], "cross_entropy", {}, "1000"),
        ([{**DATUM, "weights": [1, 2]}], "cross_entropy", {}, "shape"),
        ([{"tokens": [1]}], "cross_entropy", {}, "target_tokens"),
    ],
)
def test_bad_losses_fail_by_name_and_the_next_request_goes_on(
    server: Running, data: list, loss: str, options: dict, told: str
) -> None:
    client = TinkerClient(server.url)
    client.create()
    failed = client.losses(data, loss, **options)
    assert failed["category"] == "user"
    assert told in failed["error"]
    assert client.losses([DATUM])[0] > 0


@pytest.mark.parametrize(
    ("call", "fields", "told"),
    [
        ("create_model", {"model_seq_id": 0, "base_model": "other", "lora_config": {"rank": 4}}, "other"),
        ("create_model", {"model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 0}}, "rank"),
        ("create_model", {"model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 9999}}, "max_rank"),
        ("create_model", {"model_seq_id": 0, "base_model": "tiny"}, "lora_config"),
        (
            "create_model",
            {"model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}, "user_metadata": {"a": "x" * 20000}},
            "user_metadata has 20008 bytes",
        ),
        (
            "create_model",
            {
                "model_seq_id": 0,
                "base_model": "tiny",
                "lora_config": {"rank": 1},
                "optimizer_config": {"type": "dimuon"},
            },
            "dimuon",
        ),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "model_path": "tinker://x"}, "tinker"),
        (
            "create_sampling_session",
            {"sampling_session_seq_id": 0, "model_path": "tinker://s-1:train:0/weights/../.."},
            "tinker",
        ),
    ],
)
def test_bad_calls_are_refused_by_name(server: Running, call: str, fields: dict, told: str) -> None:
    client = TinkerClient(server.url)
    response = client.http.post(f"/{call}", json={"session_id": client.session, **fields})
    assert response.status_code == 400, response.text
    assert told in response.json()["error"]["message"]


def test_samples_for_a_loss_that_is_not_here_are_refused_with_those_that_are(server: Running) -> None:
    client = TinkerClient(server.url)
    asked = {"prompt": {"chunks": [{"tokens": TOKENS}]}, "sampling_params": {}, "base_model": "tiny"}
    told = client.http.post("/asample", json={**asked, "record_stability_info": True})
    assert told.status_code == 400
    assert "importance_sampling" in told.json()["error"]["message"]


def test_the_sdk_is_told_to_cut_batches_into_requests_that_are_taken(tmp_path: Path) -> None:
    """Of at most so many tokens, each of which is a token and its target at least: 12 bytes."""
    training = TrainingSettings(training=True, training_folder=str(tmp_path / "runs"), training_request_tokens=500)
    with running(model(), replace(settings(), training=training)) as server:
        told = TinkerClient(server.url).post("client/config", sdk_version="0.38.0")
        assert told["fwdbwd_max_chunk_bytes_count"] == 6000


def test_unknown_things_are_not_found_or_gone(server: Running) -> None:
    client = TinkerClient(server.url)
    for request_id, status in (
        (f"{client.session}:train:7:1", 404),
        ("s-1:sample:0:1", 410),
        ("../../etc:train:0:1", 404),
    ):
        assert client.http.post("/retrieve_future", json={"request_id": request_id}).status_code == status
    assert client.http.get("/training_runs/none").status_code == 404
    assert client.http.post("/session_heartbeat", json={"session_id": "s-none"}).status_code == 404
    client.http.post(f"/sessions/{client.session}/finish", json={"reason": {"type": "success"}, "detail": None})
    assert client.http.post("/session_heartbeat", json={"session_id": client.session}).status_code == 410


def test_checkpoints_are_listed_kept_shared_packed_and_deleted(server: Running) -> None:
    client = TinkerClient(server.url)
    client.create()
    client.call("save_weights", path="a", ttl_seconds=7200, user_metadata={"note": "x"})
    client.call("save_weights_external", path="out")
    runs = client.http.get("/training_runs").json()
    assert runs["training_runs"][0]["training_run_id"] == client.model_id
    assert runs["cursor"]["total_count"] >= 1
    listed = client.http.get(f"/training_runs/{client.model_id}/checkpoints").json()["checkpoints"]
    assert {own["checkpoint_id"] for own in listed} == {"weights/a", "external_weights/out"}
    (own,) = (own for own in listed if own["checkpoint_id"] == "weights/a")
    assert own["user_metadata"] == {"note": "x"}
    assert own["expires_at"]
    where = f"/training_runs/{client.model_id}/checkpoints/weights/a"
    assert client.http.post(f"{where}/publish").status_code == 200
    assert client.http.put(f"{where}/ttl", json={"ttl_seconds": None}).status_code == 200
    (own,) = (
        o for o in client.http.get("/checkpoints").json()["checkpoints"] if o["tinker_path"] == own["tinker_path"]
    )
    assert own["public"]
    assert own["expires_at"] is None
    packed = client.http.get(f"{where}/archive")
    with tarfile.open(fileobj=io.BytesIO(packed.content)) as tar:
        assert "a/adapter_model.safetensors" in tar.getnames()
    assert client.http.delete(where).status_code == 200
    assert client.http.delete(where).status_code == 404


def test_keys_see_their_own(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    ada, _ = keys.create(note="ada", max_training_runs=1)
    bob, _ = keys.create(note="bob")
    training = TrainingSettings(training=True, training_folder=str(tmp_path / "runs"))
    with running(model(), replace(settings(keys=keys), training=training)) as server:
        assert httpx.get(f"{server.url}/api/v1/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{server.url}/api/v1/sessions", headers={"x-api-key": "tml-wrong"}).status_code == 401
        own, other = TinkerClient(server.url, f"tml-{ada}"), TinkerClient(server.url, f"tml-{bob}")
        own.create()
        path = own.call("save_weights_for_sampler", path="mine")["path"]
        assert other.http.get(f"/training_runs/{own.model_id}").status_code == 404
        assert other.http.get("/checkpoints").json()["checkpoints"] == []
        assert other.http.get("/sessions").json()["sessions"] == [other.session]
        body = {"model": path, "prompt": TOKENS, "max_tokens": 2}
        told = httpx.post(f"{server.url}/v1/completions", json=body, headers={"authorization": f"Bearer {bob}"})
        assert told.status_code == 404
        told = httpx.post(f"{server.url}/v1/completions", json=body, headers={"authorization": f"Bearer {ada}"})
        assert told.status_code == 200
        names = [
            entry["id"]
            for entry in httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {bob}"}).json()["data"]
        ]
        assert not any(name.startswith("tinker/") for name in names)
        asked = other.http.post(
            "/asample", json={"prompt": {"chunks": [{"tokens": TOKENS}]}, "sampling_params": {}, "model_path": path}
        )
        assert asked.status_code == 404
        second = {"session_id": own.session, "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}}
        assert own.http.post("/create_model", json=second).status_code == 429


def test_a_server_that_begins_anew_goes_on(tmp_path: Path) -> None:
    config = replace(settings(), training=TrainingSettings(training=True, training_folder=str(tmp_path / "runs")))
    with running(model(), config) as server:
        client = TinkerClient(server.url)
        client.create()
        client.losses([DATUM])
        client.step()
        sampler = client.call("save_weights_for_sampler", sampling_session_seq_id=0)["sampling_session_id"]
        expected, _ = client.losses([DATUM], forward_only=True)
        last = f"{client.model_id}:{client.seq}"
        tokens = client.sample(TOKENS, sampling_session_id=sampler, seq=0).sequences[0].tokens
    with running(model(), config) as server:
        client.http = httpx.Client(base_url=f"{server.url}/api/v1", timeout=120)
        assert isinstance(client.result(last), bytes)  # the result is asked for again
        assert client.losses([DATUM], forward_only=True)[0] == pytest.approx(expected, rel=1e-5)
        assert client.sample(TOKENS, sampling_session_id=sampler, seq=1).sequences[0].tokens == tokens
