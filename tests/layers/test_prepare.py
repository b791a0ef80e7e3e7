"""From an adapter at rest to slot weights."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleKind
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers.prepare import dora_norm_ratio, prepare_adapter, prepare_weights

IN, OUT, RANK = 48, 40, 6


def make_weights(
    kind: ModuleKind = "linear", dtype: torch.dtype = torch.float32, *, dora: bool = False, scaling: float = 1.5
) -> LoraWeights:
    return LoraWeights(
        kind=kind,
        lora_a=torch.randn(RANK, IN, dtype=dtype),
        lora_b=torch.randn(RANK, OUT, dtype=dtype),
        scaling=scaling,
        magnitude=torch.rand(OUT, dtype=dtype) + 0.5 if dora else None,
    )


def norm_ratio_in_float64(weights: LoraWeights, base: torch.Tensor) -> torch.Tensor:
    """c = m / ||W + scaling * B A|| for W [out, in], one output at a time."""
    assert weights.magnitude is not None
    ratios = []
    for out in range(OUT):
        update = weights.lora_b[:, out].double() @ weights.lora_a.double()
        merged = base[out].double() + weights.scaling * update
        ratios.append(weights.magnitude[out].double() / merged.pow(2).sum().sqrt())
    return torch.stack(ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_ratio_equals_float64(dtype):
    weights, base = make_weights(dtype=dtype, dora=True), torch.randn(OUT, IN, dtype=dtype)
    ratio = dora_norm_ratio(weights, base)
    assert ratio.dtype == torch.float32
    torch.testing.assert_close(ratio.double(), norm_ratio_in_float64(weights, base), rtol=2e-6, atol=0)


def linear_module() -> tuple[nn.Module, torch.Tensor]:
    module = nn.Linear(IN, OUT)
    return module, module.weight.detach()


def conv1d_module() -> tuple[nn.Module, torch.Tensor]:
    module = Conv1D(OUT, IN)
    return module, module.weight.detach().t()


def embedding_module() -> tuple[nn.Module, torch.Tensor]:
    module = nn.Embedding(IN, OUT)
    return module, module.weight.detach().t()


@pytest.mark.parametrize("make_module", [linear_module, conv1d_module, embedding_module])
@torch.no_grad()
def test_dora_is_folded_into_b_and_a_gain_whatever_way_the_module_stores_its_weight(make_module):
    module, base = make_module()
    weights = make_weights("embedding" if isinstance(module, nn.Embedding) else "linear", dora=True)
    prepared = prepare_weights("module", weights, module, torch.float32)
    ratio = norm_ratio_in_float64(weights, base)
    torch.testing.assert_close(prepared.dora_scale.double(), ratio - 1, rtol=0, atol=1e-5)
    torch.testing.assert_close(prepared.lora_b.double(), weights.lora_b.double() * ratio, rtol=1e-5, atol=1e-6)
    assert torch.equal(prepared.lora_a, weights.lora_a)
    assert prepared.scaling == weights.scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_take_the_dtype_of_the_base_and_are_contiguous(dtype):
    weights = make_weights(dtype=torch.float32)
    transposed = LoraWeights(
        kind="linear", lora_a=torch.randn(IN, RANK).t(), lora_b=torch.randn(OUT, RANK).t(), scaling=1.0
    )
    for given in (weights, transposed):
        prepared = prepare_weights("module", given, nn.Linear(IN, OUT), dtype)
        assert prepared.lora_a.dtype == prepared.lora_b.dtype == dtype
        assert prepared.lora_a.is_contiguous()
        assert prepared.lora_b.is_contiguous()
        assert torch.equal(prepared.lora_a, given.lora_a.to(dtype))
        assert torch.equal(prepared.lora_b, given.lora_b.to(dtype))
        assert prepared.dora_scale is None


def test_gain_keeps_float32_beside_factors_of_the_base_dtype():
    prepared = prepare_weights("module", make_weights(dora=True), nn.Linear(IN, OUT), torch.bfloat16)
    assert prepared.lora_b.dtype == torch.bfloat16
    assert prepared.dora_scale.dtype == torch.float32


def scaled_embedding() -> nn.Module:
    return Gemma3TextScaledWordEmbedding(IN, OUT, padding_idx=0, embed_scale=OUT**0.5)


def test_adapter_of_a_scaled_embedding_takes_its_scale():
    """Gemma multiplies what it looks up, and with it what the adapter adds."""
    weights = make_weights("embedding")
    assert prepare_weights("embed", weights, scaled_embedding(), torch.float32).scaling == pytest.approx(
        weights.scaling * OUT**0.5, rel=1e-6
    )
    assert prepare_weights("embed", weights, nn.Embedding(IN, OUT), torch.float32).scaling == weights.scaling


def test_dora_on_a_scaled_embedding_is_refused():
    with pytest.raises(UnsupportedAdapterError, match=r"'model.embed_tokens'.*without DoRA"):
        prepare_weights("model.embed_tokens", make_weights("embedding", dora=True), scaled_embedding(), torch.float32)


def test_layers_are_numbered_and_ordered_as_the_base_registers_its_modules():
    modules = {"first": nn.Linear(IN, OUT), "second": nn.Linear(IN, OUT), "third": nn.Linear(IN, OUT)}
    config = LoraConfig(r=RANK, target_modules=("third", "first"), alora_invocation_tokens=(3, 4))
    layers = {"third": make_weights(), "first": make_weights()}
    index = {path: number for number, path in enumerate(modules)}
    prepared = prepare_adapter(Adapter(config=config, layers=layers), modules, index, torch.float32)
    assert list(prepared.layers) == [0, 2]
    assert torch.equal(prepared.layers[2].lora_a, layers["third"].lora_a)
    assert prepared.invocation == (3, 4)
    assert prepared.num_bytes == 2 * 4 * RANK * (IN + OUT)
