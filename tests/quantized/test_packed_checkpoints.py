"""GPTQ and AWQ checkpoints: weights as their formulas give them in float64, and rows as PEFT has them on these."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.errors import BaseModelError, ConfigError
from loraplex.models.checkpoints.packed_formats import packed_format
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """As AutoGPTQ packs weights: rows that follow each other, the first in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0] // per_word, values.shape[1]), dtype=np.uint32)
    for row in range(values.shape[0]):
        words[row // per_word] |= values[row].astype(np.uint32) << np.uint32(bits * (row % per_word))
    return words.view(np.int32)


def pack_columns(values: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """As AutoGPTQ packs zeros, or in AutoAWQ's order."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place, column in enumerate(order or range(per_word)):
            words[:, word] |= values[:, word * per_word + column].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


class Quantized:
    """Random whole numbers, zeros and scales of one module, and the weight that they stand for."""

    def __init__(self, num_out: int, num_in: int, *, bits: int, group_size: int, seed: int, act_order: bool) -> None:
        draw = np.random.default_rng(seed)
        size = group_size if group_size > 0 else num_in
        self.g_idx = np.arange(num_in) // size
        if act_order:
            draw.shuffle(self.g_idx)
        groups = -(-num_in // size)
        self.q = draw.integers(0, 2**bits, (num_in, num_out))
        self.zeros = draw.integers(1, 2**bits, (groups, num_out))
        self.scales = (draw.uniform(0.2, 1, (groups, num_out)) / 2**bits / 3).astype(np.float16)
        numbers = self.q.astype(np.float64) - self.zeros[self.g_idx]
        self.weight = (self.scales[self.g_idx].astype(np.float64) * numbers).T  # [out, in]

    def gptq(self, bits: int, *, less_one: bool = True) -> dict[str, np.ndarray]:
        zeros = pack_columns(self.zeros - int(less_one), bits)
        return {"qweight": pack_rows(self.q, bits), "qzeros": zeros, "scales": self.scales, "g_idx": self.g_idx}

    def awq(self) -> dict[str, np.ndarray]:
        packed = [pack_columns(values, 4, AWQ_ORDER) for values in (self.q, self.zeros)]
        return {"qweight": packed[0], "qzeros": packed[1], "scales": self.scales}


CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 16, "quant_method": "gptq", "sym": True},
    "gptq, act order": {"bits": 4, "group_size": 16, "quant_method": "gptq", "desc_act": True},
    "gptq, 8 bits, one group": {"bits": 8, "group_size": -1, "quant_method": "gptq", "checkpoint_format": "gptq"},
    "gptq, 2 bits": {"bits": 2, "group_size": 32, "quant_method": "gptq"},
    "gptq_v2": {"bits": 4, "group_size": 16, "quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "awq": {"bits": 4, "group_size": 16, "quant_method": "awq", "version": "gemm", "zero_point": True},
}


def write_checkpoint(folder: Path, case: str, *, architecture: str = "llama", shards: int = 1) -> PreTrainedModel:
    """A checkpoint as the tools write it; returns the same model with the weights in float64's nearest float32."""
    settings = CASES[case]
    base = tiny_model(architecture)
    base.save_pretrained(folder)
    tensors: dict[str, Tensor] = {name: value.clone() for name, value in base.state_dict().items()}
    transposed = architecture == "gpt2"
    for seed, (path, module) in enumerate(base.named_modules()):
        if path.rsplit(".", 1)[-1] not in linear_targets(architecture):
            continue
        weight: Any = module.weight
        num_out, num_in = weight.shape[::-1] if transposed else weight.shape
        options = {"bits": settings["bits"], "group_size": settings["group_size"], "seed": seed}
        own = Quantized(num_out, num_in, **options, act_order="desc_act" in settings)
        if settings["quant_method"] == "awq":
            parts = own.awq()
        else:
            parts = own.gptq(settings["bits"], less_one=settings.get("checkpoint_format") != "gptq_v2")
        del tensors[f"{path}.weight"]
        for part, value in parts.items():
            dtype = torch.float16 if part == "scales" else torch.int32
            tensors[f"{path}.{part}"] = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
        exact = torch.from_numpy(own.weight.T if transposed else own.weight)
        weight.data = exact.to(torch.float32).contiguous()
    tensors.pop("lm_head.weight" if base.config.tie_word_embeddings else "", None)
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, shards)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return base.eval()


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_formula_in_float64(case: str, tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, case)
    model = MultiLoraModel.from_pretrained(tmp_path, dtype="float32")
    found, own = model.base.state_dict(), expected.state_dict()
    assert set(found) == set(own)
    for name, value in own.items():
        assert torch.equal(found[name], value), name
    assert not hasattr(model.base.config, "quantization_config")
    model.close()
    MultiLoraModel(model.base).close()  # it is a model like any other


@pytest.mark.needs("compressed_tensors")
def test_awq_is_read_as_compressed_tensors_reads_it() -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    own = Quantized(24, 32, bits=4, group_size=8, seed=3, act_order=False)
    parts = {name: torch.from_numpy(value.copy()) for name, value in own.awq().items()}
    converter = AutoAWQConverter(bits=4, group_size=8)
    values, scales, zeros = converter._convert_gemm_module(parts["qweight"], parts["scales"], parts["qzeros"])
    groups = torch.arange(32) // 8
    weight = scales.double()[:, groups] * (values.double() - zeros.double()[:, groups])
    found = packed_format(CASES["awq"] | {"group_size": 8}).dequantize(parts)
    assert torch.equal(found.double(), weight)
    assert np.array_equal(found.double().numpy(), own.weight)


def test_a_zero_of_gptq_that_has_no_room_goes_over_into_its_neighbour() -> None:
    """As in GPTQModel, which adds 0x11111111 to each word of zeros."""
    own = Quantized(8, 8, bits=4, group_size=8, seed=0, act_order=False)
    parts = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in own.gptq(4).items()}
    parts["qzeros"] = torch.tensor([[0x0000000F]], dtype=torch.int32)
    zeros = np.array([[0, 2, 1, 1, 1, 1, 1, 1]])
    expected = own.scales.astype(np.float64).T * (own.q - zeros).T
    assert np.array_equal(packed_format(CASES["gptq"] | {"group_size": 8}).dequantize(parts).double().numpy(), expected)


