"""Adapters of single experts, from transformers 4, are what PEFT makes of them when it loads them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.errors import AdapterError, AdapterFormatError, UnsupportedAdapterError
from loraplex.models.former_experts import with_stacked_experts
from tests.architectures.checks import assert_close, assert_far
from tests.architectures.variants import make_model

RANK, HIDDEN, INTERMEDIATE, MOE_INTERMEDIATE, NUM_EXPERTS = 3, 64, 96, 48, 4
ATTENTION = {"q_proj": (HIDDEN, 64), "v_proj": (HIDDEN, 32)}
IDS = torch.randint(3, 110, (4, 13), generator=torch.Generator().manual_seed(0))


def factors(num_in: int, num_out: int, draw: torch.Generator, rank: int = RANK) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(rank, num_in, generator=draw) / num_in**0.5,
        torch.randn(num_out, rank, generator=draw) * 0.4,
    )


def mixtral_modules() -> dict[str, tuple[int, int]]:
    """By module name in a layer, inputs and outputs, as Mixtral had them in transformers 4."""
    experts = {}
    for expert in range(NUM_EXPERTS):
        experts |= {f"block_sparse_moe.experts.{expert}.{name}": (HIDDEN, INTERMEDIATE) for name in ("w1", "w3")}
        experts[f"block_sparse_moe.experts.{expert}.w2"] = (INTERMEDIATE, HIDDEN)
    attention = {f"self_attn.{name}": size for name, size in ATTENTION.items()}
    return attention | experts | {"block_sparse_moe.gate": (HIDDEN, NUM_EXPERTS)}


def qwen_modules() -> dict[str, tuple[int, int]]:
    """The same of Qwen3-MoE and those that are built like it."""
    experts = {}
    for expert in range(NUM_EXPERTS):
        experts |= {f"mlp.experts.{expert}.{name}": (HIDDEN, MOE_INTERMEDIATE) for name in ("gate_proj", "up_proj")}
        experts[f"mlp.experts.{expert}.down_proj"] = (MOE_INTERMEDIATE, HIDDEN)
    return {f"self_attn.{name}": size for name, size in ATTENTION.items()} | experts


def write_folder(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    targets: Any,
    *,
    seed: int = 0,
    layers: Sequence[int] = (0, 1),
    **settings: Any,
) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for name, (num_in, num_out) in modules.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = factors(num_in, num_out, draw)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
def check(name: str, folder: Path) -> MultiLoraModel:
    """The adapter beside base rows against PEFT."""
    expected = peft.PeftModel.from_pretrained(make_model(name), str(folder)).eval()(IDS).logits
    model = MultiLoraModel(make_model(name))
    model.load_adapter("a", folder)
    logits, base = model(IDS, adapters=["a", None, "a", None]).logits, make_model(name)(IDS).logits
    for row in (0, 2):
        assert_close(logits[row], expected[row], f"row {row}")
        assert_far(expected[row], base[row], "the adapter")
    for row in (1, 3):
        assert logits[row].equal(base[row])
    return model


MIXTRAL = ["q_proj", "v_proj", "w1", "w2", "w3", "gate"]
QWEN = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def only(modules: Mapping[str, tuple[int, int]], *suffixes: str) -> dict[str, tuple[int, int]]:
    return {name: size for name, size in modules.items() if name.endswith(suffixes)}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.0, "alpha_pattern": {"q_proj": 9}}])
def test_mixtral_with_its_router(settings: dict[str, Any], tmp_path: Path) -> None:
    check("mixtral", write_folder(tmp_path / "a", mixtral_modules(), MIXTRAL, **settings))


def test_the_experts_output_alone(tmp_path: Path) -> None:
    check("mixtral", write_folder(tmp_path / "down", only(mixtral_modules(), "q_proj", "w2"), ["q_proj", "w2"]))


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_those_that_are_built_like_qwen(name: str, tmp_path: Path) -> None:
    modules = qwen_modules()
    if name == "olmoe":  # whose experts are as wide as a dense layer
        modules = {
            path: tuple(INTERMEDIATE if size == MOE_INTERMEDIATE else size for size in sizes)
            for path, sizes in modules.items()
        }
        modules["self_attn.v_proj"] = (HIDDEN, make_model(name).model.layers[0].self_attn.v_proj.out_features)
    check(name, write_folder(tmp_path / "a", modules, QWEN))


def test_targets_as_an_expression(tmp_path: Path) -> None:
    targets = r".*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"
    check("qwen3_moe", write_folder(tmp_path / "a", qwen_modules(), targets))


def test_dropout_in_training_changes_nothing(tmp_path: Path) -> None:
    """PEFT refuses it for stacked experts, though the adapter's trained weights are complete."""
    plain = write_folder(tmp_path / "plain", qwen_modules(), QWEN)
    dropped = write_folder(tmp_path / "dropped", qwen_modules(), QWEN, lora_dropout=0.05)
    model = check("qwen3_moe", plain)
    model.load_adapter("dropped", dropped)
    with torch.no_grad():
        logits = model(IDS[:1].expand(2, -1), adapters=["a", "dropped"]).logits
    assert logits[0].equal(logits[1])


