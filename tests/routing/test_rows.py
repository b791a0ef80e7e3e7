"""From rows to the tokens that layers see."""

import pytest
import torch

from loraplex.adapters.prepared import PreparedAdapter
from loraplex.adapters.slot_weights import SlotWeights
from loraplex.adapters.slots import Slots
from loraplex.errors import BatchError
from loraplex.routing.bank import SlotBank
from loraplex.routing.rows import Route, RowRouting, current_routing, use_routing


@pytest.fixture
def bank():
    slots = Slots(3, ["m"], torch.device("cpu"))
    for slot in range(3):
        weights = SlotWeights(lora_a=torch.randn(2, 4), lora_b=torch.randn(2, 4), scaling=1.0)
        slots.put(slot, PreparedAdapter(layers={0: weights}))
    return SlotBank(slots)


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


def test_alora_is_active_on_the_last_tokens_of_each_beam_only(bank):
    routing = RowRouting([[Route(slot=0, last_tokens=2)], [Route(slot=1, last_tokens=0)]], bank)
    assert segments(routing, 4, 3) == [(1, 3, 0, 1.0), (4, 6, 0, 1.0)]
    assert segments(routing, 2, 1) == [(0, 1, 0, 1.0)]  # a later decoding step


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
