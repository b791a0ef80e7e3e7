"""What a mixture's settings may be."""

import math
from typing import Any

import pytest

from loraplex.errors import ConfigError
from loraplex.xlora.config import XLoraConfig


def test_defaults_are_valid_and_switch_the_experts_off_in_the_scaling_pass() -> None:
    config = XLoraConfig()
    assert config.pass_value(4) == 0
    assert config.xlora_depth == 1


def test_pass_value_none_is_one_over_the_experts() -> None:
    assert XLoraConfig(scaling_pass_value=None).pass_value(4) == 0.25
    assert XLoraConfig(scaling_pass_value=0.5).pass_value(4) == 0.5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[(option, value) for option in ("xlora_depth", "xlora_size") for value in (0, -1, 1.5, True, None, "2")],
        *[("top_k_lora", value) for value in (0, -1, 1.0, True, "1")],
        *[("xlora_dropout_p", value) for value in (-0.1, 1, 1.5, math.nan, True, None)],
        *[("softmax_temperature", value) for value in (0, -1.0, math.inf, math.nan, True, "1")],
        *[("scaling_pass_value", value) for value in (math.nan, math.inf, True, "0")],
        *[("global_scaling_weight", value) for value in (math.nan, -math.inf, False, None, 10**30, -(2**63))],
        *[(option, value) for option in ("layerwise_scalings", "enable_softmax") for value in (1, None, "yes")],
        *[(option, 1) for option in ("use_trainable_adapters", "use_bias", "enable_relu_and_dropout")],
    ],
)
def test_bad_value_is_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} is "):
        XLoraConfig(**{option: value})


def test_softmax_over_the_top_k_needs_a_top_k() -> None:
    with pytest.raises(ConfigError, match=r"top_k_lora is None.*Set top_k_lora"):
        XLoraConfig(enable_softmax_topk=True)
    assert XLoraConfig(enable_softmax_topk=True, top_k_lora=2).enable_softmax  # both softmaxes, as in PEFT


@pytest.mark.parametrize("option", ["scaling_pass_value", "global_scaling_weight"])
def test_negative_and_whole_numbers_are_numbers(option: str) -> None:
    assert getattr(XLoraConfig(**{option: -2}), option) == -2


def test_top_k_is_at_most_the_number_of_experts() -> None:
    XLoraConfig(top_k_lora=3).check_num_experts(3)
    with pytest.raises(ConfigError, match=r"top_k_lora is 3, but the mixture has 2 experts.*1 to 2"):
        XLoraConfig(top_k_lora=3).check_num_experts(2)
    with pytest.raises(ConfigError, match="0 experts"):
        XLoraConfig().check_num_experts(0)
