"""Mixtures by name: created, loaded, saved, unloaded; and what is refused before anything changes."""

import pytest
import torch

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    ConfigError,
    MixtureError,
    UnsupportedAdapterError,
)
from tests.parity.oracle import padded_batch
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model
from tests.xlora.mixed_model import EXPERTS, mixed_model, write_experts


def logits(model, choice):
    ids, _ = padded_batch(1, 8, "left", VOCAB_SIZE)
    with torch.no_grad():
        return model(ids, adapters=[choice]).logits


@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_saved_mixture_gives_the_same_logits_when_loaded(layout, tmp_path):
    model = mixed_model("llama", tmp_path / "experts")
    model.save_mixture("science", tmp_path / "saved", layout=layout)
    again = MultiLoraModel(tiny_model("llama"))
    again.load_mixture("other", tmp_path / "saved")
    assert again.names() == ["other", "other/0", "other/1", "other/2"]
    assert torch.equal(logits(again, "other"), logits(model, "science"))
    again.unload("other")
    assert again.names() == []


def test_loaded_mixture_shares_experts_with_plain_adapters(tmp_path):
    model = mixed_model("llama", tmp_path / "experts")
    model.save_mixture("science", tmp_path / "saved")
    model.load_mixture("second", tmp_path / "saved", experts=dict.fromkeys(EXPERTS))
    assert model.names() == [*EXPERTS, "science", "second"]
    assert torch.equal(logits(model, "second"), logits(model, "science"))
    model.unload("second")  # experts that it did not bring stay
    assert model.names() == [*EXPERTS, "science"]


def test_mixture_from_memory_can_be_saved(tmp_path):
    from loraplex.adapters.peft.reader import read_adapter

    model = MultiLoraModel(tiny_model("llama"))
    folders = write_experts("llama", tmp_path)
    for name in ("0", "1"):
        model.load_adapter(name, read_adapter(folders[name]))
    model.create_mixture("pair", ["0", "1"])
    model.save_mixture("pair", tmp_path / "saved")
    again = MultiLoraModel(tiny_model("llama"))
    again.load_mixture("pair", tmp_path / "saved")
    assert torch.equal(logits(again, "pair"), logits(model, "pair"))


