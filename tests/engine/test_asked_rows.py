"""Linked residuals and steering in the compiled layer call: the formulas' answers, and bits that stay the same."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.kv.kv_cache import AttentionTerms
from loraplex.engine.kv.mask_rule import MaskRule
from loraplex.engine.kv.residual_cache import ResidualCache
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.asked_records import RowRecords, WeightCache
from loraplex.engine.worker.asked_rows import AskedRows
from loraplex.engine.worker.fusion import layer_stack
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.rows import RowAttention
from loraplex.residual.steering import KeyShare, Steering
from tests.engine.engines import module_by_module
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.tiny_models import VOCAB_SIZE, tiny_model

NUM_TOKENS = 6
CONFIGS = {
    "together": EngineConfig(cache_bytes=2**22),
    "small chunks, small blocks": EngineConfig(cache_bytes=2**22, max_step_tokens=24, block_tokens=4),
}
NAMES = ("llama", "gemma2", "gpt_neox", "gpt2", "phi3")
FACTOR = (Steering(spans=((3, 9), (20, 40)), strength=4.0), Steering(spans=((5, 7),), strength=0, heads=(1,)))
SHARE = (Steering(spans=((2, 4), (21, 24)), share=0.4), Steering(spans=((8, 9),), share=0.2, heads=(0, 2)))
# One layer attends to a prompt's tokens one by one, the other on tiles.
SHARE_AT_ONE = (*FACTOR, Steering(spans=((2, 4),), share=0.4, layers=(1,)))
# Links of residuals, and steering: of each the compiled call has another path.
ASKED: tuple[tuple[str | None, tuple[Steering, ...]], ...] = (
    ("small", ()),
    ("small+large", ()),
    ("large:-0.5+v+small+one", ()),
    (None, FACTOR),
    (None, SHARE),
    ("one", SHARE_AT_ONE),
    ("one+large", (*FACTOR, *SHARE)),
    ("v+one", ()),
    (None, ()),
)
pytestmark = pytest.mark.needs("compiler")


def load(name: str, dtype: torch.dtype = torch.float32) -> MultiLoraModel:
    return with_residuals(tiny_model(name).to(dtype))


def with_residuals(base: PreTrainedModel) -> MultiLoraModel:
    model = MultiLoraModel(base)
    layers = model.registry.linked.layers
    model.load_residual("small", random_linked(layers, 1, r=3))
    model.load_residual("large", random_linked(layers, 2, r=19))
    model.load_residual("one", random_linked(layers, 3, r=8, at=[1]))
    model.load_residual("v", random_vector(layers, 4))
    return model


def asked(length: int, num_tokens: int = NUM_TOKENS, **options: object) -> list[Request]:
    """One request for each of ASKED, of some `length` tokens."""
    draw = torch.Generator().manual_seed(length)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=3, ignore_eos=True)
    return [
        Request(
            torch.randint(7, VOCAB_SIZE, (length - 2 * i,), generator=draw).tolist(),
            adapters=link,
            steering=steering,
            sampling=sampling,
            **options,
        )
        for i, (link, steering) in enumerate(ASKED)
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_the_formulas_in_float64(
    name: str, config: EngineConfig, calls: list[int]
) -> None:
    """At positions far from the spans and from the sequence's begin, also when the prefix cache has the prompt."""
    exact, model = load(name, torch.float64), load(name)
    requests = asked(130)
    with Engine(model, config) as engine:
        for _ in range(2):
            calls.clear()
            results = engine.generate(requests)
            assert sum(calls) >= 3 * len(ASKED), "rows are decoded by compiled calls"
            for request, result in zip(requests, results, strict=True):
                assert result.error is None
                expected = exact_logprobs(exact, request, result.token_ids)
                for step, own in enumerate(result.logprobs):
                    difference = abs(own.logprob - float(expected[step, own.token_id]))
                    assert difference < 2e-4, f"{request.adapters}, {request.steering}: step {step} off by {difference}"


def exact_logprobs(exact: MultiLoraModel, request: Request, tokens: tuple[int, ...]) -> torch.Tensor:
    """Of the generated tokens [steps, vocab], by one forward pass without a cache."""
    ids = torch.tensor([[*request.prompt, *tokens[:-1]]])
    steering = AttentionRequest(steering=[request.steering or None])
    with torch.no_grad():
        logits = exact(ids, adapters=[request.adapters], attention=steering, use_cache=False).logits
    return torch.log_softmax(logits[0, len(request.prompt) - 1 :], dim=-1)


