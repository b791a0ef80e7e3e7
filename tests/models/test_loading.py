"""Loading base models from folders: the class, the dtype, the frozen state, and every way it can fail."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    LlamaForSequenceClassification,
)
from transformers.models.auto import auto_factory

from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.errors import BaseModelError, ConfigError
from loraplex.models.checkpoints.loading import auto_class_for, load_base_model, load_tokenizer, parse_device
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training import TrainConfig, train_adapters
from tests.architectures.variants import make_model
from tests.tiny_models import TINY_MODELS, random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_loads_as_the_class_it_was_saved_as(name: str, tmp_path: Path) -> None:
    saved = tiny_model(name)
    saved.save_pretrained(tmp_path / name)
    loaded, source = load_base_model(tmp_path / name)
    inputs = {"decoder_input_ids": IDS} if name == "t5" else {}
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS, **inputs).logits, saved(IDS, **inputs).logits)
    assert type(loaded) is type(saved)
    assert source == str(tmp_path / name)


def test_bare_encoder_loads_without_a_head(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path)
    assert type(load_base_model(tmp_path)[0]) is BertModel


def test_bare_tied_decoder_loads_with_its_language_head(tmp_path: Path) -> None:
    saved = tiny_model("qwen2")
    saved.model.save_pretrained(tmp_path)
    loaded, _ = load_base_model(tmp_path)
    assert type(loaded) is type(saved)
    torch.testing.assert_close(loaded(IDS).logits, saved(IDS).logits)


def test_model_is_frozen_and_in_evaluation_mode(llama_folder: Path) -> None:
    model, _ = load_base_model(llama_folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_taken_by_name_or_as_torch_dtype(llama_folder: Path, dtype: str | torch.dtype) -> None:
    assert load_base_model(llama_folder, dtype=dtype)[0].dtype == torch.bfloat16


def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path)
    assert load_base_model(tmp_path, dtype="auto")[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float8", "torch.float32", torch.int8, ""])
def test_unknown_dtype_is_refused_with_the_known_ones(llama_folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="'float32', 'bfloat16', 'float16', 'auto'"):
        load_base_model(llama_folder, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_unusable_device_is_refused_before_the_model_is_read(device: str) -> None:
    with pytest.raises(ConfigError, match=f"{device}.*Available here: .'cpu'"):
        load_base_model("/no/such/folder", device=device)


def test_meta_device_is_not_refused() -> None:
    assert parse_device("meta").type == "meta"


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./missing", "~/missing/folder/here", "~nobody/x", "a/b/c", "x" * 5000, ""]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(path: str) -> None:
    with pytest.raises(BaseModelError, match="neither a folder nor a hub id"):
        load_base_model(path)


def test_path_object_is_never_taken_for_a_hub_id() -> None:
    with pytest.raises(BaseModelError, match="neither a folder nor a hub id"):
        load_base_model(Path("owner/name"))


def test_weight_file_instead_of_its_folder_is_refused(llama_folder: Path) -> None:
    with pytest.raises(BaseModelError, match="neither a folder nor a hub id"):
        load_base_model(str(llama_folder / "model.safetensors"))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_base_model(tmp_path)


@pytest.mark.parametrize("load", [load_base_model, load_tokenizer])
def test_hub_id_that_cannot_be_reached_is_named(load) -> None:
    with pytest.raises(BaseModelError, match=r"hub id \(there is no such folder\) 'loraplex-test/not-there'"):
        load("loraplex-test/not-there")


def test_folder_without_weights_is_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=f"can't load the base model from the folder '{llama_folder}'"):
        load_base_model(llama_folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -100])
def test_truncated_weights_are_refused(llama_folder: Path, kept: int) -> None:
    weights = llama_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(BaseModelError, match="can't load the base model"):
        load_base_model(llama_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_damaged_config_is_refused(llama_folder: Path, text: str) -> None:
    (llama_folder / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match="can't load the base model"):
        load_base_model(llama_folder)


def test_missing_weight_is_refused_instead_of_drawn_at_random(llama_folder: Path) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base_model(llama_folder)


def test_weight_of_another_shape_is_refused(llama_folder: Path) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"can't load the base model"):
        load_base_model(llama_folder)


def test_classifier_answers_and_generates_nothing(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_model("llama").config).save_pretrained(tmp_path)
    model = MultiLoraModel.from_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="LlamaForSequenceClassification"):
        model.generate(IDS)
    with pytest.raises(BaseModelError, match="LlamaForSequenceClassification"):
        Engine(model, EngineConfig())


def test_folder_without_tokenizer_is_refused(llama_folder: Path) -> None:
    with pytest.raises(BaseModelError, match="can't load the tokenizer from the folder"):
        load_tokenizer(llama_folder)


def test_an_adapter_beside_the_model_is_refused_with_and_without_peft(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would give another model: the one that the adapter's settings name, with the adapter in it."""
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    adapter = random_peft_adapter(tiny_model("llama", seed=1), tmp_path / "adapter", targets=["q_proj"])
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
    for file in adapter.iterdir():
        shutil.copy(file, llama_folder)
    (llama_folder / "adapter_config.json").write_text(json.dumps(settings))
    hidden = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert not torch.allclose(hidden(IDS).logits, tiny_model("llama")(IDS).logits, atol=0.1), "nothing to refuse"
    for installed in (True, False):
        monkeypatch.setattr(auto_factory, "is_peft_available", lambda installed=installed: installed)
        with pytest.raises(BaseModelError, match=r"adapter beside it, '.*llama/adapter_config\.json'"):
            load_base_model(llama_folder)


