"""The scaling head and the kept scalings against PEFT's own X-LoRA classifier and layers."""

import itertools
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.xlora.classifier import XLoraClassifier
from peft.tuners.xlora.layer import XLoraLayer
from torch import Tensor, nn

from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import kept_scalings

HIDDEN, EXPERTS, LAYERS = 24, 3, 5


def peft_config(options: dict[str, Any]) -> peft.XLoraConfig:
    return peft.XLoraConfig(hidden_size=HIDDEN, adapters={str(i): "" for i in range(EXPERTS)}, **options)


def peft_classifier(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> XLoraClassifier:
    base = nn.Linear(1, 1, dtype=dtype)  # it is asked for its dtype only
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return XLoraClassifier(base, peft_config(options), EXPERTS, LAYERS, torch.device("cpu"))


def scaling_head(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> ScalingHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return ScalingHead(
            XLoraConfig(**options), hidden_size=HIDDEN, num_experts=EXPERTS, num_layers=LAYERS, dtype=dtype
        )


def run_classifier(classifier: XLoraClassifier, hidden: Tensor) -> Tensor:
    result = SimpleNamespace(hidden_states=(hidden,))
    return classifier(result, input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("softmax", [False, True])
def test_scalings_and_gradients_equal_peft(
    depth: int, dropout: float, layerwise: bool, temperature: float, softmax: bool
) -> None:
    options = {
        "xlora_depth": depth,
        "xlora_size": 16,
        "xlora_dropout_p": dropout,
        "layerwise_scalings": layerwise,
        "softmax_temperature": temperature,
        "enable_softmax": softmax,
    }
    classifier, head = peft_classifier(options), scaling_head(options)
    assert list(head.state_dict()) == list(classifier.state_dict())
    for name, tensor in classifier.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], tensor, rtol=0, atol=0)  # the same seed

    hidden = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1)) * 3
    for training in (False, True):
        torch.manual_seed(3)  # of the dropout
        expected = run_classifier(classifier.train(training), hidden)
        torch.manual_seed(3)
        scalings = head.train(training)(hidden)
        assert scalings.shape == (2, 7, LAYERS, EXPERTS)
        torch.testing.assert_close(scalings, expected, rtol=1e-6, atol=1e-6)

    weights = torch.randn(2, 7, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (scalings * weights).sum().backward()
    for (name, mine), theirs in zip(head.named_parameters(), classifier.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_first_weights_in_bfloat16_equal_peft() -> None:
    options = {"xlora_depth": 2, "xlora_size": 16}
    expected = peft_classifier(options, torch.bfloat16).state_dict()
    state = scaling_head(options, torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def peft_kept_scalings(scalings: Tensor, options: dict[str, Any]) -> Tensor:
    config = peft_config(options)
    layers = [XLoraLayer(None, None, None, layer_number=i, config=config) for i in range(scalings.shape[2])]
    return torch.stack([layer.get_maybe_topk_scalings(scalings) for layer in layers], dim=2)


@pytest.mark.parametrize(("top_k", "softmax"), [(None, False), *itertools.product((1, 2, 3), (False, True))])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("kind", ["probabilities", "raw", "with zeros"])
def test_kept_scalings_and_their_gradients_equal_peft(
    top_k: int | None, softmax: bool, expanded: bool, kind: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    leaf = torch.randn(2, 6, 1 if expanded else LAYERS, EXPERTS, generator=generator)
    if kind == "probabilities":
        leaf = leaf.softmax(-1)
    if kind == "with zeros":  # at most one expert is 0: PEFT's gradient is NaN where nothing but zeros is kept
        leaf[..., 1] = 0
        leaf = leaf.abs()
    results = []
    weights = torch.randn(2, 6, LAYERS, EXPERTS, generator=generator)
    options = {"top_k_lora": top_k, "enable_softmax_topk": softmax}
    for function in (
        lambda scalings: peft_kept_scalings(scalings, options),
        lambda scalings: kept_scalings(scalings, XLoraConfig(**options)),
    ):
        scalings = leaf.clone().requires_grad_()
        kept = function(scalings.expand(2, 6, LAYERS, EXPERTS))
        (kept * weights).sum().backward()
        results.append((kept.detach(), scalings.grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_zero_scalings_alone_give_peft_s_zeros() -> None:
    options = {"top_k_lora": 2, "enable_softmax_topk": True}
    scalings = torch.zeros(1, 2, LAYERS, EXPERTS)
    scalings[0, 1] = torch.tensor([0.0, -1.0, 0.0])  # the top 2 are the zeros
    expected = peft_kept_scalings(scalings, options)
    assert not expected.any()
    torch.testing.assert_close(kept_scalings(scalings, XLoraConfig(**options)), expected)