def test_what_is_asked_changes_the_answers() -> None:
    with Engine(load("llama"), CONFIGS["together"]) as engine:
        requests = asked(60)
        same = [
            Request(requests[0].prompt, adapters=r.adapters, steering=r.steering, sampling=r.sampling) for r in requests
        ]
        first = [result.logprobs[0].top for result in engine.generate(same)]
    assert len(set(first)) == len(ASKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_rows_have_the_same_bits_alone_beside_others_and_where_layers_run_module_by_module(
    name: str, dtype: torch.dtype, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour that captures attention, or somebody's hook, lets layers run module by module."""
    monkeypatch.setattr(layer_stack, "USUAL_CHUNK_KEYS", 0)  # without tiles: module by module, torch attends to chunks
    model = load(name, dtype)
    requests = asked(70)
    capturing = Request(
        requests[1].prompt, adapters="small+v", capture=CaptureRequest(reduce="mean"), sampling=requests[0].sampling
    )
    with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False, max_step_tokens=2048)) as engine:
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
        beside = engine.generate([capturing, *requests])[1:]
        by_module = module_by_module(engine, model.registry.linked.sites.blocks[0], requests, calls)
    for request, *found in zip(requests, together, alone, beside, by_module, strict=True):
        kinds = ("alone", "beside a capture", "module by module")
        for kind, other in zip(kinds, found[1:], strict=True):
            assert (found[0].token_ids, found[0].logprobs) == (other.token_ids, other.logprobs), (kind, request)


def test_weights_that_are_changed_in_place_count_from_the_next_request_on() -> None:
    model = load("llama")
    request = asked(40)[1]
    with Engine(model, CONFIGS["together"]) as engine:
        before = engine.generate([request])[0]
        with torch.no_grad():
            for weights in model.registry.linked.get("small").layers.values():
                weights.head_logits.mul_(-1)
        after = engine.generate([request])[0]
        assert after.num_cached_tokens == 0
    expected = exact_logprobs(model, request, after.token_ids)
    assert after.logprobs[0].top != before.logprobs[0].top
    for step, own in enumerate(after.logprobs):
        assert abs(own.logprob - float(expected[step, own.token_id])) < 2e-4


def test_a_weight_that_overflows_is_the_matter_of_its_own_row() -> None:
    """3e38 is a weight, and with alpha/r of 2 no float32 any more: others in the batch don't notice."""
    plain = asked(30)[0]
    requests = [
        plain,
        Request(plain.prompt, adapters="small+large:3e38", sampling=plain.sampling),
        Request(plain.prompt, adapters="small:-3e38", sampling=plain.sampling),
    ]
    with Engine(load("llama"), CONFIGS["together"]) as engine:
        expected = engine.generate([plain])[0]
        first, *others = engine.generate(requests)
        assert (first.error, first.token_ids, first.logprobs) == (None, expected.token_ids, expected.logprobs)
        assert len(others) == 2, "what becomes of these is theirs"
        assert engine.generate([plain])[0].token_ids == expected.token_ids


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(num_threads: None) -> None:
    """In a model that is large enough for several."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
    )
    torch.manual_seed(0)
    model = with_residuals(LlamaForCausalLM(config).eval().requires_grad_(False))
    found = []
    with Engine(model, EngineConfig(cache_bytes=2**24, prefix_cache=False, max_step_tokens=2048)) as engine:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([(result.token_ids, result.logprobs) for result in engine.generate(asked(60))])
    assert found[0] == found[1] == found[2]


def test_bfloat16_prompts_on_tiles_are_near_the_formulas() -> None:
    """Prompts of more than a tile's tokens, steered by factors and by shares, to what bfloat16 loses without them."""
    exact, model = load("llama", torch.float64), load("llama", torch.bfloat16)
    requests = asked(120, num_tokens=2)
    with Engine(model, CONFIGS["together"]) as engine:
        results = engine.generate(requests)
    errors = []
    for request, result in zip(requests, results, strict=True):
        expected = exact_logprobs(exact, request, result.token_ids)
        values = expected[0, [token for token, _ in result.logprobs[0].top]]
        errors.append((values - torch.tensor([value for _, value in result.logprobs[0].top])).abs().max().item())
    plain = errors[-1]
    assert max(errors) < max(4 * plain, 0.15), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_get_next_to_nothing_stay_as_they_are(dtype: torch.dtype) -> None:
    """A share of them would be a factor that float32 doesn't have: a row must not become infinite for it."""
    strength, num_keys, size = 2e-38, 200, 32
    steerings = (Steering(spans=((3, 4),), strength=strength), Steering(spans=((3, 4),), share=0.4))
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1, num_keys, size, generator=draw).to(dtype)  # one block of one KV head
    keys, query = torch.zeros_like(values), torch.zeros(1, 2, size, dtype=dtype)  # all logits are equal
    out = torch.empty_like(query)
    row = RowAttention(steering=steerings)
    records = RowRecords(row, ResidualCache(1, num_keys, torch.device("cpu")), WeightCache())
    asked = AskedRows([(row, records)], torch.zeros(1, dtype=torch.int64), {0: 2}).tensors((0,))
    where = (torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.tensor([num_keys - 1]))
    terms = AttentionTerms(scale=1.0, softcap=None, mask_rule=MaskRule(), sinks=None)
    native_ops.attend_steered(query, out, keys, values, where, terms, asked)
    seen = torch.ones(num_keys, dtype=torch.bool)
    seen[3] = False
    expected = values[0, 0, seen].double().mean(dim=0)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[0], expected.expand(2, -1).to(dtype), atol=tolerance, rtol=0)
    share = KeyShare(0, ~seen, None, 0.4)
    weights = torch.full((2, 1, num_keys), 1 / (num_keys - 1)).masked_fill(~seen, 1e-40)
    assert share.factors(weights).eq(1).all()
