"""What keys may and may not: the table of refusals, limits, paths, secrets."""

import contextlib
import http.client
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loraplex.errors import ConfigError
from loraplex.server.api.api_errors import ApiError
from loraplex.server.auth.keys import KeyFile
from loraplex.server.auth.path_sandbox import AdapterRoots
from loraplex.server.logs import JsonFormatter
from loraplex.server.settings import AccessSettings, NetworkSettings, RequestLimits, ServeConfig
from tests.server.tiny_server import Running, make_model, running, settings, wait_until_idle

LONG = "one prompt that fills several blocks of sixteen characters each"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    made = {
        "a": {"use": ("a", "mix-a*"), "load": ("team-a/*",), "roots": (".",)},
        "of-team-a": {"load": ("team-a/*",), "roots": ("team-a",)},
        "b": {"use": ("b",), "base": False},
        "limited": {"max_concurrent": 1, "max_new_tokens": 20},
        "slow": {"requests_per_minute": 2},
        "few": {"tokens_per_minute": 30},
        "manager": {"manage": True},
    }
    return {"": str(file.path)} | {name: file.create(note=name, **options)[0] for name, options in made.items()}


@pytest.fixture(scope="module")
def secured(root: Path, keys: dict[str, str]) -> Iterator[Running]:
    with running(make_model(root), settings(keys=KeyFile(keys[""]), roots=(str(root),))) as server:
        yield server


def complete(server: Running, key: str | None, model: str, prompt: str = "x", **fields: object) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0} | fields
    return server.http(key).post("/v1/completions", json=body)


@pytest.mark.parametrize("model", ["b", "a+b", "b:0", "a:1+b:0.001", "mix-ab", "a+mix-ab", "../b", "a/../b", "mix-ac"])
def test_key_of_a_is_refused_whatever_has_b_or_c_in_it(secured, keys, model):
    refused = complete(secured, keys["a"], model)
    unknown = complete(secured, keys["a"], "no-such-" + model.replace("/", "-"))
    assert refused.status_code == unknown.status_code == 404
    # An adapter that exists and one that doesn't get the same words, but for the name that was asked for.
    assert refused.json()["error"]["code"] == unknown.json()["error"]["code"] == "model_not_found"
    told = refused.json()["error"]["message"].replace(repr(model), "")
    assert told == unknown.json()["error"]["message"].replace(repr("no-such-" + model.replace("/", "-")), "")


def test_key_sees_and_uses_what_it_may(secured, keys):
    assert complete(secured, keys["a"], "a").status_code == 200
    assert complete(secured, keys["a"], "tiny").status_code == 200
    assert complete(secured, keys["b"], "tiny").status_code == 404
    assert complete(secured, keys["manager"], "mix-ab+c").status_code == 200
    listed = {name: secured.http(keys[name]).get("/v1/models").json()["data"] for name in ("a", "b", "manager")}
    assert [model["id"] for model in listed["a"]] == ["tiny", "a"]
    assert [model["id"] for model in listed["b"]] == ["b"]
    assert len(listed["manager"]) == 6
    assert [s["name"] for s in secured.http(keys["b"]).get("/v1/adapters").json()["data"]] == ["b"]
    assert secured.http(keys["b"]).get("/v1/adapters/a").status_code == 404
    assert secured.http(keys["b"]).get("/v1/models/mix-ab").status_code == 404


def cached_tokens(server: Running, key: str, prompt: str, **fields: object) -> int:
    answer = complete(server, key, "b" if key else "tiny", prompt, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_prefix_cache_of_another_key_is_empty(secured, keys):
    assert cached_tokens(secured, keys["b"], LONG) == 0
    assert cached_tokens(secured, keys["b"], LONG) >= 32
    assert cached_tokens(secured, keys["manager"], LONG) == 0
    assert cached_tokens(secured, keys["manager"], LONG) >= 32
    assert cached_tokens(secured, keys["manager"], LONG, cache_salt="other") == 0


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic abc", "Bearer lpx_00000000_x", "A" * 4000])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/tokenize", "/nothing"])
def test_wrong_keys_get_401_before_the_body_is_read(secured, header, path):
    headers = {} if header is None else {"authorization": header}
    answer = httpx.post(f"{secured.url}{path}", headers=headers, content=b"no json", timeout=60)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_is_open_and_metrics_are_the_managers(secured, keys):
    assert httpx.get(f"{secured.url}/health", timeout=60).json() == {"status": "ok"}
    assert secured.http(keys["a"]).get("/metrics").status_code == 403
    assert "loraplex_steps" in secured.http(keys["manager"]).get("/metrics").text


