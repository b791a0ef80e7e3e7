"""A watched folder with something wrong in it: the server tells, and serves on."""

from dataclasses import replace
from pathlib import Path

from loraplex import MultiLoraModel
from loraplex.server.settings import ModelSettings
from tests.server.tiny_server import character_tokenizer, running, settings, write_adapters
from tests.tiny_models import tiny_model


def test_health_and_metrics_tell_what_could_not_be_loaded(tmp_path: Path) -> None:
    root = write_adapters(tmp_path)
    (root / "a" / "adapter_model.safetensors").write_bytes(b"half")
    model = MultiLoraModel(tiny_model("llama"))
    model.__dict__["tokenizer"] = character_tokenizer()
    config = replace(settings(), model=ModelSettings(served_name="tiny", watch=str(root)))
    with running(model, config) as server, server.http() as http:
        assert http.get("/health").json() == {"status": "ok", "watch": {"failing": False, "not_loaded": 1}}
        metrics = http.get("/metrics").text
        assert "loraplex_watched_not_loaded 1.0" in metrics
        assert "loraplex_watch_failing 0.0" in metrics
        assert model.names() == ["b", "c"]
