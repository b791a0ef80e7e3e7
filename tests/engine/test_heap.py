"""The garbage collector passes over the heap while engines run, and visits it again when they are gone."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from loraplex import Engine, MultiLoraModel
from loraplex.engine import gc_freeze as heap
from loraplex.engine.gc_freeze import freeze_gc
from tests.tiny_models import tiny_model


class Owner:
    me: "Owner"


@pytest.fixture
def model() -> MultiLoraModel:
    return MultiLoraModel(tiny_model("llama"))


@pytest.fixture(autouse=True)
def unfrozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no engine of another test were there."""
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    monkeypatch.setattr(heap, "_num_owners", 0)
    yield
    gc.unfreeze()
    if was_frozen:
        gc.freeze()


def test_an_engine_freezes_what_was_there_until_it_is_closed(model: MultiLoraModel) -> None:
    assert gc.get_freeze_count() == 0
    with Engine(model):
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_the_last_owner_counts() -> None:
    first, second = Owner(), Owner()
    thaw_first, thaw_second = freeze_gc(first), freeze_gc(second)
    thaw_first()
    thaw_first()  # once is enough
    assert gc.get_freeze_count() > 0
    thaw_second()
    assert gc.get_freeze_count() == 0


def test_garbage_from_before_is_collected_afterwards() -> None:
    lost = Owner()
    lost.me = lost
    watch, owner = weakref.ref(lost), Owner()
    thaw = freeze_gc(owner)
    del lost
    gc.collect()
    assert watch() is not None  # passed over
    thaw()
    gc.collect()
    assert watch() is None


def test_an_engine_that_is_lost_without_being_closed_leaves_too(model: MultiLoraModel) -> None:
    engine = Engine(model)
    assert gc.get_freeze_count() > 1000
    del engine
    gc.collect()
    assert gc.get_freeze_count() == 0


def test_a_heap_that_somebody_else_froze_is_left_alone() -> None:
    gc.freeze()
    owner = Owner()
    freeze_gc(owner)()
    assert gc.get_freeze_count() > 0