@pytest.mark.parametrize("inject", ["get_peft_model", "add_adapter"])
def test_a_model_with_peft_layers_in_it_is_refused(tmp_path: Path, inject: str) -> None:
    model, config = tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"])
    if inject == "add_adapter":
        model.add_adapter(config)
        given = [model]
    else:
        given = [peft.get_peft_model(model, config), model]
    for base in given:
        with pytest.raises(BaseModelError, match=r"holds an adapter of PEFT: .* is a (Linear|PeftModel)"):
            MultiLoraModel(base)
        job, config = tiny_job(tmp_path, "a"), TrainConfig(output=tmp_path / "out")
        with pytest.raises(BaseModelError, match="holds an adapter of PEFT"):
            train_adapters(base, tiny_tokenizer(), jobs=[job], config=config)


def test_a_model_that_peft_has_left_is_taken(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"])).unload()
    torch.testing.assert_close(MultiLoraModel(model)(IDS).logits, tiny_model("llama")(IDS).logits)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"a": "\\ud800"}', "\0"])
def test_damaged_json_files_are_refused(llama_folder: Path, name: str, content: str) -> None:
    tiny_tokenizer().save_pretrained(llama_folder)
    (llama_folder / name).write_text(content)
    load = load_tokenizer if name.startswith("tokenizer") else load_base_model
    with pytest.raises(BaseModelError, match=name if name != "tokenizer.json" else "tokenizer"):
        load(llama_folder)


def test_infinite_settings_of_a_base_model_are_not_damage(llama_folder: Path) -> None:
    file = llama_folder / "config.json"
    settings = json.loads(file.read_text()) | {"time_step_limit": [0.0, math.inf]}  # as Mamba's files have it
    file.write_text(json.dumps(settings))
    assert load_base_model(llama_folder)[0].config.time_step_limit == [0.0, math.inf]


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_vision_language_checkpoint_keeps_its_class_and_every_weight(name: str, tmp_path: Path) -> None:
    model = make_model(f"vlm-{name}")
    model.save_pretrained(tmp_path)
    loaded, _ = load_base_model(tmp_path, dtype="float32")
    assert type(loaded) is type(model)
    assert loaded.get_output_embeddings() is not None
    expected = model.state_dict()
    assert {path: torch.equal(weight, expected[path]) for path, weight in loaded.state_dict().items()} == dict.fromkeys(
        expected, True
    )


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classifier_keeps_its_head(auto_class: Any, tmp_path: Path) -> None:
    config = tiny_model("llama").config
    config.num_labels = 3
    model = auto_class.from_config(config)
    model.save_pretrained(tmp_path)
    loaded, _ = load_base_model(tmp_path, dtype="float32")
    assert type(loaded) is type(model)
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_checkpoint_whose_output_layer_transformers_would_drop_is_refused() -> None:
    config = CLIPConfig(architectures=["SomethingForConditionalGeneration"])
    with pytest.raises(BaseModelError, match="SomethingForConditionalGeneration"):
        auto_class_for(config)
