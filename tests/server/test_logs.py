"""Logs: one format, who did what, and neither secrets nor prompts."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.server.auth.keys import KeyFile

REPOSITORY = Path(__file__).parents[2]
SECRET = "xyzzy-plugh"  # of every prompt, message, schema, stop string and header here
BODY = {"model": "a", "prompt": f"{SECRET} x", "max_tokens": 30, "ignore_eos": True, "temperature": 0}


class Logged:
    """What a server wrote, and the requests that made it write."""

    def __init__(self, text: str, ids: dict[str, str], key: str, manager: str) -> None:
        self.text = text
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        self.ids = ids
        self.key, self.manager = key, manager

    def request(self, name: str) -> dict[str, Any]:
        (line,) = [
            line for line in self.lines if line["message"] == "request" and line.get("request_id") == self.ids[name]
        ]
        return line


@pytest.fixture(scope="module")
def logged(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    key, _ = file.create(note="user", use=("a", "b"))
    manager, _ = file.create(note="manager", manage=True)
    command = [sys.executable, "-m", "tests.server.serve_tiny", str(root), "5", str(file.path)]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(process.stdout.readline())
        ids = use(f"http://127.0.0.1:{port}", port, key, manager)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    return Logged(text, ids, key, manager)


def use(url: str, port: int, key: str, manager: str) -> dict[str, str]:
    """Requests of all kinds; their ids by a name."""
    ids: dict[str, str] = {}
    http = httpx.Client(base_url=url, timeout=60)
    refused: dict[str, tuple[str, dict[str, Any]]] = {
        "unknown field": ("/v1/completions", BODY | {"unheard_of": SECRET}),
        "wrong type": ("/v1/completions", BODY | {"temperature": SECRET}),
        "unknown model": ("/v1/completions", BODY | {"model": "nothing"}),
        "not there": ("/v1/completions", BODY | {"steer": [{"text": SECRET + "?", "strength": 2}]}),
        "schema": ("/v1/completions", BODY | {"response_format": schema({"type": SECRET})}),
        "bias": ("/v1/completions", BODY | {"logit_bias": {SECRET: 1}}),
        "many answers": ("/v1/completions", BODY | {"n": 10**6}),
        "long": ("/v1/completions", BODY | {"prompt": SECRET * 1000}),
        "control": ("/v1/chat/completions", chat(SECRET + "<|im_end|>") | {"n": 10**6}),
        "load": ("/v1/adapters", {"name": "x", "path": "nowhere"}),
    }

    def send(name: str, path: str, body: Any, key: str = key, method: str = "POST") -> httpx.Response:
        ids[name] = f"id-{len(ids)}"
        headers = {"authorization": f"Bearer {key}", "x-request-id": ids[name]}
        return http.request(method, path, json=body, headers=headers)

    assert send("good", "/v1/completions", BODY | {"max_tokens": 2}).status_code == 200
    assert send("stop", "/v1/completions", BODY | {"max_tokens": 2, "stop": SECRET, "user": SECRET}).status_code == 200
    assert send("chat", "/v1/chat/completions", chat(SECRET)).status_code == 200
    for name, (path, body) in refused.items():
        assert send(name, path, body).is_client_error, name
    assert send("wrong key", "/v1/completions", BODY, key=f"lpx_00000000_{SECRET}").status_code == 401
    assert send("loaded", "/v1/adapters", {"name": "new", "path": "c"}, key=manager).status_code == 200
    assert send("replaced", "/v1/adapters/new", {"path": "b"}, key=manager, method="PUT").status_code == 200
    assert send("unloaded", "/v1/adapters/new", None, key=manager, method="DELETE").status_code == 200
    for name, stream in (("left stream", True), ("left", False)):
        ids[name] = f"id-{len(ids)}"
        headers = {"authorization": f"Bearer {key}", "x-request-id": ids[name]}
        asked = httpx.stream(
            "POST", f"{url}/v1/completions", json=BODY | {"stream": stream}, headers=headers, timeout=0.5
        )
        with contextlib.suppress(httpx.TimeoutException), asked as answer:
            next(answer.iter_lines())
    for sent in (b"nonsense\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
            time.sleep(0.2)
    http.close()
    time.sleep(1)
    return ids


def schema(content: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": content}}


def chat(content: str) -> dict[str, Any]:
    return {"model": "a", "messages": [{"role": "user", "content": content}], "max_tokens": 2}


def test_every_line_is_json_of_one_form(logged: Logged) -> None:
    assert all({"time", "level", "logger", "message"} <= set(line) for line in logged.lines)
    assert any(line["logger"].startswith("uvicorn") for line in logged.lines), "the web server's lines are missing"


def test_neither_secrets_nor_prompts_are_logged(logged: Logged) -> None:
    for secret in (SECRET, logged.key, logged.manager, logged.key.split("_", 2)[2]):
        assert secret not in logged.text


@pytest.mark.parametrize(
    ("name", "code", "param", "told"),
    [
        ("unknown field", "unsupported_parameter", "unheard_of", "is not supported here"),
        ("wrong type", "invalid_request", "temperature", "valid number"),
        ("unknown model", "model_not_found", "model", "does not exist"),
        ("not there", "invalid_request", "steer.0", "quotes the request"),
        ("schema", "invalid_request", None, "quotes the request"),
        ("bias", "invalid_request", "logit_bias", "token ids"),
        ("many answers", "too_large", "n", "n=1000000"),
        ("long", "invalid_request", "prompt", "tokens"),
        ("load", "not_allowed", "name", "may not load"),
        ("wrong key", "invalid_api_key", None, "valid API key"),
    ],
)
def test_refusals_tell_their_code_parameter_and_message(
    logged: Logged, name: str, code: str, param: str | None, told: str
) -> None:
    line = logged.request(name)
    assert (line["code"], line.get("param")) == (code, param)
    assert told in line["error"]


def test_good_requests_tell_no_error(logged: Logged) -> None:
    for name in ("good", "stop", "chat"):
        line = logged.request(name)
        assert line["status"] == 200
        assert line["new_tokens"] == 2
        assert line["key"] == logged.key.split("_")[1]
        assert "error" not in line


def test_changes_tell_name_key_and_version(logged: Logged) -> None:
    changes = [line for line in logged.lines if line.get("adapter") == "new"]
    assert [line["message"] for line in changes] == ["loaded", "replaced", "unloaded"]
    assert {line["key"] for line in changes} == {logged.manager.split("_")[1]}
    assert [line["request_id"] for line in changes] == [logged.ids[line["message"]] for line in changes]
    first, second, last = (line["versions"]["new"] for line in changes)
    assert first < second == last


def test_a_client_that_leaves_is_a_line_and_no_traceback(logged: Logged) -> None:
    for name in ("left stream", "left"):
        assert logged.request(name)["ended"] == "disconnected"
    assert not any("traceback" in line for line in logged.lines)
    assert "Traceback" not in logged.text
    (told,) = [line for line in logged.lines if "response_format can't be used" in line["message"]]
    assert told["level"] == "warning", "it is told at the start that the grammars can't read this tokenizer"
    assert not any(line["level"] in ("error", "critical") for line in logged.lines)
