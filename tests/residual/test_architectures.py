"""Residuals, captures and steering on models of every kind: what eager attention of transformers gives, or refused."""

import pytest
import torch
from transformers import PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.errors import BaseModelError, RequestError
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.rows import RowAttention
from loraplex.residual.steering import Steering
from tests.architectures.variants import ARCHS, make_model
from tests.hook_oracle import as_oracle, logits_with, own_attentions
from tests.models.untouched import BaseSnapshot
from tests.parity.oracle import assert_close
from tests.residual.tiny_residuals import forward, random_linked, random_vector, row

LENGTH = 30  # longer than windows, chunks and the lengths from which rotary positions change
# Those whose attention has something that the others' hasn't: an index mask, block masks, a mask of its own for each
# head, arguments by name, keys shared between layers, text inside a larger model, recurrent layers, a cache of its own.
NAMES = (
    "afmoe",
    "deepseek_v32",
    "doge",
    "gemma2",
    "gemma3n_text",
    "gemma4_text-E",
    "glm_moe_dsa",
    "llama4_text",
    "minimax",
    "minimax_m3",
    "modernbert",
    "modernbert-decoder",
    "recurrent_gemma",
    "vlm-gemma3",
    "vlm-llama4",
)
# By name, what the error says.
REFUSED = {
    "deepseek_v4": "s_aux",
    "gpt_oss": "s_aux",
    "mimo_v2_flash": "s_aux",
    "diffllama": "several times",
    "zamba2": r"\[sequences, tokens, 64\]",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "t5gemma": "encoder-decoder",
}
REFUSED |= dict.fromkeys(
    ("bloom", "codegen", "deberta_v2", "falcon", "falcon-alibi", "falcon_mamba", "gpt_neo", "gptj", "mamba", "mamba2"),
    "attention interface",
)
REFUSED |= dict.fromkeys(("mpt", "rwkv", "xglm", "xlstm"), "attention interface")
OF_EACH_KIND = {"gpt_oss", "diffllama", "zamba2", "t5", "falcon", "mamba"}
SLOW = [name for name in ARCHS if name not in NAMES and name not in REFUSED]
ALL = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def has_experts(base: PreTrainedModel) -> bool:
    return any(type(module).__name__.endswith("Experts") for module in base.modules())


def prompts(num_rows: int) -> torch.Tensor:
    ids = torch.randint(3, 119, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return ids.repeat(num_rows, 1)


@pytest.mark.parametrize("name", ALL)
def test_rows_are_what_eager_attention_gives(name: str) -> None:
    base, ids = make_model(name), prompts(4)
    with torch.no_grad():
        alone = base(input_ids=ids).logits
    before = BaseSnapshot(base)
    layers = AttentionLayers(base)
    linked, vector = random_linked(layers, 1), random_vector(layers, 2)
    rows = [row(), row({"r": (linked, 1.0)}), row({"v": (vector, 1.0)}), RowAttention(capture=CaptureRequest())]
    output, scope = forward(base, layers, rows, ids)
    oracle = as_oracle(make_model(name))
    for untouched in (0, 3):
        # To the bit, but where an expert's product has the tokens of all rows in it, of which there are more or fewer.
        if has_experts(base):
            assert_close(output.logits[untouched], alone[untouched], f"row {untouched}")
        else:
            assert output.logits[untouched].equal(alone[untouched])
    assert_close(output.logits[1], logits_with(oracle, layers.layers, [(linked, 1.0)], ids[:1])[0], "linked")
    assert_close(output.logits[2], logits_with(oracle, layers.layers, [(vector, 1.0)], ids[:1])[0], "vector")
    assert not torch.allclose(output.logits[1], alone[1], atol=1e-2)
    found = torch.from_numpy(scope.plans.buffers[3].result([0] * LENGTH, ["t"] * LENGTH).weights)
    expected = [weights[0] for weights in own_attentions(oracle, ids[:1]) if weights.shape[-1] == LENGTH]
    assert len(expected) == len(found)
    # As exactly as logits are told apart by float32: one of size 1000 moves its weight by a thousandth part of 1e-7.
    assert torch.allclose(torch.stack(expected), found.to(expected[0].dtype), atol=1e-3)
    layers.detach()
    before.check()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OF_EACH_KIND else [pytest.mark.slow]) for name in REFUSED]
)
def test_models_with_other_attention_are_refused_and_left_as_they_were(name: str) -> None:
    base = make_model(name)
    before = BaseSnapshot(base)
    model = MultiLoraModel(base, fast_decode=False)
    for _ in range(2):
        with pytest.raises(BaseModelError, match=REFUSED[name]):
            _ = model.registry.linked.layers
    before.check()


