"""Positions that depend on a sequence's length are each row's own, beside longer rows and after them."""

import pytest
import torch
from torch import Tensor

from loraplex import MultiLoraModel
from tests.architectures.variants import make_model

NAMES = ("phi3-longrope", "llama-dynamic-ntk")  # both change at 24 tokens
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
SHORT, LONG = torch.arange(20, 29), torch.arange(30, 70)


def batch() -> tuple[Tensor, Tensor]:
    """A row of 9 tokens and one of 40, padded on the left: ids and mask."""
    ids = torch.stack([torch.cat([torch.zeros(31, dtype=torch.int64), SHORT]), LONG])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_logits_that_a_fresh_model_gives_it_alone(name: str) -> None:
    ids, mask = batch()
    model = MultiLoraModel(make_model(name))
    together = model.generate(ids, attention_mask=mask, adapters=[None, None], **OPTIONS)
    for row in range(2):
        alone = make_model(name).generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **OPTIONS)
        for step in range(len(alone.logits)):
            assert torch.allclose(together.logits[step][row], alone.logits[step][0], atol=1e-4)
    mixed = make_model(name).generate(ids, attention_mask=mask, **OPTIONS)
    assert (mixed.logits[1][0] - together.logits[1][0]).abs().max() > 1e-2, "the rows' lengths make no difference"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_short_row_after_a_long_one_is_as_before(name: str) -> None:
    model = MultiLoraModel(make_model(name))
    first = model(SHORT[None]).logits
    model(LONG[None])
    assert torch.equal(model(SHORT[None]).logits, first)


@torch.no_grad()
def test_outside_of_a_call_the_model_is_what_it_was() -> None:
    base = make_model("phi3-longrope")
    ids, mask = batch()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    before = base(ids, attention_mask=mask, position_ids=positions).logits
    model = MultiLoraModel(base)
    assert torch.equal(base(ids, attention_mask=mask, position_ids=positions).logits, before)
    assert not torch.equal(model(ids, mask, position_ids=positions).logits[0, -9:], before[0, -9:])
