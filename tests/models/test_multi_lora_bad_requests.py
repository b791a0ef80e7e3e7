"""Every bad request is refused by type, with the value and the fix, before anything runs or moves."""

import math

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.errors import AdapterNotFoundError, BatchError, CapacityError, LinkSyntaxError, RequestError
from tests.models.untouched import IDS, assert_refused, five_adapters_for_three_slots
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return five_adapters_for_three_slots(tmp_path_factory.mktemp("loaded"))


BAD_REQUESTS = {
    "an unknown adapter": (["unknown", "first", None, None], AdapterNotFoundError, ["'unknown'", "'first'", "Load it"]),
    "an unknown adapter in a link": (["first+unknown", None, None, None], AdapterNotFoundError, ["'unknown'"]),
    "too few entries": (["first"], BatchError, ["1 entries", "4 rows"]),
    "too many entries": ([None] * 5, BatchError, ["5 entries", "4 rows"]),
    "no entries": ([], BatchError, ["0 entries", "4 rows"]),
    "text for a list": ("first", BatchError, ["adapters='first'", "['first'] * 4"]),
    "a name for a list": ({"first": 1.0}, BatchError, ["is not a list"]),
    "more adapters than slots": (
        ["fourth", "fifth", "first", "second"],
        CapacityError,
        ["'fifth', 'fourth'", "3 slots", "by 'first', 'second'", "num_slots"],
    ),
    "more adapters than slots in a link": (
        ["first+second+alora+fourth", None, None, None],
        CapacityError,
        ["'fourth'", "num_slots"],
    ),
}
BAD_LINKS = [
    "", "+", ":", "first:", "first:x", "first:nan", "first:inf", "first:1e999", "+first", "first+", "first++second",
    "first:1:2", "first second", "first+first", [], ["first"], [("first",)], [("first", "x")], [("first", math.inf)],
    [("first", None)], [("a:b", 1.0)], 7, ("first", 0.5), [("first", 1.0), ("first", 2.0)],
]  # fmt: skip


@pytest.mark.parametrize("run", ["forward", "generate"])
@pytest.mark.parametrize(("adapters", "error", "words"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_request_that_can_not_be_served_is_refused(model, run, adapters, error, words):
    assert_refused(model, lambda: getattr(model, run)(IDS, adapters=adapters), error, *words)


@pytest.mark.parametrize("link", BAD_LINKS, ids=repr)
def test_malformed_link_is_refused(model, link):
    words = [repr(link)] if isinstance(link, str) else []
    assert_refused(model, lambda: model(IDS, adapters=[None, link, None, None]), LinkSyntaxError, *words)


@pytest.mark.parametrize("adapters", [[], None, ["first"]], ids=repr)
@pytest.mark.parametrize("run", ["forward", "generate"])
def test_empty_batch_is_refused(model, run, adapters):
    empty = torch.zeros(0, 8, dtype=torch.int64)
    assert_refused(model, lambda: getattr(model, run)(empty, adapters=adapters), BatchError, "at least one row")


def test_request_without_any_input_is_refused(model):
    assert_refused(model, lambda: model(adapters=["first"]), BatchError, "input_ids has no rows")


def test_alora_that_has_no_ids_to_find_its_start_in_is_refused(model):
    embeddings = torch.randn(2, 8, HIDDEN_SIZE)
    words = ["row 1", "'alora'", "Pass input_ids"]
    assert_refused(model, lambda: model(inputs_embeds=embeddings, adapters=["first", "alora"]), RequestError, *words)
    assert model(inputs_embeds=embeddings, adapters=["first", "second"]).logits.shape == (2, 8, VOCAB_SIZE)
