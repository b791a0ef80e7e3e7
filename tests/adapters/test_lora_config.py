import math
from typing import Any

import pytest

from loraplex.adapters.config import LoraConfig
from loraplex.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"lora_alpha": 10**30}, "lora_alpha is 1000"),
        ({"base_model_name_or_path": ["tiny/llama"]}, "base_model_name_or_path is .'tiny/llama'.; it must be a text"),
        ({"base_model_name_or_path": 0.5}, "base_model_name_or_path is 0.5"),
        ({"task_type": {}}, "task_type is {}"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"use_dora": None}, "use_dora is None"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] is -1"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": math.inf}}, r"alpha_pattern\['q_proj'\] is inf"),
        ({"alpha_pattern": {"q_proj(": 4}}, "not a regular expression"),
        ({"target_modules": ["q_proj"]}, "must be a tuple"),
        ({"target_modules": (1, 2)}, "must be a tuple of names"),
        ({"target_modules": "*q_proj"}, "not a regular expression"),
        ({"exclude_modules": "["}, "not a regular expression"),
        ({"target_modules": ".*q_proj", "layers_to_transform": (0,)}, "need a list of target_modules"),
        ({"target_modules": ("q_proj",), "layers_pattern": ("layers",)}, "set both or neither"),
        ({"layers_to_transform": (-1,)}, "layers_to_transform is"),
        ({"layers_to_transform": (0,), "layers_pattern": "layers"}, "layers_pattern is 'layers'"),
        ({"layers_to_transform": (0,), "layers_pattern": ("(",)}, "not a regular expression"),
        ({"alora_invocation_tokens": ()}, "alora_invocation_tokens is empty"),
        ({"alora_invocation_tokens": (3, -1)}, "alora_invocation_tokens is"),
        ({"alora_invocation_tokens": (3,), "use_dora": True}, "can't be combined"),
    ],
)
def test_setting_that_cannot_be_used_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_scaling_is_alpha_over_rank_and_over_its_root_for_rslora() -> None:
    assert LoraConfig(r=16, lora_alpha=8).scaling_of("q_proj") == 0.5
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling_of("q_proj") == 2.0


def test_pattern_matches_last_components_and_first_match_counts() -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={r"layers\.0\.q_proj": 2, "q_proj": 16},
        alpha_pattern={"^q_proj": 1, "v_proj": 3},
    )
    ranks = {path: config.rank_of(path) for path in ("layers.0.q_proj", "layers.1.q_proj", "my_q_proj", "v_proj")}
    assert ranks == {"layers.0.q_proj": 2, "layers.1.q_proj": 16, "my_q_proj": 4, "v_proj": 4}
    assert config.alpha_of("q_proj") == 1
    assert config.alpha_of("layers.0.q_proj") == 8  # `^` anchors at the start of the whole path
    assert config.scaling_of("layers.0.v_proj") == 3 / 4