SHARED = ("gemma3n_text", "gemma4_text-E", "vlm-gemma4")


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_share_keys_see_all_tokens_where_few_logits_are_wanted(name: str) -> None:
    model, ids = MultiLoraModel(make_model(name), fast_decode=False), prompts(3)
    layers = model.registry.linked.layers
    assert layers.cuts_tokens == (name != "gemma3n_text")  # which computes all of them
    model.load_residual("r", random_linked(layers, 1))
    choices = [None, "r", None]
    capture = [None, CaptureRequest(), CaptureRequest()]
    whole, few = AttentionRequest(capture=capture), AttentionRequest(capture=capture)
    with torch.no_grad():
        expected = model(ids, adapters=choices, attention=whole, use_cache=False).logits
        for wanted in (1, 3):
            logits = model(ids, adapters=choices, attention=few, logits_to_keep=wanted).logits
            assert_close(logits, expected[:, -wanted:], f"the last {wanted}")
    for row_of_batch in (1, 2):
        assert _weights(few, row_of_batch).allclose(_weights(whole, row_of_batch), atol=1e-4)


@pytest.mark.parametrize("name", [*SHARED, "llama4_text", "modernbert-decoder", "vlm-gemma3", "minimax_m3"])
def test_generation_is_what_uncached_passes_give(name: str) -> None:
    model, ids = MultiLoraModel(make_model(name), fast_decode=False), prompts(4)
    layers = model.registry.linked.layers
    model.load_residual("r", random_linked(layers, 1))
    model.load_residual("v", random_vector(layers, 2))
    asked = {"steering": [None, None, None, Steering(spans=((2, 9),), strength=4.0)]}
    choices = [None, "r", "v", None]
    request = AttentionRequest(capture=[None, CaptureRequest(), None, CaptureRequest()], **asked)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, torch.ones_like(ids), adapters=choices, attention=request, **options)
    once = AttentionRequest(capture=request.capture, **asked)
    with torch.no_grad():
        expected = model(out.sequences[:, :-1], adapters=choices, attention=once, use_cache=False).logits
    assert_close(torch.stack(out.logits, dim=1), expected[:, LENGTH - 1 :], name)
    for row_of_batch in (1, 3):
        assert _weights(request, row_of_batch).allclose(_weights(once, row_of_batch), atol=1e-4)


def test_generation_without_a_cache_counts_each_pass_from_the_start() -> None:
    model, ids = MultiLoraModel(make_model("llama"), fast_decode=False), prompts(2)
    steering = [Steering(spans=((2, 9),), strength=0), None]
    answers = []
    for use_cache in (True, False):
        request = AttentionRequest(capture=CaptureRequest(), steering=steering)
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        tokens = model.generate(ids, torch.ones_like(ids), attention=request, **options)
        answers.append((tokens, [_weights(request, row_of_batch) for row_of_batch in range(2)]))
    assert answers[0][0].equal(answers[1][0])
    for cached, uncached in zip(answers[0][1], answers[1][1], strict=True):
        assert cached.allclose(uncached, atol=1e-5)
    assert answers[1][1][0][..., 2:9].max() == 0


def test_a_model_with_a_cache_of_its_own_needs_none_in_a_pass_and_refuses_it_beside_residuals() -> None:
    model, ids = MultiLoraModel(make_model("minimax"), fast_decode=False), prompts(2)
    layers = model.registry.linked.layers
    assert not layers.takes_caches
    model.load_residual("r", random_linked(layers, 1))
    asked = {"adapters": [None, "r"]}
    options = {"max_new_tokens": 3, "do_sample": False}
    with pytest.raises(RequestError, match="use_cache=False"):
        model(ids, use_cache=True, **asked)
    with pytest.raises(RequestError, match="use_cache=False"):
        model.generate(ids, torch.ones_like(ids), **asked, **options)
    tokens = model.generate(ids, torch.ones_like(ids), use_cache=False, **asked, **options)
    with torch.no_grad():
        expected = model(tokens[:, :-1], **asked).logits[:, LENGTH - 1 :].argmax(dim=-1)
    assert tokens[:, LENGTH:].equal(expected)
    request = AttentionRequest(capture=CaptureRequest(layers=(1,), queries="generated"))
    model.generate(ids, torch.ones_like(ids), attention=request, **options)
    assert _weights(request, 0).sum(dim=-1).allclose(torch.ones(()))


def test_tokens_cut_unexpectedly_are_refused() -> None:
    base = make_model("gemma4_text-E")
    layers = AttentionLayers(base)
    layers.cuts_tokens = False
    with pytest.raises(RequestError, match="logits_to_keep"):
        forward(base, layers, [row({"r": (random_linked(layers, 1), 1.0)})], prompts(1), logits_to_keep=1)


def _weights(request: AttentionRequest, row_of_batch: int) -> torch.Tensor:
    found = request.captures[row_of_batch]
    assert isinstance(found, AttentionCapture)
    return torch.from_numpy(found.weights)
