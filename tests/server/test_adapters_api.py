"""Loading, replacing, pinning and unloading while requests run."""

import shutil

import httpx
import pytest
import torch

from loraplex.residual.format import write_residual
from loraplex.residual.modules import SteeringVector
from loraplex.residual.other_formats.control_vector import write_control_vector
from tests.tiny_models import HIDDEN_SIZE, linear_targets, random_peft_adapter, tiny_model


def answer(http: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "The protein", "max_tokens": 8, "temperature": 0}
    got = http.post("/v1/completions", json=body)
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["text"]


def test_an_adapters_life(server, root):
    with server.http() as http:
        loaded = http.post("/v1/adapters", json={"name": "team/x", "path": "a", "pinned": True}).json()
        assert (loaded["version"], loaded["tier"], loaded["pinned"], loaded["kind"]) == (1, "slot", True, "adapter")
        assert loaded["in_use"] == 0
        assert answer(http, "team/x") == answer(http, "a")
        assert http.post("/v1/adapters", json={"name": "team/x", "path": "a"}).status_code == 409
        replaced = http.put("/v1/adapters/team/x", json={"path": str(root / "b")}).json()
        assert replaced["version"] == 2
        assert answer(http, "team/x") == answer(http, "b")
        assert http.patch("/v1/adapters/team/x", json={"pinned": False}).json()["pinned"] is False
        assert http.delete("/v1/adapters/team/x").json() == {"name": "team/x", "deleted": True}
        assert http.delete("/v1/adapters/team/x").status_code == 404
        assert http.put("/v1/adapters/team/x", json={"path": "a"}).status_code == 404


def test_a_mixtures_life(server, root):
    server.model.save_mixture("mix-ab", root / "saved", layout="peft")
    try:
        with server.http() as http:
            loaded = http.post("/v1/adapters", json={"name": "science", "path": "saved"}).json()
            assert (loaded["kind"], loaded["experts"]) == ("mixture", ["science/a", "science/b"])
            assert answer(http, "science") == answer(http, "mix-ab")
            assert http.delete("/v1/adapters/science/a").status_code == 409
            assert http.put("/v1/adapters/science", json={"path": "saved"}).status_code == 400
            assert http.patch("/v1/adapters/science", json={"pinned": True}).json()["pinned"] is True
            assert http.delete("/v1/adapters/science").status_code == 200
            given = {"name": "other", "path": "saved", "experts": {"b": None, "a": None}}
            assert http.post("/v1/adapters", json=given).json()["experts"] == ["b", "a"]
            assert http.delete("/v1/adapters/other").status_code == 200
            assert "science/a" not in {entry["name"] for entry in http.get("/v1/adapters").json()["data"]}
    finally:
        shutil.rmtree(root / "saved")


def test_a_residuals_life(server, root):
    base = server.model.registry.linked.layers.identity
    vectors = {1: torch.full((HIDDEN_SIZE,), 3.0)}
    write_residual(SteeringVector(vectors=vectors, base=base), root / "vector")
    try:
        with server.http() as http:
            assert http.post("/v1/adapters", json={"name": "v", "path": "vector"}).json()["kind"] == "residual"
            assert answer(http, "a+v") != answer(http, "a")
            assert http.patch("/v1/adapters/v", json={"pinned": True}).status_code == 400
            assert http.put("/v1/adapters/v", json={"path": "vector"}).status_code == 200
            assert http.delete("/v1/adapters/v").status_code == 200
    finally:
        shutil.rmtree(root / "vector")


def test_a_control_vector_in_gguf(server, root, tmp_path):
    """Loaded by the file, with layers and strength of each request; what is no GGUF stays out of reach."""
    pytest.importorskip("gguf")
    vectors = {1: torch.full((HIDDEN_SIZE,), 3.0)}
    vector = SteeringVector(vectors=vectors, base=None, site="block")
    write_control_vector(vector, root / "calm.gguf", "llama")
    outside = tmp_path / "calm.gguf"
    shutil.copy(root / "calm.gguf", outside)
    (root / "note.txt").write_text("no vector")
    try:
        with server.http() as http:
            assert http.post("/v1/adapters", json={"name": "g", "path": "calm.gguf"}).json()["kind"] == "residual"
            for path, status in ((str(outside), 403), ("note.txt", 404), ("../calm.gguf", 403), ("none.gguf", 404)):
                assert http.post("/v1/adapters", json={"name": "h", "path": path}).status_code == status, path
            body = {"model": "g:2", "prompt": "The protein", "max_tokens": 8, "temperature": 0}
            plain = answer(http, "tiny")
            assert answer(http, "g:2") != plain
            assert answer(http, "g:0") == plain
            whole = http.post("/v1/completions", json=body | {"residual_layers": {"g": [1]}}).json()
            assert whole["choices"][0]["text"] == answer(http, "g:2")
            for layers in ({"g": [0]}, {"a": [1]}, {"g": []}, {"g": "1"}):
                assert http.post("/v1/completions", json=body | {"residual_layers": layers}).status_code == 400, layers
            assert http.put("/v1/adapters/g", json={"path": "calm.gguf"}).status_code == 200
            assert http.delete("/v1/adapters/g").status_code == 200
    finally:
        (root / "calm.gguf").unlink()
        (root / "note.txt").unlink()


def test_vllms_calls(server):
    with server.http() as http:
        body = {"lora_name": "moved", "lora_path": "a"}
        loaded = http.post("/v1/load_lora_adapter", json=body)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'moved' added successfully.")
        again = http.post("/v1/load_lora_adapter", json=body)
        assert (again.status_code, again.json()["error"]["message"]) == (
            400,
            "The lora adapter 'moved' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True.",
        )
        for options in ({"load_inplace": True}, {"load_inplace": True, "is_3d_lora_weight": False}):
            assert http.post("/v1/load_lora_adapter", json=body | options).status_code == 200
        for wrong in ({"lora_name": ""}, {"lora_path": ""}, {"load_inplace": "yes"}, {"is_3d_lora_weight": True}):
            assert http.post("/v1/load_lora_adapter", json=body | wrong).status_code == 400
        base = http.post("/v1/load_lora_adapter", json=body | {"lora_name": "tiny"})
        assert (base.status_code, base.json()["error"]["message"]) == (
            400,
            "The lora adapter 'tiny' conflicts with a served base model.",
        )
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "y", "lora_path": "none"}).status_code == 404
        gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "moved", "lora_int_id": None})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'moved' removed successfully.")
        missing = http.post("/v1/unload_lora_adapter", json={"lora_name": "moved"})
        assert (missing.status_code, missing.json()["error"]["message"]) == (
            404,
            "The lora adapter 'moved' cannot be found.",
        )
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": ""}).status_code == 400


@pytest.mark.parametrize("name", ["x:1", "a+b", "ä", "x" * 129, "tiny"])
def test_names_that_cannot_be(server, name):
    status = server.http().post("/v1/adapters", json={"name": name, "path": "a"}).status_code
    assert status == (409 if name == "tiny" else 400)


def test_damaged_adapters_leave_what_is_loaded(server, root, tmp_path):
    folder = random_peft_adapter(tiny_model("llama"), root / "damaged", targets=linear_targets("llama"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with server.http() as http:
        before = answer(http, "a")
        assert http.put("/v1/adapters/a", json={"path": "damaged"}).status_code == 400
        assert answer(http, "a") == before
    shutil.rmtree(folder)
