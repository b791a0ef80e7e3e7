"""Every variant through every feature; what each shows is what docs/architectures.md says."""

import pytest

from tests.architectures.checks import Case, outcome
from tests.architectures.table import features_of, words_on_page
from tests.architectures.variants import ARCHS

# The families that people use most.
COMMON = (
    "llama",
    "llama31-rope",
    "mistral",
    "ministral3",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "phi3-longrope",
    "deepseek_v3",
    "gpt_oss",
    "olmo2",
    "granite",
    "lfm2",
)
PARAMETERS = [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in ARCHS]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_row_is_equal_to_its_oracle_or_refused_as_the_page_says(name: str) -> None:
    case = Case(name)
    found = {feature: outcome(case, feature) for feature in features_of(name)}
    assert {feature: one.word for feature, one in found.items()} == words_on_page()[name], found


def test_the_page_has_every_variant_and_no_other() -> None:
    assert list(words_on_page()) == list(ARCHS)