def cut_of(secured: Running, key: str) -> int:
    return secured.http(key).get("/v1/models/a").json()["max_new_tokens"]


def test_limits_of_a_key(secured, keys):
    cut = complete(secured, keys["limited"], "a", max_tokens=21, ignore_eos=True).json()
    assert cut["usage"]["completion_tokens"] == 20 == cut_of(secured, keys["limited"])
    assert complete(secured, keys["limited"], "a", priority=1).json()["error"]["param"] == "priority"
    statuses = [complete(secured, keys["slow"], "a").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = complete(secured, keys["slow"], "a")
    assert int(refused.headers["retry-after"]) > 10
    assert complete(secured, keys["few"], "a", prompt=LONG).status_code == 200
    assert complete(secured, keys["few"], "a").status_code == 429
    for _ in range(5):  # reading counts against nothing
        assert secured.http(keys["few"]).get("/v1/models").status_code == 200
        assert secured.http(keys["slow"]).get("/v1/adapters").status_code == 200
    assert secured.http(keys["slow"]).post("/tokenize", json={"prompt": "x"}).status_code == 429


def new_key(secured: Running, keys: dict[str, str], **limits: int):
    """A key that the server has read, and its record."""
    key, record = KeyFile(keys[""]).create(**limits)
    secured.server.state.keys.records()
    return key, record


def leave_while_it_runs(secured: Running, key: str, body: dict[str, object]) -> None:
    """Close the connection of a request of which some tokens are made, and told."""
    engine = secured.server.state.engine
    num_before = engine.stats().counts.num_new_tokens
    client = http.client.HTTPConnection(*secured.url.removeprefix("http://").split(":"))
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    client.request("POST", "/v1/completions", json.dumps(body), headers)
    deadline = time.monotonic() + 60
    while engine.stats().counts.num_new_tokens < num_before + 20 and time.monotonic() < deadline:
        time.sleep(0.0005)
    client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_paid_by_those_who_leave(secured, keys, stream):
    key, record = new_key(secured, keys, tokens_per_minute=30)
    with contextlib.suppress(httpx.TimeoutException):
        body = {"model": "a", "prompt": "x" * 20, "max_tokens": 100, "ignore_eos": True, "stream": stream}
        with httpx.Client(base_url=secured.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                leave_while_it_runs(secured, key, body)
    wait_until_idle(secured)
    level = secured.server.state.usages.of(record)._tokens._level
    assert level < 10, "neither the prompt nor what was made is paid"


def test_key_pays_for_each_token_once(secured, keys, monkeypatch):
    key, record = new_key(secured, keys, tokens_per_minute=1000)
    bucket, paid = secured.server.state.usages.of(record)._tokens, []
    monkeypatch.setattr(bucket, "spend", paid.append)
    for stream in (False, True):
        for n in (1, 2):
            paid.clear()
            answer = complete(secured, key, "a", prompt="x" * 20, max_tokens=10, ignore_eos=True, n=n, stream=stream)
            assert answer.status_code == 200
            wait_until_idle(secured)
            assert sum(paid) == 20 + 10 * n, (stream, n)


def test_concurrent_requests_of_a_key(secured, keys):
    body = {"model": "a", "prompt": "x", "max_tokens": 20, "stream": True}
    with secured.http(keys["limited"]).stream("POST", "/v1/completions", json=body) as first:
        second = complete(secured, keys["limited"], "a")
        assert second.status_code == 429 or "[DONE]" in first.read().decode()
    wait_until_idle(secured)
    assert complete(secured, keys["limited"], "a").status_code == 200


def test_key_loads_only_names_of_its_patterns(secured, keys, root):
    http = secured.http(keys["a"])
    for name in ("b", "new", "team-b/x"):  # one is loaded, the others are not: the answers are the same
        assert http.post("/v1/adapters", json={"name": name, "path": "a"}).status_code == 403
        assert http.delete(f"/v1/adapters/{name}").status_code == 403
        assert http.patch(f"/v1/adapters/{name}", json={"pinned": True}).status_code == 403
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 403
    assert http.post("/v1/adapters", json={"name": "team-a/x", "path": "a"}).status_code == 200
    assert http.delete("/v1/adapters/team-a/x").json() == {"name": "team-a/x", "deleted": True}
    experts = {"mixed": {"b": None, "a": None}}
    answer = http.post(
        "/v1/adapters", json={"name": "team-a/m", "path": "a", "kind": "mixture", "experts": experts["mixed"]}
    )
    assert answer.status_code == 404, "another tenant's adapter became an expert"


def test_paths_stay_below_the_roots(secured, keys, root, tmp_path):
    outside = shutil.copytree(root / "a", tmp_path / "outside")
    (root / "link").symlink_to(outside)
    inner = shutil.copytree(root / "a", root / "inner")
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    http = secured.http(keys["manager"])
    relative = os.path.relpath(outside, root)
    forbidden = [str(outside), relative, "../a", f"{root}/../{root.name}/a", "link", "inner", "/etc", "/no/such", "."]
    for path in forbidden:
        answer = http.post("/v1/adapters", json={"name": "x", "path": path})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed"), path
    assert http.post("/v1/adapters", json={"name": "x", "path": "missing"}).status_code == 404
    assert http.post("/v1/adapters", json={"name": "x", "path": "owner/name"}).status_code == 404  # no download
    assert http.post("/v1/adapters", json={"name": "x", "path": "a\0"}).status_code == 400
    (root / "link").unlink()
    shutil.rmtree(inner)


def test_key_loads_only_from_its_own_roots(secured, keys, root, tmp_path):
    for folder in ("team-a/own", "team-b/theirs", "team-a2/near"):
        shutil.copytree(root / "a", root / folder)
    (root / "team-a" / "link").symlink_to(root / "team-b" / "theirs")
    inner = shutil.copytree(root / "a", root / "team-a" / "inner")
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.safetensors").symlink_to(root / "team-b" / "theirs" / "adapter_model.safetensors")
    http = secured.http(keys["of-team-a"])
    absolute = str(root / "team-b" / "theirs")
    for path in (
        "a",
        "team-b/theirs",
        "theirs",
        "../team-b/theirs",
        absolute,
        "team-a2/near",
        "link",
        "inner",
        "no/such",
    ):
        answer = http.post("/v1/adapters", json={"name": "team-a/x", "path": path})
        assert answer.status_code in (403, 404), path
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "team-a/x", "lora_path": path}).is_error
    for path in ("own", "team-a/own", str(root / "team-a" / "own")):
        assert http.post("/v1/adapters", json={"name": "team-a/x", "path": path}).status_code == 200, path
        assert http.put("/v1/adapters/team-a/x", json={"path": absolute}).status_code == 403
        assert http.delete("/v1/adapters/team-a/x").status_code == 200
    experts = {"name": "team-a/m", "path": "own", "kind": "mixture", "experts": {"team-a/e": absolute}}
    assert http.post("/v1/adapters", json=experts).status_code == 403
    for folder in ("team-a", "team-b", "team-a2"):
        shutil.rmtree(root / folder)


