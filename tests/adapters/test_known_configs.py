"""Adapters whose settings are written as well-known tools write them: each loads, and is what PEFT makes of it.

known_configs.json has the settings; the weights are random ones of a tiny model of the same architecture.
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.adapters.peft import config as own_config
from loraplex.adapters.peft.config import read_peft_config
from loraplex.adapters.peft.known_settings import HARMLESS, METADATA
from loraplex.errors import UnsupportedAdapterError
from tests.tiny_models import VOCAB_SIZE, fill_factor, tiny_model

KNOWN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "known_configs.json").read_text())
# What a tool writes for itself, and PEFT's own fields that others don't have.
FOREIGN = METADATA | {"peft_version", "enable_lora"}
LENGTH = 9

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about settings that it doesn't know


@pytest.fixture(scope="module")
def bases() -> dict[str, PreTrainedModel]:
    return {case["architecture"]: tiny_model(case["architecture"]) for case in KNOWN.values()}


def write_adapter(case: dict[str, Any], base: PreTrainedModel, folder: Path) -> Path:
    """Random weights that PEFT saves for these settings, beside the settings as the tool wrote them."""
    settings = case["settings"]
    options = {name: value for name, value in settings.items() if name not in FOREIGN | {"peft_type", "eva_config"}}
    options |= {"inference_mode": False, "base_model_name_or_path": None, "revision": None}
    options["init_lora_weights"] = True
    options["fan_in_fan_out"] = bool(settings.get("fan_in_fan_out"))
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            fill_factor(name, parameter.data, generator)
        elif parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def inputs_of(base: PreTrainedModel) -> dict[str, Tensor]:
    ids = torch.randint(10, VOCAB_SIZE, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[0, 3:6] = torch.tensor([5, 6, 7])  # the aLoRA's invocation
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :4]} if base.config.is_encoder_decoder else {})


def of(output: Any) -> Tensor:
    return output.logits[0] if "logits" in output else output.last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (number % 3 > 0)) for number, name in enumerate(KNOWN)]
)
def test_the_adapter_loads_and_is_what_peft_makes_of_it(
    name: str, bases: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    case = KNOWN[name]
    base = bases[case["architecture"]]
    folder = write_adapter(case, base, tmp_path / "adapter")
    oracle = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    inputs = inputs_of(base)
    own = {"alora_offsets": [LENGTH - 3]} if case["settings"].get("alora_invocation_tokens") else {}
    expected, plain = of(oracle(**inputs, **own)), of(base(**inputs))
    size = expected.max() - expected.min()
    assert (expected - plain).abs().max() > 1e-2 * size, "the adapter does nothing, so nothing is shown"
    with MultiLoraModel(copy.deepcopy(base)) as model:
        model.load_adapter("own", folder)
        found = of(model(**inputs, adapters=["own"]))
    assert (found - expected).abs().max() < 1e-4 * size
    shutil.rmtree(folder)


def test_there_are_many() -> None:
    assert len(KNOWN) >= 40


# PEFT's own settings


def test_every_setting_of_pefts_loraconfig_is_known() -> None:
    """A field that a later PEFT adds fails here, before a user's adapter has it."""
    known = {
        *HARMLESS,
        *own_config._REFUSED,
        *own_config._CONTENTS,
        *own_config._COPIED,
        *own_config._SEQUENCES,
        *own_config._PATTERNS,
        *("base_model_name_or_path", "init_lora_weights", "ensure_weight_tying"),
    }
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= known
    assert not METADATA & fields, "a setting of PEFT's is no metadata"


def test_what_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    settings = peft.LoraConfig(target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings, default=str))
    assert read_peft_config(tmp_path).target_modules == ("q_proj",)


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_lora": [True, False, True]},  # PEFT 0.2's MergedLinear, which had other weights
        {"layer_replication": [[0, 2], [1, 2]]},
        {"megatron_config": {"tensor_model_parallel_size": 2}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {}},
    ],
)
def test_settings_that_change_what_is_computed_are_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    own = KNOWN["PEFT 0.21, as it is"]["settings"] | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(UnsupportedAdapterError, match=next(iter(settings))):
        read_peft_config(tmp_path)
