"""The scaling head and the kept scalings, where PEFT is no oracle."""

import pytest
import torch
from torch import nn

from loraplex.errors import ConfigError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import kept_scalings

HIDDEN, EXPERTS, LAYERS = 8, 3, 5


def head(config: XLoraConfig, dtype: torch.dtype = torch.float32) -> ScalingHead:
    torch.manual_seed(0)
    return ScalingHead(config, hidden_size=HIDDEN, num_experts=EXPERTS, num_layers=LAYERS, dtype=dtype).eval()


def test_head_without_relu_and_bias_is_one_linear_map() -> None:
    config = XLoraConfig(
        xlora_depth=3, xlora_size=16, use_bias=False, enable_relu_and_dropout=False, enable_softmax=False
    )
    module = head(config)
    assert list(module.state_dict()) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    first, second, last = (tensor.double() for tensor in module.state_dict().values())
    hidden = torch.randn(4, HIDDEN)
    expected = (hidden.double() @ (last @ second @ first).T).float()  # [4, experts]
    torch.testing.assert_close(module(hidden), expected[:, None].expand(4, LAYERS, EXPERTS), rtol=1e-5, atol=1e-6)


def test_without_relu_there_is_no_dropout_in_training_either() -> None:
    module = head(XLoraConfig(xlora_depth=2, xlora_size=16, enable_relu_and_dropout=False, xlora_dropout_p=0.9))
    assert not any(isinstance(layer, nn.Dropout | nn.ReLU) for layer in module.layers)
    hidden = torch.randn(4, HIDDEN)
    torch.testing.assert_close(module.train()(hidden), module.eval()(hidden))


def test_scalings_are_float32_and_hidden_states_of_any_dtype_and_shape_go_in() -> None:
    module = head(XLoraConfig(layerwise_scalings=True), torch.bfloat16)
    for hidden in (torch.randn(HIDDEN), torch.randn(0, HIDDEN), torch.randn(2, 3, HIDDEN, dtype=torch.float64)):
        scalings = module(hidden)
        assert scalings.dtype == torch.float32
        assert scalings.shape == (*hidden.shape[:-1], LAYERS, EXPERTS)
        torch.testing.assert_close(scalings.sum(-1), torch.ones(*hidden.shape[:-1], LAYERS))


def test_layers_share_memory_unless_layerwise() -> None:
    scalings = head(XLoraConfig())(torch.randn(2, HIDDEN))
    assert scalings.stride(-2) == 0
    kept = kept_scalings(scalings, XLoraConfig(top_k_lora=2, enable_softmax_topk=True))
    assert kept.shape == scalings.shape
    assert kept.stride(-2) == 0
    torch.testing.assert_close(
        kept, kept_scalings(scalings.contiguous(), XLoraConfig(top_k_lora=2, enable_softmax_topk=True))
    )


def test_more_kept_experts_than_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k_lora is 4"):
        head(XLoraConfig(top_k_lora=4))


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
def test_gradient_is_zero_where_no_expert_is_left(row: list[float]) -> None:
    scalings = torch.tensor([[row], [[0.5, 0.2, 0.3]]], requires_grad=True)  # [tokens, layers, experts]
    kept = kept_scalings(scalings, XLoraConfig(top_k_lora=2, enable_softmax_topk=True))
    (kept * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scalings.grad is not None
    assert not scalings.grad[0].any()
    # d/ds of softmax over (0.5, 0.3): p * (1 - p) * the difference of the weights
    slope = 2 * kept[1, 0, 0].item() * kept[1, 0, 2].item()
    torch.testing.assert_close(scalings.grad[1, 0], torch.tensor([-slope, 0.0, slope]))


def test_kept_scalings_pass_gradcheck() -> None:
    scalings = torch.rand(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for softmax in (False, True):
        config = XLoraConfig(top_k_lora=2, enable_softmax_topk=softmax)
        assert torch.autograd.gradcheck(lambda x, config=config: kept_scalings(x, config), (scalings,))