def test_root_of_a_key_that_leads_out_of_the_servers_roots_opens_nothing(root, tmp_path):
    outside = shutil.copytree(root / "a", tmp_path / "elsewhere" / "a").parent
    (root / "way-out").symlink_to(outside)
    roots = AdapterRoots([root])
    for named in (str(outside), "way-out", "/"):
        with pytest.raises(ApiError) as refused:
            roots.within((named,)).folder(str(outside / "a"))
        assert refused.value.status.number == 403
    (root / "way-out").unlink()


def test_only_safetensors_are_read_and_messages_hide_the_root(secured, keys, root):
    pickled = shutil.copytree(root / "a", root / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    answer = secured.http(keys["manager"]).post("/v1/adapters", json={"name": "x", "path": "pickled"})
    shutil.rmtree(pickled)
    assert answer.status_code == 400
    assert "safetensors" in answer.json()["error"]["message"]
    assert str(root) not in answer.text


def test_mixture_that_names_experts_elsewhere_is_refused(secured, keys, root, tmp_path):
    shutil.copytree(root / "a", tmp_path / "a")
    secured.model.save_mixture("mix-ab", root / "mixture", layout="peft")
    config = root / "mixture" / "adapter_config.json"
    config_json = json.loads(config.read_text())
    for number in ("0", "1"):
        shutil.rmtree(root / "mixture" / number)
    config_json["adapters"] = {"0": str(tmp_path / "a"), "1": str(tmp_path / "a")}
    config.write_text(json.dumps(config_json))
    answer = secured.http(keys["manager"]).post("/v1/adapters", json={"name": "m", "path": "mixture"})
    shutil.rmtree(root / "mixture")
    assert answer.status_code == 403, answer.text


def test_bodies_that_are_too_large_are_refused_before_they_are_whole(root):
    def endless() -> Iterator[bytes]:
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(10_000):
            yield b"x" * 10_000

    config = settings(limits=RequestLimits(max_body_bytes=20_000, body_timeout_s=1))
    with running(make_model(root), config) as server, server.http() as http:
        declared = http.post("/v1/completions", content=b"x" * 20_001)
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "body_too_large")
        with contextlib.suppress(httpx.TransportError):  # closed while it was still sending
            assert http.post("/v1/completions", content=endless()).status_code == 413
        assert http.get("/health").status_code == 200


