"""Model cards, and the upload to a server that speaks the hub's HTTP API."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from loraplex.errors import ConfigError, RemoteError
from loraplex.training import TrainConfig, train_adapters
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer


class Hub:
    """A server with the calls that an upload of small files takes; it keeps what is committed."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = hub.answer(self.path, body, self.headers.get("Authorization", ""))
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes, authorization: str) -> tuple[int, Any]:
        if authorization != "Bearer hf_test":
            return 401, {"error": "who are you?"}
        if path.endswith("/repos/create"):
            asked = json.loads(body)
            repo = f"{asked.get('organization')}/{asked['name']}"
            self.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{repo}"}
        repo = path.removeprefix("/api/models/").split("/preupload")[0].split("/commit")[0]
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": file["path"]} | told for file in files]}
        if "/commit/" in path and not self.refuses:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.files[repo] = {name: base64.b64decode(content) for name, content in files.items()}
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        return (403, {"error": "not yours"}) if self.refuses else (200, {"id": repo, "siblings": []})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub
    hub.close()


def test_a_card_tells_data_settings_and_scores(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "team-a", max_steps=10, keep_best=True, best_by="exact_match")
    config = TrainConfig(output=tmp_path / "out", plots=False)
    (result,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    card = ModelCard.load(result.folder / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    scores = {found.metric_type: found.metric_value for found in card.data.eval_results or []}
    best = result.eval_steps.index(result.best_step or 0)
    assert scores["loss"] == pytest.approx(result.eval_losses[best])
    assert scores["exact_match"] == result.eval_exact[best]
    assert str(tmp_path) not in card.content
    for told in ("team-a.jsonl, 22 trained on", "| batch_size | 4 |", "| r | 4 |", f"{result.num_tokens:,}"):
        assert told in card.content, told


def test_each_lora_of_a_run_becomes_a_repository_with_its_card(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "team").mkdir()
    jobs = [tiny_job(tmp_path, "team/a", max_steps=2), tiny_job(tmp_path, "b", max_steps=2)]
    config = TrainConfig(output=tmp_path / "out", plots=False, push_to_hub="someone", push_private=True)
    results = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs, config=config)
    assert hub.private == {"someone/team-a": True, "someone/b": True}
    for repo, result in zip(("someone/team-a", "someone/b"), results, strict=True):
        found = hub.files[repo]
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "loraplex.json"} <= found.keys()
        for name, content in found.items():
            assert content == (result.folder / name).read_bytes(), name


def test_what_the_hub_refuses_is_told_after_all_is_written(tmp_path: Path, hub: Hub) -> None:
    hub.refuses = True
    config = TrainConfig(output=tmp_path / "out", plots=False, push_to_hub="someone")
    with pytest.raises(RemoteError, match=r"(?s)the hub did not take .*loraplex push .*out/a someone/a"):
        train_adapters(
            tiny_model("llama"), tiny_tokenizer(), jobs=[tiny_job(tmp_path, "a", max_steps=1)], config=config
        )
    assert (tmp_path / "out" / "a" / "adapter_model.safetensors").is_file()


def test_token_and_names_are_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    job = tiny_job(tmp_path, "a")
    for namespace, said in (("no one", "can't be a repository of the hub"), ("someone", "there is no token")):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        config = TrainConfig(output=tmp_path / "out", plots=False, push_to_hub=namespace)
        with pytest.raises(ConfigError, match=said):
            train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    assert not (tmp_path / "out").exists()
