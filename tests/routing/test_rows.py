"""From rows to the tokens that layers see."""

import pytest
import torch

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.store.slots import Slots
from loraplex.errors import BatchError
from loraplex.routing.routing import current_routing, use_routing
from loraplex.routing.rows import Route, RowRouting
from loraplex.routing.weight_provider import SlotWeightProvider


@pytest.fixture
def bank():
    slots = Slots(3, ["m"], torch.device("cpu"))
    for slot in range(3):
        weights = SlotWeights(lora_a=torch.randn(2, 4), lora_b=torch.randn(2, 4), scaling=1.0)
        slots.put(slot, PreparedAdapter(layers={0: weights}))
    return SlotWeightProvider(slots)


def segments(routing, sequences, length):
    return [tuple(segment) for segment in routing.plan_for(sequences, length).segments]


def test_rows_become_runs_of_tokens_and_base_rows_become_nothing(bank):
    routing = RowRouting([[], [Route(slot=2, weight=0.5)], [Route(slot=0), Route(slot=1)]], bank)
    assert segments(routing, 3, 4) == [(8, 12, 0, 1.0), (4, 8, 2, 0.5), (8, 12, 1, 1.0)]


def test_rows_of_one_adapter_follow_each_other_and_a_link_keeps_its_order(bank):
    routing = RowRouting([[Route(slot=2), Route(slot=1)], [Route(slot=1)], [Route(slot=2), Route(slot=0)]], bank)
    assert [segment[:3] for segment in segments(routing, 3, 1)] == [
        (1, 2, 1),
        (0, 1, 2),
        (2, 3, 2),
        (2, 3, 0),
        (0, 1, 1),
    ]


def test_beams_of_a_row_take_the_rows_routes(bank):
    routing = RowRouting([[Route(slot=1)], []], bank)
    assert segments(routing, 6, 2) == [(0, 6, 1, 1.0)]


def test_alora_is_active_from_its_column_on_in_each_beam(bank):
    routing = RowRouting([[Route(slot=0, active_from=1)], [Route(slot=1, active_from=4)]], bank)
    routing.begin_pass(3, 3)
    assert segments(routing, 4, 3) == [(1, 3, 0, 1.0), (4, 6, 0, 1.0)]
    assert segments(routing, 2, 1) == [(0, 1, 0, 1.0)]  # a layer that sees the last token only
    routing.begin_pass(1, 5)  # decoding, with a cache
    assert segments(routing, 2, 1) == [(0, 1, 0, 1.0), (1, 2, 1, 1.0)]
    assert segments(routing, 2, 5) == [(1, 5, 0, 1.0), (9, 10, 1, 1.0)]  # a layer that sees the cache too


def test_alora_goes_on_where_a_cache_does_not_tell_its_length(bank):
    routing = RowRouting([[Route(slot=0, active_from=4)]], bank)
    routing.begin_pass(3, 3)
    routing.begin_pass(2, None)
    assert segments(routing, 1, 2) == [(1, 2, 0, 1.0)]


def test_alora_in_tokens_of_which_it_is_not_known_where_they_are_is_refused(bank):
    routing = RowRouting([[Route(slot=0, active_from=1)]], bank)
    with pytest.raises(BatchError, match="3 tokens a row"):
        routing.plan_for(1, 3)
    routing.begin_pass(1, 2)
    with pytest.raises(BatchError, match="3 tokens a row"):
        routing.plan_for(1, 3)


def test_rows_of_the_same_adapters_are_uniform(bank):
    def is_uniform(*rows):
        return RowRouting(rows, bank).is_uniform

    assert is_uniform([Route(slot=1)], [Route(slot=1)])
    assert is_uniform([], [])
    assert not is_uniform([Route(slot=1)], [])
    assert not is_uniform([Route(slot=1)], [Route(slot=1, weight=0.5)])
    assert not is_uniform([Route(slot=1, active_from=2)], [Route(slot=1, active_from=2)])
    assert not is_uniform([Route(slot=1, column=0)])


def test_plans_that_are_kept_are_not_without_number(bank):
    routing = RowRouting([[Route(slot=1)]], bank)
    for length in range(1, 200):
        routing.plan_for(1, length)
    assert len(routing._plans) < 100


def test_layout_that_does_not_keep_rows_is_refused(bank):
    with pytest.raises(BatchError, match="3 sequences for 2 rows"):
        RowRouting([[Route(slot=0)], []], bank).plan_for(3, 5)


def test_plans_of_a_layout_are_kept(bank):
    routing = RowRouting([[Route(slot=0)]], bank)
    assert routing.plan_for(1, 1) is routing.plan_for(1, 1)


def test_routing_is_current_only_inside_its_scope(bank):
    routing = RowRouting([[Route(slot=0)]], bank)

    def fail_inside():
        with use_routing(routing):
            assert current_routing() is routing
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert current_routing() is None
