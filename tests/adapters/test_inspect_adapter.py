import json
import math
from pathlib import Path

import pytest
import torch

from loraplex.adapters.inspect import describe, update_norm
from loraplex.adapters.weights import LoraWeights
from tests.adapters.folders import LAYER, lora_pair, write_folder


@pytest.mark.parametrize("scaling", [0.0, 0.5, -3.0])
def test_update_norm_is_that_of_the_product(scaling: float) -> None:
    lora_a, lora_b = torch.randn(4, 30, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    weights = LoraWeights(kind="linear", lora_a=lora_a, lora_b=lora_b, scaling=scaling)
    assert update_norm(weights) == pytest.approx(float((scaling * lora_b.t() @ lora_a).norm()))


def test_report_groups_modules_by_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        **lora_pair(f"{LAYER}.q_proj", rank=2),
        **lora_pair("base_model.model.model.layers.1.self_attn.q_proj"),
        **lora_pair("base_model.model.model.layers.2.self_attn.q_proj", out_features=12),
        **lora_pair(f"{LAYER}.v_proj"),
    }
    settings = {"rank_pattern": {r"layers\.0.*q_proj": 2}, "use_rslora": True, "task_type": "CAUSAL_LM"}
    report = describe(write_folder(tmp_path / "protein", settings, tensors))
    assert (report.name, report.method, report.rslora) == ("protein", "LoRA", True)
    assert (report.min_rank, report.max_rank, report.alphas) == (2, 4, (8,))
    assert report.scalings == (4.0, pytest.approx(8 / math.sqrt(2)))
    assert (report.base_model, report.task_type, report.dtypes) == ("tiny/llama", "CAUSAL_LM", ("float32",))
    assert report.num_modules == 4
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.num_bytes == 4 * report.num_parameters
    counts = {(group.module_type, group.out_features): group.count for group in report.groups}
    assert counts == {("q_proj", 24): 2, ("q_proj", 12): 1, ("v_proj", 24): 1}
    (value,) = (group for group in report.groups if group.module_type == "v_proj")
    lora_a, lora_b = tensors[f"{LAYER}.v_proj.lora_A.weight"], tensors[f"{LAYER}.v_proj.lora_B.weight"]
    assert value.norm_a.max == pytest.approx(float(lora_a.norm()))
    assert value.norm_b.mean == pytest.approx(float(lora_b.norm()))
    assert value.norm_update.max == pytest.approx(4 * float((lora_b @ lora_a).norm()), rel=1e-5)
    json.dumps(report.as_json(), allow_nan=False)


def test_mean_and_maximum_are_over_the_modules_of_a_group(tmp_path: Path) -> None:
    tensors = lora_pair(f"{LAYER}.q_proj") | lora_pair("base_model.model.model.layers.1.self_attn.q_proj")
    (group,) = describe(write_folder(tmp_path, tensors=tensors)).groups
    norms = [float(tensor.norm()) for name, tensor in tensors.items() if "lora_A" in name]
    assert group.norm_a.mean == pytest.approx(sum(norms) / 2)
    assert group.norm_a.max == pytest.approx(max(norms))


def test_report_names_dora_and_alora(tmp_path: Path) -> None:
    magnitude = {f"{LAYER}.q_proj.lora_magnitude_vector": torch.rand(24)}
    folder = write_folder(tmp_path / "dora", {"use_dora": True}, lora_pair(f"{LAYER}.q_proj") | magnitude)
    dora = describe(folder)
    assert dora.method == "DoRA"
    assert dora.num_parameters == 4 * 16 + 24 * 4 + 24
    alora = describe(write_folder(tmp_path / "alora", {"alora_invocation_tokens": [7, 8]}))
    assert (alora.method, alora.alora_invocation_tokens) == ("aLoRA", (7, 8))
