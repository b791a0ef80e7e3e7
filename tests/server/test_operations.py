"""What operators see: metrics in both forms, the line of a server that is ready, ports, paths, and plain endpoints."""

import io
import json
import logging
import os
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as prometheus_families

import loraplex
from loraplex import Engine, MultiLoraModel, Request, SamplingParams, StoreConfig
from loraplex.errors import ConfigError
from loraplex.server import lifecycle
from loraplex.server.api.api_errors import ApiError
from loraplex.server.auth.path_sandbox import AdapterRoots, found_path
from loraplex.server.listening import check_address, url_of
from loraplex.server.logs import JsonFormatter
from loraplex.server.settings import AccessSettings, ModelSettings, NetworkSettings, ServeConfig
from tests.server.tiny_server import ENGINE, Running, make_model, running, settings
from tests.tiny_models import tiny_model

BODY = {"model": "a", "prompt": "The protein", "max_tokens": 5, "temperature": 0}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def families(server: Running, accept: str | None) -> dict:
    headers = {} if accept is None else {"accept": accept}
    answer = server.http().get("/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("text/plain" if accept is None else "application/openmetrics-text")
    parse = prometheus_families if accept is None else text_string_to_metric_families
    return {family.name: family for family in parse(answer.text)}


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_metrics_come_in_both_forms(server, accept):
    before = families(server, accept)["loraplex_inter_token_seconds"]
    server.http().post("/v1/completions", json=BODY | {"ignore_eos": True})
    found = families(server, accept)
    samples = {name: {sample.name: sample for sample in family.samples} for name, family in found.items()}

    def number(family, suffix: str) -> float:
        return next(sample.value for sample in family.samples if sample.name.endswith(suffix))

    tokens = found["loraplex_inter_token_seconds"]
    assert number(tokens, "_count") - number(before, "_count") == 4  # between five tokens
    assert number(tokens, "_sum") > number(before, "_sum")
    buckets = [sample.value for sample in tokens.samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert number(found["loraplex_queue_seconds"], "_count") >= 1
    for name in ("disk_reads", "host_evictions", "slot_loads", "slot_evictions"):
        assert f"loraplex_adapter_{name}" in found
    assert number(found["loraplex_adapter_slot_loads"], "_total") >= 1
    build = samples["loraplex_build"]["loraplex_build_info"] if accept else found["loraplex_build_info"].samples[0]
    assert build.labels["version"] == loraplex.__version__


def test_store_counts_loads_and_evictions(root):
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(num_slots=1))
    for name in "ab":
        model.load_adapter(name, root / name)
    with Engine(model, ENGINE) as engine:
        for name in "abab":
            engine.generate([Request([5, 6], adapters=name, sampling=SamplingParams(max_tokens=2))])
    counts = model.store.counts()
    assert (counts.num_slot_loads, counts.num_slot_evictions) == (4, 3)
    assert (counts.num_disk_reads, counts.num_host_evictions) == (0, 0)
    num_bytes = max(state.num_bytes for state in model.adapters())
    small = MultiLoraModel(tiny_model("llama"), store=StoreConfig(num_slots=1, host_bytes=num_bytes))
    for name in "ab":
        small.load_adapter(name, root / name)
    with Engine(small, ENGINE) as engine:
        for name in "abab":
            engine.generate([Request([5, 6], adapters=name, sampling=SamplingParams(max_tokens=2))])
    counts = small.store.counts()
    assert counts.num_disk_reads == 4  # "a" left when "b" was loaded
    assert counts.num_host_evictions == 5


def test_results_tell_how_long_requests_waited(root):
    with Engine(make_model(root), ENGINE) as engine:
        results = engine.generate([Request([5, 6], sampling=SamplingParams(max_tokens=20)) for _ in range(30)])
    waits = [result.queue_s for result in results]
    assert min(waits) >= 0
    assert max(waits) > 3 * min(waits)  # eight run at once


def test_the_ready_line_names_model_adapters_and_url(root):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("loraplex.server.lifecycle")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        with running(make_model(root), settings()) as server:
            lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (ready,) = [line for line in lines if line["message"] == "ready"]
    assert ready["url"] == server.url
    assert ready["model"] == "tiny"
    assert {"a", "b", "c", "mix-ab"} <= set(ready["adapters"])


def test_a_taken_port_is_told_before_the_model_loads(monkeypatch, root):
    monkeypatch.setattr(lifecycle, "load_model", lambda config: pytest.fail("the model was loaded"))
    monkeypatch.setattr(lifecycle, "set_up_logs", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .* in use"):
            lifecycle.run(ServeConfig(network=NetworkSettings(port=port)))
    check_address(NetworkSettings(port=port))  # free again, and left so
    check_address(NetworkSettings(port=0))
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid"):
        check_address(NetworkSettings(host="no-such-host.invalid", port=port))


def test_urls_are_what_a_client_can_use():
    assert url_of(NetworkSettings(host="0.0.0.0"), 80) == "http://127.0.0.1:80"
    assert url_of(NetworkSettings(host="::1"), 81) == "http://[::1]:81"


def test_paths_of_adapters_mean_the_same_in_settings_and_requests(root, tmp_path, monkeypatch):
    """A root's folder first, then the working directory's; over HTTP only what is in a root."""
    monkeypatch.chdir(root.parent)
    roots = AdapterRoots([root])
    for path in ("a", f"{root.name}/a", str(root / "a")):
        assert roots.folder(path) == (root / "a").resolve()
        assert Path(os.path.realpath(found_path(path, [root]))) == (root / "a").resolve()
    assert found_path("a", []) == "a"
    (tmp_path / root.name / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # where the same name leads elsewhere
    assert roots.folder("a") == (root / "a").resolve()
    with pytest.raises(ApiError, match=r"no folder|not below"):
        roots.folder(f"{root.name}/a")


def test_settings_load_adapters_from_the_roots(root, monkeypatch, smollm2):
    seen = {}

    class Model:
        def load_adapter(self, name, folder):
            seen[name] = folder

    monkeypatch.setattr(lifecycle.MultiLoraModel, "from_pretrained", lambda *_, **__: Model())
    access = AccessSettings(adapter_roots=(str(root),))
    lifecycle.load_model(ServeConfig(model=ModelSettings(adapters={"x": "a"}), access=access))
    assert seen == {"x": str(root / "a")}


def test_plain_endpoints(server):
    http = server.http()
    assert http.get("/version").json() == {"version": loraplex.__version__}
    assert http.get("/ping").json() == http.get("/health").json() == {"status": "ok"}
    for path in ("/health", "/ping"):
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert http.get("/load").json() == {"server_load": 0, "running": 0, "waiting": 0}
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", server.server.port)) as half:  # whose body doesn't come
        half.sendall(head)
        deadline = time.monotonic() + 60
        while (told := http.get("/load").json())["server_load"] != 1:
            assert time.monotonic() < deadline, told
            time.sleep(0.02)


def test_links_are_models_too(server):
    http = server.http()
    for path in ("a:0.7+b:0.3", "a%3A0.7%2Bb%3A0.3"):
        told = http.get(f"/v1/models/{path}").json()
        assert (told["id"], told["kind"], told["adapters"]) == ("a:0.7+b:0.3", "link", ["a", "b"])
    assert http.get("/v1/models/a+unknown").status_code == 404
    assert http.get("/v1/models/a:nan").status_code == 400
    assert server.client().models.retrieve("a:0.7+b:0.3").id == "a:0.7+b:0.3"


def test_the_page_of_calls_names_them_all_and_runs_nothing(server):
    answer = server.http().get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "script" not in answer.headers["content-security-policy"]
    schema = server.http().get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in answer.text
    assert "<script" not in answer.text
    assert "https://" not in answer.text
    assert server.http().get("/page/docs.css").status_code == 200


def test_keys_guard_what_tells_names(root, tmp_path):
    from loraplex.server.auth.keys import KeyFile

    keys = KeyFile(tmp_path / "keys.json")
    key, _ = keys.create(use=("a",))
    manager, _ = keys.create(manage=True)
    with running(make_model(root), settings(keys=keys)) as server:
        for path in ("/health", "/ping", "/version", "/docs", "/openapi.json"):
            assert server.http().get(path).status_code == 200, path
        for path in ("/load", "/info", "/v1/models/a"):
            assert server.http().get(path).status_code == 401, path
        assert server.http(key).get("/load").status_code == 403
        assert server.http(manager).get("/load").status_code == 200
        assert server.http(key).get("/v1/models/a+b").status_code == 404
        assert server.http(key).get("/v1/models/a:0.5").status_code == 200
        for path, body in (
            ("/v1/embeddings", {"model": "b", "input": "x"}),
            ("/v1/score", {"model": "b", "text_1": "x", "text_2": "y"}),
            ("/generate", {"inputs": "x", "parameters": {"adapter_id": "b"}}),
            ("/", {"inputs": "x", "parameters": {"adapter_id": "b"}}),
        ):
            assert server.http(key).post(path, json=body).status_code == 404, path
            assert server.http().post(path, json=body).status_code == 401, path