def test_logs_have_ids_and_neither_keys_nor_prompts(secured, keys):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("loraplex")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    try:
        answer = complete(secured, keys["a"], "a", prompt="very secret prompt")
        complete(secured, keys["a"], "a", prompt="very secret prompt", temperature="secret value")
        complete(secured, "lpx_11111111_wrongsecret", "a", prompt="very secret prompt")
        time.sleep(0.2)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]
    assert (line["status"], line["model"], line["new_tokens"]) == (200, "a", 2)
    assert line["key"] == keys["a"].split("_")[1]
    for secret in ("secret", keys["a"], keys["a"].split("_", 2)[2]):
        assert secret not in stream.getvalue()


def test_revoked_keys_end_without_a_restart(secured, keys):
    file = KeyFile(keys[""])
    key, record = file.create(note="short-lived")
    time.sleep(1.2)
    assert complete(secured, key, "a").status_code == 200
    file.revoke(record.id)
    time.sleep(1.2)
    assert complete(secured, key, "a").status_code == 401


def test_keys_are_hashed_at_rest(keys):
    text = Path(keys[""]).read_text()
    assert not any(key.split("_", 2)[2] in text for name, key in keys.items() if name)
    assert Path(keys[""]).stat().st_mode & 0o077 == 0
    records = KeyFile(keys[""]).records()
    assert len({record.salt for record in records}) == len(records)


def test_open_server_must_be_local_or_meant():
    with pytest.raises(ConfigError, match="anyone could use"):
        ServeConfig(network=NetworkSettings(host="0.0.0.0"))
    ServeConfig(network=NetworkSettings(host="0.0.0.0"), access=AccessSettings(allow_anonymous=True))


def test_without_roots_nothing_is_loaded_over_http(root):
    with running(make_model(root), settings()) as server:
        answer = server.http().post("/v1/adapters", json={"name": "x", "path": str(root / "a")})
    assert answer.status_code == 403
