"""A merged model: for one adapter the weights that PEFT's merge_and_unload gives, and what a link computes."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.models.convert.merging import save_merged
from tests.adapters.folders import output_module
from tests.parity.oracle import PeftOracle, assert_close, padded_batch
from tests.tiny_models import VOCAB_SIZE, embedding_target, linear_targets, random_peft_adapter, tiny_model

# Conv1D, biases, scaled embeddings, fused modules, tied weights, an encoder.
UNTIED = ("llama", "gemma2", "phi3", "gpt_neox")
ARCHITECTURES = (*UNTIED, "gpt2", "opt", "qwen2", "bert", "t5")
KINDS: Mapping[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {r".*\.0\..*": 6}, "alpha_pattern": {r".*\.1\..*": 3}},
}
IDS, MASK = padded_batch(3, 9, "left", VOCAB_SIZE)


def write_base(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    base = tiny_model(name, dtype=dtype)
    base.save_pretrained(folder)
    return base


def adapter_for(base: PreTrainedModel, folder: Path, targets: Sequence[str], **options: Any) -> Path:
    settings = {key: options.pop(key) for key in ("r", "lora_alpha", "seed") if key in options}
    return random_peft_adapter(base, folder, targets=targets, options=options, **settings)


def merged_by_peft(base: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload().state_dict()


def has_scaled_embedding(base: PreTrainedModel) -> bool:
    return hasattr(base.get_input_embeddings(), "embed_scale")


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    inputs = {"decoder_input_ids": IDS} if model.base.config.is_encoder_decoder else {}
    return model(IDS, MASK, **inputs, **options).logits[MASK.bool()]


def served(base: PreTrainedModel, folders: Mapping[str, Path], link: str | None) -> Tensor:
    with MultiLoraModel(copy.deepcopy(base), fast_decode=False) as model:
        for name, folder in folders.items():
            model.load_adapter(name, folder)
        return logits(model, adapters=[link] * len(IDS))


def of_folder(folder: Path) -> Tensor:
    with MultiLoraModel(load_base_model(folder)[0], fast_decode=False) as model:
        return logits(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_adapter_merges_to_the_weights_that_peft_merges(tmp_path: Path, name: str, kind: str) -> None:
    base = write_base(tmp_path / "base", name)
    targets = list(linear_targets(name))
    if name in UNTIED:  # PEFT merges into what the output layer shares with the embedding, and so into both
        targets += [str(output_module(base))]
        targets += [] if kind == "dora" and has_scaled_embedding(base) else [embedding_target(name)]
    folder = adapter_for(base, tmp_path / "a", targets, **KINDS[kind])
    save_merged(tmp_path / "base", "a", tmp_path / "merged", {"a": folder})
    merged, _ = load_base_model(tmp_path / "merged")
    found, expected, before = merged.state_dict(), merged_by_peft(base, folder), base.state_dict()
    assert found.keys() == expected.keys()
    for path, weight in expected.items():
        assert torch.allclose(found[path], weight, rtol=1e-5, atol=2e-6), path
    assert sum(not torch.equal(found[path], before[path]) for path in before) >= len(targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_rounded_once_as_by_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", "llama", dtype)
    folder = adapter_for(tiny_model("llama"), tmp_path / "a", linear_targets("llama"))
    save_merged(tmp_path / "base", "a", tmp_path / "merged", {"a": folder})
    merged, _ = load_base_model(tmp_path / "merged")
    assert merged.dtype == dtype
    pairs = [(merged.state_dict()[path], weight) for path, weight in merged_by_peft(base, folder).items()]
    same = sum(int((found == weight).sum()) for found, weight in pairs)
    assert same >= 0.999 * sum(weight.numel() for _, weight in pairs)  # float32 sums round a few the other way
    assert all(torch.allclose(found, weight, rtol=2**-7, atol=1e-6) for found, weight in pairs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_merged_link_computes_what_the_link_computes(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", name)
    linear = linear_targets(name)
    dora = [*linear] if has_scaled_embedding(base) else [*linear, embedding_target(name)]
    folders = {
        "a": adapter_for(base, tmp_path / "a", linear, r=3, use_rslora=True),
        "b": adapter_for(base, tmp_path / "b", [*linear[:2], embedding_target(name)], r=5, seed=1),
        "c": adapter_for(base, tmp_path / "c", dora, seed=2, use_dora=True),
        "d": adapter_for(base, tmp_path / "d", linear, seed=3, use_dora=True),
    }
    link = "a:0.7+c:0.5+b:-0.4+d:0.3"
    save_merged(tmp_path / "base", link, tmp_path / "merged", folders)
    assert_close(of_folder(tmp_path / "merged"), served(base, folders, link), "merged")
    difference = (of_folder(tmp_path / "base") - served(base, folders, link)).abs().max()
    assert difference > 1, "the link changes too little for this test to tell anything"


def test_weights_equal_the_formula_in_float64(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    options = [{}, {"use_dora": True}, {"use_dora": True}]
    folders = {
        name: adapter_for(base, tmp_path / name, ["q_proj"], seed=seed, **options[seed])
        for seed, name in enumerate("abc")
    }
    weights = {"a": 0.7, "b": 0.5, "c": -0.25}
    save_merged(tmp_path / "base", list(weights.items()), tmp_path / "merged", folders)
    merged = load_base_model(tmp_path / "merged")[0].state_dict()
    path = "model.layers.1.self_attn.q_proj"
    own = base.state_dict()[f"{path}.weight"].double()
    total = own.clone()
    for name, weight in weights.items():
        module = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[name])).base_model.model.get_submodule(path)
        a, b = (getattr(module, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        update = 2 * b @ a  # alpha 8, rank 4
        if name != "a":
            magnitude = module.lora_magnitude_vector["default"].weight.detach().double()
            ratio = (magnitude / (own + update).norm(dim=1)).unsqueeze(1)
            update = (ratio - 1) * own + ratio * update
        total += weight * update
    assert torch.equal(merged[f"{path}.weight"], total.float())


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"], ["q_proj"]])
def test_tied_embedding_and_output_layer_are_adapted_each_for_itself(tmp_path: Path, targets: list[str]) -> None:
    base = write_base(tmp_path / "base", "qwen2")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    folder = adapter_for(base, tmp_path / "a", targets)
    save_merged(tmp_path / "base", "a", tmp_path / "merged", {"a": folder})
    merged, _ = load_base_model(tmp_path / "merged")
    is_tied = targets == ["q_proj"]
    assert merged.config.tie_word_embeddings is is_tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is is_tied
    own = base.lm_head.weight
    assert torch.equal(merged.lm_head.weight, own) is ("lm_head" not in targets)
    assert torch.equal(merged.model.embed_tokens.weight, own) is ("embed_tokens" not in targets)
    if targets == ["embed_tokens"]:  # what docs/guides/merging.md says of PEFT
        of_peft = merged_by_peft(base, folder)
        assert torch.equal(of_peft["lm_head.weight"], of_peft["model.embed_tokens.weight"])
    oracle = PeftOracle(base, {"a": folder})  # not merged
    expected = [oracle.logits("a", ids, mask)[mask.bool()] for ids, mask in zip(IDS, MASK, strict=True)]
    assert_close(of_folder(tmp_path / "merged"), torch.cat(expected), "PEFT")


@pytest.mark.parametrize(("name", "target"), [("bert", "word_embeddings"), ("gpt2", "wte"), ("opt", "embed_tokens")])
def test_other_tied_models_keep_their_output_layer(tmp_path: Path, name: str, target: str) -> None:
    base = write_base(tmp_path / "base", name)
    folders = {"a": adapter_for(base, tmp_path / "a", [target])}
    save_merged(tmp_path / "base", "a:1.5", tmp_path / "merged", folders)
    assert_close(of_folder(tmp_path / "merged"), served(base, folders, "a:1.5"), name)


def test_bfloat16_base_merges_into_float32_without_rounding(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    folder = adapter_for(tiny_model("llama"), tmp_path / "a", ["q_proj", "down_proj"])
    save_merged(tmp_path / "base", "a", tmp_path / "merged", {"a": folder}, dtype="float32")
    merged, _ = load_base_model(tmp_path / "merged")
    expected = merged_by_peft(base.float(), folder)
    assert {weight.dtype for weight in merged.state_dict().values()} == {torch.float32}
    for path, weight in merged.state_dict().items():
        assert torch.allclose(weight, expected[path], rtol=1e-5, atol=2e-6), path


def test_float32_base_merges_into_bfloat16_with_one_rounding(tmp_path: Path) -> None:
    write_base(tmp_path / "base", "qwen2")
    folder = adapter_for(tiny_model("qwen2"), tmp_path / "a", ["q_proj"])
    for dtype in ("float32", "bfloat16"):
        save_merged(tmp_path / "base", "a", tmp_path / dtype, {"a": folder}, dtype=dtype)
    whole, short = (load_base_model(tmp_path / dtype)[0] for dtype in ("float32", "bfloat16"))
    assert short.dtype == torch.bfloat16
    for path, weight in short.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[path].bfloat16()), path


@pytest.mark.slow  # loads SmolLM2 three times
def test_merged_smollm2_says_what_the_served_link_says(smollm2: Path, tmp_path: Path) -> None:
    folders = {name: Path(f"examples/adapters/{name}").resolve() for name in ("quantum", "protein")}
    link = "quantum:0.7+protein:0.3"
    save_merged(smollm2, link, tmp_path / "merged", folders)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
    with MultiLoraModel.from_pretrained(smollm2, dtype="float32") as model:
        for name, folder in folders.items():
            model.load_adapter(name, folder)
        inputs = model.encode_chat(["What is a qubit?", "Name three proteins."])
        expected = model.generate(**inputs, adapters=[link, link], **options)
    with MultiLoraModel.from_pretrained(tmp_path / "merged", dtype="float32") as merged:
        again = merged.encode_chat(["What is a qubit?", "Name three proteins."])
        assert torch.equal(again["input_ids"], inputs["input_ids"])
        found = merged.generate(**again, **options)
    shortest = min(found.shape[1], expected.shape[1])  # padding behind the ends
    assert torch.equal(found[:, :shortest], expected[:, :shortest])
