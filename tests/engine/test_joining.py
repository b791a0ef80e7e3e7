"""Engines and residuals on one base model: they come and go in any order, and all is right at every moment."""

import itertools

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.linked import AttentionRequest
from loraplex.training.attention import fast_attention
from tests.engine.engines import Prompted, answer, assert_same, make_model
from tests.residual.tiny_residuals import random_linked

CONFIG = EngineConfig(cache_bytes=2**20, max_length=60)
PROMPT = tuple(range(20, 45))
PARTS = ("first", "second", "residual")


class Joined:
    """One base model, two engines and a residual that come and go."""

    def __init__(self) -> None:
        self.model = make_model("llama", {}, mixtures=False)
        self.kinds = [type(module) for module in self.model.base.modules()]
        self.residual = random_linked(make_model("llama", {}, mixtures=False).registry.linked.layers, 1)
        self.engines: dict[str, Engine] = {}
        self.expected = {}

    def enter(self, part: str) -> None:
        if part == "residual":
            self.model.load_residual("r", self.residual)
        else:
            self.engines[part] = Engine(self.model, CONFIG)

    def leave(self, part: str) -> None:
        if part == "residual":
            self.model.unload("r")
            self.model.registry.linked.detach()
        else:
            self.engines.pop(part).close()

    def check(self) -> None:
        """Everything that is there answers as `generate` did by itself."""
        choices = [None, "r"] if "r" in self.model.names() else [None]
        for choice in choices:
            prompted = Prompted(PROMPT, choice)
            tokens = answer(self.model, prompted, 5)
            assert self.expected.setdefault(choice, tokens) == tokens
            for engine in self.engines.values():
                engine.clear_prefix_cache()
                assert_same(self.model, prompted, engine.generate([prompted.request(max_tokens=5)])[0], tokens)

    def check_base(self) -> None:
        base = self.model.base
        assert base.config._attn_implementation == "sdpa"
        assert [type(module) for module in base.modules()] == self.kinds
        assert not any(hasattr(module, "loraplex_attention_layer") for module in base.modules())
        assert not base.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("entering", list(itertools.permutations(PARTS)), ids="-".join)
def test_engines_and_residuals_enter_and_leave_in_any_order(entering):
    joined = Joined()
    for leaving in (entering, entering[::-1], (*entering[1:], entering[0])):
        for part in entering:
            joined.enter(part)
            joined.check()
        for part in leaving:
            joined.leave(part)
            joined.check()
        joined.check_base()
    assert joined.expected[None] != joined.expected["r"]


def test_attention_that_was_given_back_is_joined_again_by_what_needs_it():
    joined = Joined()
    joined.enter("residual")
    joined.enter("first")
    joined.check()
    joined.model.registry.linked.detach()
    joined.check()
    request = AttentionRequest(capture=CaptureRequest())
    with torch.no_grad():
        joined.model(torch.tensor([PROMPT]), attention=request)
    assert request.captures[0] is not None


def test_training_changes_the_attention_behind_engines_and_residuals():
    joined = Joined()
    for part in PARTS:
        joined.enter(part)
    base = joined.model.base
    with fast_attention(base, 10):
        assert base.config._attn_implementation == "loraplex_packed_loraplex_eager"
        joined.check()
        joined.leave("first")
        joined.check()
    for part in PARTS[1:]:
        joined.leave(part)
    joined.check_base()


def test_an_engine_of_one_model_does_not_touch_another() -> None:
    joined, other = Joined(), Joined()
    joined.enter("first")
    assert other.model.base.config._attn_implementation == "sdpa"
    assert isinstance(other.model, MultiLoraModel)
    other.check()
