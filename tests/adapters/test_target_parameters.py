"""Adapters of bare parameters at rest: what is read and written is PEFT's, and what can't be honoured is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.inspect import describe
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.store.store import StoreConfig
from loraplex.adapters.tensor_file import TensorFile
from loraplex.errors import (
    AdapterFormatError,
    BaseModelMismatchError,
    CapacityError,
    UnsupportedAdapterError,
)
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.core.config import StepsConfig
from tests.architectures.expert_adapters import EXPERTS, write_expert_adapter
from tests.architectures.variants import make_config, make_model

ROUTERS = {"qwen3_moe": "gate.weight", "gpt_oss": "router.weight"}
WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, name: str = "qwen3_moe", parameters: tuple[str, ...] | None = None, **options: Any) -> Path:
    return write_expert_adapter(make_model(name), folder, parameters or (*EXPERTS, ROUTERS[name]), **options)


def change_settings(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("name", ROUTERS)
def test_an_adapter_is_written_as_peft_wrote_it(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "peft", name, rank_pattern={"down_proj": 5})
    write_adapter(read_adapter(folder), tmp_path / "ours")
    theirs, ours = load_file(folder / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
    loaded = peft.PeftModel.from_pretrained(make_model(name), str(tmp_path / "ours"))
    read = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(read[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", ROUTERS)
def test_factors_of_each_expert_make_up_pefts_update(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", name)
    layers = read_adapter(folder).layers
    loaded = peft.PeftModel.from_pretrained(make_model(name), str(folder))
    wrapper, seen = loaded.base_model.model.model.layers[1].mlp.experts, []
    while isinstance(wrapper, peft.tuners.lora.layer.ParamWrapper):
        weights = layers[f"model.layers.1.mlp.experts.{wrapper.parameter_name}"]
        update = wrapper.get_delta_weight("default")  # [experts, out, in], or transposed
        for expert in range(weights.num_experts):
            rows = slice(expert * weights.rank, (expert + 1) * weights.rank)
            own = weights.scaling * weights.lora_b[rows].t() @ weights.lora_a[rows]
            torch.testing.assert_close(own.t() if name == "gpt_oss" else own, update[expert])
        seen.append(wrapper.parameter_name)
        wrapper = wrapper.base_layer
    assert seen == ["down_proj", "gate_up_proj"]


def test_without_target_modules_only_parameters_are_adapted(tmp_path: Path) -> None:
    folder = change_settings(write(tmp_path / "a", targets=()), target_modules=None)
    assert {weights.kind for weights in read_adapter(folder).layers.values()} == {"moe experts", "router"}
    model = MultiLoraModel(make_model("qwen3_moe"))
    model.load_adapter("a", folder)
    assert model.names() == ["a"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_parameters": "experts.gate_up_proj"}, "must be a tuple of names"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters names"),
        ({"r": 7}, "times the number of experts"),
        ({"rank_pattern": {"gate_up_proj": 2}}, "of this base model|don't fit"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = change_settings(write(tmp_path / "a", r=4), **settings)
    base = make_model("qwen3_moe")
    own = type(base.model.layers[0].mlp.experts)
    model = MultiLoraModel(base)
    with pytest.raises((AdapterFormatError, UnsupportedAdapterError, BaseModelMismatchError), match=words):
        model.load_adapter("a", folder)
    assert model.names() == []
    assert type(base.model.layers[0].mlp.experts) is own


def test_another_number_of_experts_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("qwen3_moe")
    config.num_experts = 8
    folder = write_expert_adapter(make_model("qwen3_moe", config=config), tmp_path / "a", EXPERTS)
    monkeypatch.setattr(TensorFile, "read", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(BaseModelMismatchError, match=r"8 x 64 -> 96.*4 x 64 -> 96"):
        MultiLoraModel(make_model("qwen3_moe")).load_adapter("a", folder)


def test_factors_of_no_whole_number_of_experts_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", parameters=("experts.down_proj",))
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, folder / WEIGHTS)
    with pytest.raises(AdapterFormatError, match="times the number of experts"):
        read_adapter(folder)


def test_a_targeted_parameter_without_weights_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", parameters=("experts.down_proj",))
    tensors = {key: value for key, value in load_file(folder / WEIGHTS).items() if "layers.1.mlp" not in key}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=r"no weights for.*layers\.1\.mlp\.experts\.down_proj"):
        MultiLoraModel(make_model("qwen3_moe")).load_adapter("a", folder)


def test_all_experts_count_in_budgets(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    size = sum(tensor.numel() * 4 for tensor in load_file(folder / WEIGHTS).values())
    model = MultiLoraModel(make_model("qwen3_moe"), store=StoreConfig(host_bytes=size))
    model.load_adapter("a", folder)
    assert model.adapters()[0].num_bytes == size
    small = MultiLoraModel(make_model("qwen3_moe"), store=StoreConfig(host_bytes=size - 1))
    with pytest.raises(CapacityError, match=str(size)):
        small.load_adapter("a", folder)


@torch.no_grad()
def test_an_adapter_that_left_host_memory_answers_as_before(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(i), seed=i + 1) for i in range(2)]
    size = sum(tensor.numel() * 4 for tensor in load_file(folders[0] / WEIGHTS).values())
    model = MultiLoraModel(make_model("qwen3_moe"), store=StoreConfig(host_bytes=size, num_slots=1))
    ids = torch.arange(3, 20).unsqueeze(0)
    model.load_adapter("0", folders[0])
    before = model(ids, adapters=["0"]).logits
    model.load_adapter("1", folders[1])  # for which the first leaves
    between = model(ids, adapters=["1"]).logits
    assert not before.equal(between)
    assert model(ids, adapters=["0"]).logits.equal(before)


@torch.no_grad()
def test_closing_gives_the_base_model_back(tmp_path: Path) -> None:
    base, ids = make_model("qwen3_moe"), torch.arange(3, 20).unsqueeze(0)
    classes = {path: type(module) for path, module in base.named_modules()}
    expected = base(ids).logits
    with MultiLoraModel(base) as model:
        model.load_adapter("a", write(tmp_path / "a"))
        assert not model(ids, adapters=["a"]).logits.equal(expected)
        assert copy.deepcopy(base)(ids).logits.equal(expected)
    assert {path: type(module) for path, module in base.named_modules()} == classes
    assert base(ids).logits.equal(expected)
    assert not any(name.startswith("lora_") for module in base.modules() for name in vars(module))


def test_report_tells_the_experts(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    report = describe(folder)
    groups = {group.module_type: group for group in report.groups}
    assert {name: group.num_experts for name, group in groups.items()} == {
        "o_proj": 1,
        "gate_up_proj": 4,
        "down_proj": 4,
        "gate.weight": 1,
    }
    assert groups["gate_up_proj"].ranks == (3,)
    loaded = peft.PeftModel.from_pretrained(make_model("qwen3_moe"), str(folder))
    wrappers = [layer.mlp.experts for layer in loaded.base_model.model.model.layers]  # the outer ones: down_proj
    norms = [wrapper.get_delta_weight("default").norm().item() for wrapper in wrappers]
    assert groups["down_proj"].norm_update.max == pytest.approx(max(norms), rel=1e-5)


def test_a_mixture_refuses_them_and_a_row_beside_one_has_them(tmp_path: Path) -> None:
    model = MultiLoraModel(make_model("qwen3_moe"))
    model.load_adapter("experts", write(tmp_path / "experts"))
    for i in range(2):
        folder = write_expert_adapter(make_model("qwen3_moe"), tmp_path / str(i), (), targets=("q_proj",), seed=i)
        model.load_adapter(str(i), folder)
    with pytest.raises(UnsupportedAdapterError, match=r"'experts' adapts the parameters.*target_parameters"):
        model.create_mixture("mix", ["0", "experts"])
    model.create_mixture("mix", ["0", "1"], XLoraConfig(layerwise_scalings=True))
    ids = torch.randint(3, 110, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(ids, adapters=["experts", "mix", "mix+experts"]).logits
        for row, choice in enumerate(["experts", "mix", "mix+experts"]):
            alone = model(ids[row : row + 1], adapters=[choice]).logits[0]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    assert not together[1].equal(together[2])


def test_training_refuses_them() -> None:
    lora = LoraConfig(target_modules=("q_proj",), target_parameters=EXPERTS)
    with pytest.raises(UnsupportedAdapterError, match=r"target_parameters.*can't be trained"):
        AdapterJob(name="a", data="a.jsonl", lora=lora, steps=StepsConfig(max_steps=1, max_length=8))