def test_modules_with_transposed_weights_and_several_files_are_read(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, "gptq", architecture="gpt2", shards=3)
    model = MultiLoraModel.from_pretrained(tmp_path, dtype="float32")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, adapters=[None]).logits, expected(ids).logits)


@pytest.mark.parametrize("case", ["gptq, act order", "awq"])
def test_rows_and_answers_are_those_of_peft(case: str, tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "base", case)
    adapter = random_peft_adapter(expected, tmp_path / "a", targets=linear_targets("llama"), seed=1)
    model = MultiLoraModel.from_pretrained(tmp_path / "base", dtype="float32")
    model.load_adapter("a", adapter)
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids, adapters=[None, "a"]).logits
        base = expected(ids[:1]).logits[0]
        oracle = PeftModel.from_pretrained(expected, str(adapter)).eval()
        adapted = oracle(ids[1:]).logits[0]
        answer = oracle.generate(ids[1:], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    for own, other in ((found[0], base), (found[1], adapted)):
        assert (own - other).abs().max() < 1e-4 * (other.max() - other.min())
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        (result,) = engine.generate([Request(ids[1].tolist(), adapters="a", sampling=sampling)])
    assert list(result.token_ids) == answer


def test_the_dtype_rounds_a_weight_once(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, "gptq")
    model = MultiLoraModel.from_pretrained(tmp_path, dtype="bfloat16")
    path = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.base.state_dict()[path], expected.state_dict()[path].bfloat16())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"checkpoint_format": "marlin"}, "its format is 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "its format is 'gemv'"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point is False"),
        ({"group_size": 0}, "group_size is 0"),
        ({"dynamic": {"+:.*down": {"bits": 8}}}, "settings of their own"),
        ({"bits": 8}, r"the quantized weight 'model.layers.0.*' can't be read"),
        ({"group_size": 32}, r"the quantized weight 'model.layers.0.*' can't be read"),
    ],
)
def test_what_is_not_read_is_refused_by_name(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=told):
        MultiLoraModel.from_pretrained(tmp_path)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_checkpoint(tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    path = "model.layers.0.mlp.down_proj"

    def refused(told: str, **changed: Tensor | None) -> None:
        own = tensors | {f"{path}.{name}": value for name, value in changed.items()}
        save_file({name: value for name, value in own.items() if value is not None}, file, {"format": "pt"})
        with pytest.raises(BaseModelError, match=told):
            MultiLoraModel.from_pretrained(tmp_path)

    refused("can't be read: its parts are", scales=None)
    refused("can't be read: its parts are", qweight=tensors[f"{path}.qweight"].float())
    refused("g_idx names group 99", g_idx=torch.full_like(tensors[f"{path}.g_idx"], 99))
    save_file({name: value for name, value in tensors.items() if "qweight" not in name}, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match="has no packed weights"):
        MultiLoraModel.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(BaseModelError, match=r"has no model\.safetensors"):
        MultiLoraModel.from_pretrained(tmp_path)


def test_activations_with_scales_are_refused(tmp_path: Path) -> None:
    """AutoAWQ divides some models' activations by scales of their own, which no plain model has."""
    from safetensors.torch import load_file

    write_checkpoint(tmp_path, "awq")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.act.scales": torch.ones(96)}, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match="compute something else"):
        MultiLoraModel.from_pretrained(tmp_path)


def test_other_options_for_weights_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq")
    with pytest.raises(ConfigError, match="quantized weights already"):
        MultiLoraModel.from_pretrained(tmp_path, weights="int8", dtype="bfloat16")


def test_transformers_itself_loads_the_model_that_was_dequantized(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "packed", "awq")
    model = MultiLoraModel.from_pretrained(tmp_path / "packed", dtype="float32")
    model.close()
    model.base.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.base(ids).logits)
