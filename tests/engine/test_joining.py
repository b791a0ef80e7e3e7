"""Engines and residuals on one base model: they come and go in any order, and all is right at every moment."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.layers.attention.fast_decode import FAST_DECODE
from loraplex.layers.attention.interface import attention_functions
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.hooks import layer_number
from loraplex.residual.registry import AttentionRequest
from loraplex.training.forward.attention import fast_attention
from tests.engine.engines import Prompted, answer, assert_same, make_model
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import tiny_model

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

    def enter(self, chunk: str) -> None:
        if chunk == "residual":
            self.model.load_residual("r", self.residual)
        else:
            self.engines[chunk] = Engine(self.model, CONFIG)

    def leave(self, chunk: str) -> None:
        if chunk == "residual":
            self.model.unload("r")
            self.model.registry.linked.detach()
        else:
            self.engines.pop(chunk).close()

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
        assert all(set(attention_functions(module)) <= {FAST_DECODE} for module in base.modules())
        assert [type(module) for module in base.modules()] == self.kinds
        assert all(layer_number(module) is None for module in base.modules())
        assert not base.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("entering", list(itertools.permutations(PARTS)), ids="-".join)
def test_engines_and_residuals_enter_and_leave_in_any_order(entering):
    joined = Joined()
    for leaving in (entering, entering[::-1], (*entering[1:], entering[0])):
        for chunk in entering:
            joined.enter(chunk)
            joined.check()
        for chunk in leaving:
            joined.leave(chunk)
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


def test_training_stands_behind_engines_and_residuals_and_serves_only_itself():
    joined = Joined()
    for chunk in PARTS:
        joined.enter(chunk)
    base = joined.model.base
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    with fast_attention(base, 10), torch.no_grad():
        assert base.config._attn_implementation == "sdpa"
        trained = base(input_ids=ids).logits
        assert trained.allclose(expected, atol=1e-5)
        assert not trained.equal(expected), "training goes through attention of its own"
        with ThreadPoolExecutor(1) as other:
            elsewhere = other.submit(torch.no_grad()(lambda: base(input_ids=ids).logits)).result()
        assert elsewhere.equal(expected)
        joined.check()
        joined.leave("first")
        joined.check()
    for chunk in PARTS[1:]:
        joined.leave(chunk)
    joined.check_base()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_training_gives_the_gradients_of_torchs(name: str, dtype: torch.dtype) -> None:
    base = tiny_model(name, dtype=dtype)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        logits = base(inputs_embeds=embedded, attention_mask=mask).logits[mask.bool()].float()
        (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
        return logits.detach(), gradient[mask.bool()]

    expected = gradients()
    with fast_attention(base, 10):
        found = gradients()
    for ours, torchs in zip(found, expected, strict=True):
        assert (ours - torchs).abs().max() <= 16 * torch.finfo(dtype).eps * torchs.abs().max()


def test_an_engine_of_one_model_does_not_touch_another() -> None:
    joined, other = Joined(), Joined()
    joined.enter("first")
    assert other.model.base.config._attn_implementation == "sdpa"
    assert isinstance(other.model, MultiLoraModel)
    other.check()