def test_equal_seeds_give_equal_heads_and_others_differ(tmp_path):
    model = mixed_model("llama", tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model.create_mixture(name, EXPERTS, XLoraConfig(layerwise_scalings=True), seed=seed)
    assert torch.equal(logits(model, "a"), logits(model, "b"))
    assert not torch.equal(logits(model, "a"), logits(model, "c"))


@pytest.mark.parametrize(
    ("name", "experts", "config", "error", "message"),
    [
        ("science", ["0"], None, AdapterExistsError, "a mixture 'science' is loaded already"),
        ("0", ["1"], None, AdapterExistsError, "an adapter '0' is loaded already"),
        ("bad name", ["0"], None, AdapterError, "bad name"),
        ("new", [], None, ConfigError, "0 experts"),
        ("new", ["0", "0"], None, MixtureError, "'0' twice"),
        ("new", ["science"], None, MixtureError, "a mixture itself"),
        ("new", ["0", "absent"], None, AdapterNotFoundError, "'absent' is not loaded"),
        ("new", ["0"], XLoraConfig(top_k_lora=2), ConfigError, "top_k_lora is 2"),
    ],
)
def test_mixture_that_can_not_be_made_is_refused(name, experts, config, error, message, tmp_path):
    model = mixed_model("llama", tmp_path)
    before, expected = model.names(), logits(model, "science")
    with pytest.raises(error, match=message):
        model.create_mixture(name, experts, config)
    assert model.names() == before
    assert torch.equal(logits(model, "science"), expected)


def test_alora_is_no_expert(tmp_path):
    model = mixed_model("llama", tmp_path)
    folder = random_peft_adapter(
        tiny_model("llama"),
        tmp_path / "a",
        targets=linear_targets("llama"),
        options={"alora_invocation_tokens": [5, 6]},
    )
    model.load_adapter("alora", folder)
    with pytest.raises(UnsupportedAdapterError, match="the expert 'alora' is an aLoRA"):
        model.create_mixture("new", ["0", "alora"])


def test_mixture_on_an_encoder_is_refused(tmp_path):
    model = MultiLoraModel(tiny_model("t5"))
    with pytest.raises(UnsupportedAdapterError, match="need a causal language model"):
        model.create_mixture("new", ["0"])


def test_expert_stays_while_a_mixture_needs_it(tmp_path):
    model = mixed_model("llama", tmp_path)
    with pytest.raises(MixtureError, match="'1' is an expert of 'science'"):
        model.unload("1")
    model.unload("science")
    model.unload("1")
    assert model.names() == ["0", "2"]


def test_expert_is_replaced_only_by_one_of_the_same_layers(tmp_path):
    model = mixed_model("llama", tmp_path)
    before = logits(model, "science")
    base, targets = tiny_model("llama"), linear_targets("llama")
    same = random_peft_adapter(base, tmp_path / "same", targets=targets[:3], seed=9)
    more = random_peft_adapter(base, tmp_path / "more", targets=[*targets, "lm_head"], seed=9)
    with pytest.raises(MixtureError, match="made for 14 LoRA layers"):
        model.load_adapter("1", more, replace=True)
    assert torch.equal(logits(model, "science"), before)
    model.load_adapter("1", same, replace=True)
    assert not torch.equal(logits(model, "science"), before)


def test_load_that_fails_leaves_no_expert_behind(tmp_path):
    model = mixed_model("llama", tmp_path / "experts")
    model.save_mixture("science", tmp_path / "saved")
    other = MultiLoraModel(tiny_model("llama"))
    damaged = tmp_path / "saved" / "2" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(AdapterFormatError):
        other.load_mixture("science", tmp_path / "saved")
    assert other.names() == []


def test_folder_for_another_base_model_is_refused(tmp_path):
    model = mixed_model("llama", tmp_path / "experts")
    model.save_mixture("science", tmp_path / "saved")
    other = MultiLoraModel(tiny_model("gpt2"))
    with pytest.raises(BaseModelMismatchError):
        other.load_mixture("science", tmp_path / "saved")
    assert other.names() == []


def test_wrong_number_of_experts_is_refused(tmp_path):
    model = mixed_model("llama", tmp_path / "experts")
    model.save_mixture("science", tmp_path / "saved")
    with pytest.raises(MixtureError, match=r"experts names 2 adapters, .* has 3"):
        model.load_mixture("second", tmp_path / "saved", experts={"0": None, "1": None})


def test_running_out_of_slots_is_told_before_anything_runs(tmp_path):
    from loraplex import StoreConfig
    from loraplex.errors import CapacityError

    model = mixed_model("llama", tmp_path, store=StoreConfig(num_slots=2))
    with pytest.raises(CapacityError, match="not enough slots"):
        logits(model, "science")
    assert logits(model, "1").isfinite().all()


def test_configured_mixture_is_the_one_made_with_these_settings(tmp_path):
    model = mixed_model("llama", tmp_path)
    settings = {"top_k_lora": 2, "softmax_temperature": 0.5, "global_scaling_weight": 2.0, "scaling_pass_value": 0.5}
    model.create_mixture("made", EXPERTS, XLoraConfig(layerwise_scalings=True, **settings), seed=3)
    model.create_mixture("changed", EXPERTS, XLoraConfig(layerwise_scalings=True), seed=3)
    before = logits(model, "changed")
    model.configure_mixture("changed", **settings)
    assert torch.equal(logits(model, "changed"), logits(model, "made"))
    assert not torch.allclose(logits(model, "changed"), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"xlora_depth": 2}, "'xlora_depth' can't be changed"),
        ({"top_k": 2}, "'top_k' can't be changed"),
        ({"top_k_lora": 4}, "has 3 experts"),
        ({"softmax_temperature": 0.0}, "softmax_temperature is 0.0"),
    ],
)
def test_settings_that_cant_be_changed_leave_the_mixture_as_it_was(tmp_path, settings, message):
    model = mixed_model("llama", tmp_path)
    before = logits(model, "science")
    with pytest.raises(ConfigError, match=message):
        model.configure_mixture("science", **settings)
    assert torch.equal(logits(model, "science"), before)