@torch.no_grad()
def test_the_converted_adapter_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", mixtral_modules(), MIXTRAL)
    model = check("mixtral", folder)
    converted = with_stacked_experts(model.base, model.registry.adaptable.shapes, read_adapter(folder))
    written = tmp_path / "written"
    write_adapter(converted, written)
    check("mixtral", written)


def test_a_stored_adapter_is_read_again_as_it_was(tmp_path: Path) -> None:
    model = MultiLoraModel(make_model("mixtral"))
    for seed in (1, 2):
        model.load_adapter(f"a{seed}", write_folder(tmp_path / f"a{seed}", mixtral_modules(), MIXTRAL, seed=seed))
    with torch.no_grad():
        before = model(IDS[:2], adapters=["a1", "a2"]).logits
        version = model.store.version("a1")
        version.prepared, version.slot = None, version.slot
        again = model.store._read_unchanged(version)
    held = model.store.slots.held(version.slot)
    for index, weights in again.layers.items():
        assert torch.equal(weights.lora_a, held.layers[index].lora_a)
        assert torch.equal(weights.lora_b, held.layers[index].lora_b)
    assert before.isfinite().all()


@pytest.mark.parametrize(
    ("name", "targets", "modules", "error", "words"),
    [
        ("mixtral", ["w1"], only(mixtral_modules(), "w1"), UnsupportedAdapterError, ["w1", "w3", "gate_up_proj"]),
        ("mixtral", ["w1", "w3"], only(mixtral_modules(), "w1", "w3"), UnsupportedAdapterError, ["w2", "drops"]),
        ("gpt_oss", QWEN, qwen_modules(), UnsupportedAdapterError, ["experts.0.gate_proj", "GptOss"]),
        (
            "mixtral",
            MIXTRAL,
            {name: size for name, size in mixtral_modules().items() if "experts.2.w1" not in name},
            AdapterFormatError,
            ["experts.2.w1"],
        ),
        ("qwen3_moe", MIXTRAL, mixtral_modules(), AdapterError, ["w1"]),
        (
            "mixtral",
            MIXTRAL,
            mixtral_modules() | {"block_sparse_moe.experts.900000.w1": (HIDDEN, INTERMEDIATE)},
            AdapterFormatError,
            ["900000"],
        ),
    ],
)
def test_what_peft_does_not_convert_is_refused(
    name: str, targets: list[str], modules: Any, error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    model = MultiLoraModel(make_model(name))
    with pytest.raises(error) as caught:
        model.load_adapter("a", write_folder(tmp_path / "a", modules, targets))
    for word in words:
        assert re.search(re.escape(word), str(caught.value)), caught.value
    assert model.names() == []


def test_dense_and_shared_projections_beside_experts_are_refused(tmp_path: Path) -> None:
    """PEFT's converted settings no longer target them, so that it drops their weights."""
    modules = only(qwen_modules(), "gate_proj", "up_proj", "down_proj") | {
        f"mlp.shared_experts.{name}": (HIDDEN, MOE_INTERMEDIATE) for name in ("gate_proj", "up_proj")
    }
    folder = write_folder(tmp_path / "a", modules, QWEN[2:], layers=(1,))
    with pytest.raises(AdapterFormatError, match=r"doesn't target.*layers\.1\.mlp\.shared_experts"):
        MultiLoraModel(make_model("glm4_moe")).load_adapter("a", folder)
    check(
        "glm4_moe",
        write_folder(
            tmp_path / "b", only(modules, *(f"{i}.{p}" for i in range(4) for p in QWEN[2:])), QWEN[2:], layers=(1,)
        ),
    )
