"""Models that can't generate, or whose rows change each other's tokens there."""

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.errors import BaseModelError, RequestError
from tests.architectures.variants import make_model
from tests.tiny_models import tiny_model

IDS = torch.arange(10, 34).view(2, 12)
OPTIONS = {"max_new_tokens": 3, "do_sample": False}


def test_a_model_without_generate_is_refused() -> None:
    with pytest.raises(BaseModelError, match="BertForMaskedLM can't generate"):
        MultiLoraModel(tiny_model("bert")).generate(IDS, **OPTIONS)


def test_rows_of_a_model_that_mixes_their_states_are_refused_and_right_alone() -> None:
    base, model = make_model("rwkv"), MultiLoraModel(make_model("rwkv"))
    mask = torch.ones_like(IDS)
    with pytest.raises(RequestError, match="use_cache=False"):
        model.generate(IDS, attention_mask=mask, **OPTIONS)
    without = model.generate(IDS, attention_mask=mask, use_cache=False, **OPTIONS)
    for row in range(2):
        alone = base.generate(IDS[row : row + 1], attention_mask=mask[:1], **OPTIONS)
        assert torch.equal(model.generate(IDS[row : row + 1], attention_mask=mask[:1], **OPTIONS), alone)
        assert torch.equal(without[row : row + 1], alone)


def test_rows_of_a_model_that_keeps_their_states_apart_go_on_together() -> None:
    base, model = make_model("xlstm"), MultiLoraModel(make_model("xlstm"))
    mask = torch.ones_like(IDS)
    together = model.generate(IDS, attention_mask=mask, **OPTIONS)
    for row in range(2):
        alone = base.generate(IDS[row : row + 1], attention_mask=mask[:1], **OPTIONS)
        assert torch.equal(together[row : row + 1], alone)
