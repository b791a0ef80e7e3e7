"""Several adapters as one LoRA: what it computes is the weighted sum of what each computes."""

import pytest
import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.vllm_plugin.concatenate import concatenate, index_members, total_rank

IN, OUT = 6, 5


def adapter(seed, ranks, scaling):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        path: LoraWeights(
            kind="linear",
            lora_a=torch.randn(rank, IN, generator=generator),
            lora_b=torch.randn(rank, OUT, generator=generator),
            scaling=scaling,
        )
        for path, rank in ranks.items()
    }
    return Adapter(config=LoraConfig(), layers=layers)


@pytest.fixture
def parts():
    protein = adapter(0, {"q": 2, "v": 3}, scaling=2.0)
    materials = adapter(1, {"q": 4, "o": 1}, scaling=0.5)
    return index_members([(protein, 0.7), (materials, -0.3)])


def test_every_module_computes_the_weighted_sum(parts):
    x = torch.randn(IN)
    for path, (lora_a, lora_b) in concatenate(parts, torch.float32).items():
        layers = [(part.weight, part.adapter.layers[path]) for part in parts if path in part.adapter.layers]
        expected = sum(weight * w.scaling * (w.lora_a @ x) @ w.lora_b for weight, w in layers)
        torch.testing.assert_close(lora_b @ (lora_a @ x), expected)


def test_an_adapter_owns_the_same_columns_in_every_module(parts):
    assert [(part.first, part.rank) for part in parts] == [(0, 3), (3, 4)]
    assert total_rank(parts) == 7
    modules = concatenate(parts, torch.float32)
    assert set(modules) == {"q", "v", "o"}
    lora_a, lora_b = modules["q"]
    assert torch.equal(lora_a[3:7], parts[1].adapter.layers["q"].lora_a)
    assert not lora_a[2].any()  # protein has rank 2 there, and 3 elsewhere
    assert not lora_b[:, 2].any()
    assert not modules["v"][0][3:].any()  # materials doesn't adapt it


def test_scaling_is_folded_in_before_rounding(parts):
    _, lora_b = concatenate(parts, torch.bfloat16)["v"]
    weights = parts[0].adapter.layers["v"]
    assert torch.equal(lora_b[:, :3], (weights.lora_b * (0.7 * 2.0)).t().to(torch.bfloat16))
