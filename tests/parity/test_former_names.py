"""Adapters whose tensors have other names than PEFT gives them now, as transformers 4 and tools wrote them."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.adapters.store.store import StoreConfig
from loraplex.errors import AdapterFormatError, BaseModelMismatchError
from tests.architectures.variants import make_model
from tests.parity.oracle import assert_close
from tests.tiny_models import random_peft_adapter, tiny_model

PREFIX = "base_model.model."
IDS = torch.tensor([[5, 9, 17, 33, 60, 12, 7]])


def renamed_copy(folder: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """The adapter in `folder` with its tensors' names changed."""
    target.mkdir()
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return target


def peft_logits(base: PreTrainedModel, folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def our_logits(base: PreTrainedModel, folder: Path) -> Tensor:
    with MultiLoraModel(copy.deepcopy(base), fast_decode=False) as model:
        model.load_adapter("a", folder)
        return model(IDS, adapters=["a"]).logits[0]


def check_same(base: PreTrainedModel, folder: Path, renamed: Path) -> None:
    expected = peft_logits(base, folder)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits[0]
    assert not torch.allclose(expected, plain, atol=1e-2)  # or the comparison would be empty
    assert_close(our_logits(base, renamed), expected, str(renamed))


# By variant, how a name of today was spelt: a regular expression and its replacement.
FORMER = {
    "vlm-gemma3": (r"^model\.language_model\.", "language_model.model."),
    "vlm-llava": (r"^model\.language_model\.", "language_model.model."),
    "vlm-mistral3": (r"^model\.language_model\.", "language_model.model."),
    "vlm-qwen2_5_vl": (r"^model\.language_model\.", "model."),
    "nemotron_h": (r"^model\.", "backbone."),
    "qwen3_5_text": (r"^model\.", "model.language_model."),
}


@pytest.fixture(params=FORMER)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def former_names(variant: str, base: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """An adapter with the names of today, and with former ones."""
    text = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    targets = text if variant.startswith("vlm-") else ("q_proj", "v_proj", "up_proj")
    new = random_peft_adapter(base, folder / "new", targets=targets)
    pattern, former = FORMER[variant]
    old = renamed_copy(new, folder / "old", lambda name: PREFIX + re.sub(pattern, former, name.removeprefix(PREFIX)))
    assert not names_in(old) & names_in(new)
    return new, old


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def test_names_of_former_versions_are_those_of_the_base_model(variant: str, tmp_path: Path) -> None:
    base = make_model(variant)
    check_same(base, *former_names(variant, base, tmp_path))


def test_transformers_gives_an_adapter_with_former_names_what_we_give_it(variant: str, tmp_path: Path) -> None:
    """Its own `load_adapter`; PEFT's doesn't rename what only a class, not a model type, has a conversion for."""
    base = make_model(variant)
    _, old = former_names(variant, base, tmp_path)
    theirs = copy.deepcopy(base)
    theirs.load_adapter(str(old))
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits[0]
    assert_close(our_logits(base, old), expected, variant)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name in each": lambda name: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name),
    "another adapter's name": lambda name: re.sub(r"(lora_[AB])\.weight", r"\1.my-adapter_2.weight", name),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "the prefix twice": lambda name: PREFIX + name,
    "no prefix, the adapter's name": lambda name: name.removeprefix(PREFIX).replace(".weight", ".default.weight"),
    "of the model without a head": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_that_tools_write_are_read(spelling: str, tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj", "down_proj"))
    check_same(base, folder, renamed_copy(folder, tmp_path / "other", SPELLINGS[spelling]))


def test_names_of_embeddings_and_dora_with_the_adapters_name_are_read(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(
        base, tmp_path / "peft", targets=("q_proj", "embed_tokens"), options={"use_dora": True}
    )

    def rename(name: str) -> str:
        name = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name)
        name = re.sub(r"(lora_embedding_[AB])$", r"\1.default", name)
        return re.sub(r"lora_magnitude_vector$", "lora_magnitude_vector.default.weight", name)

    check_same(base, folder, renamed_copy(folder, tmp_path / "other", rename))


def test_buffers_of_the_base_model_pass(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "a", targets=("q_proj",))
    expected = our_logits(base, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{PREFIX}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert our_logits(base, folder).equal(expected)


def test_renamed_adapter_is_read_back_from_disk(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj", "v_proj"))
    renamed = renamed_copy(folder, tmp_path / "other", SPELLINGS["of the model without a head"])
    other = random_peft_adapter(base, tmp_path / "second", targets=("q_proj", "v_proj"), seed=1)
    size = sum(tensor.numel() * 4 for tensor in load_file(folder / "adapter_model.safetensors").values())
    model = MultiLoraModel(base, store=StoreConfig(num_slots=1, host_bytes=size + size // 2), fast_decode=False)
    model.load_adapter("a", renamed)
    first = model(IDS, adapters=["a"]).logits
    model.load_adapter("b", other)
    model(IDS, adapters=["b"])
    assert {state.name: state.tier for state in model.adapters()}["a"] == "disk"
    assert model(IDS, adapters=["a"]).logits.equal(first)


def test_names_that_no_renaming_makes_fit_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj",))
    renamed = renamed_copy(folder, tmp_path / "other", lambda name: name.replace("model.layers", "model.blocks"))
    with MultiLoraModel(base) as model, pytest.raises(BaseModelMismatchError, match=r"model\.blocks\.0"):
        model.load_adapter("a", renamed)


def test_renaming_must_make_all_modules_fit_in_shape(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj",))
    renamed = renamed_copy(folder, tmp_path / "other", SPELLINGS["of the model without a head"])
    tensors = load_file(renamed / "adapter_model.safetensors")
    name = min(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.randn(48, 4)
    save_file(tensors, renamed / "adapter_model.safetensors")
    with MultiLoraModel(base) as model, pytest.raises(BaseModelMismatchError, match=r"'layers\.0"):
        model.load_adapter("a", renamed)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "a", targets=("q_proj",))
    tensors = load_file(folder / "adapter_model.safetensors")
    both = {SPELLINGS["the adapter's name in each"](name): tensor for name, tensor in tensors.items()}
    both |= {SPELLINGS["another adapter's name"](name): tensor.clone() for name, tensor in tensors.items()}
    save_file(both, folder / "adapter_model.safetensors")
    with MultiLoraModel(base) as model, pytest.raises(AdapterFormatError, match="weights of two adapters"):
        model.load_adapter("a", folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3"])
def test_null_targets_are_those_that_peft_chooses(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    known = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",), "gemma3": ("q_proj", "v_proj")}
    folder = random_peft_adapter(base, tmp_path / "a", targets=known.get(name, ("qkv_proj",)))
    settings = json.loads((folder / "adapter_config.json").read_text())
    expected = our_logits(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": None}))
    if name not in known:
        with pytest.raises(ValueError, match="target_modules"):
            peft_logits(base, folder)
        with MultiLoraModel(base) as model, pytest.raises(Exception, match=r"null.*'phi3'"):
            model.load_adapter("a", folder)
        return
    assert our_logits(base, folder).equal(expected)
    assert_close(our_logits(base, folder), peft_logits(base, folder), name)


def test_default_targets_are_pefts() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    from loraplex.adapters.default_targets import DEFAULT_TARGETS

    ours = {kind: list(names) if isinstance(names, tuple) else names for kind, names in DEFAULT_TARGETS.items()}
    assert ours == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
