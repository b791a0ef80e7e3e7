"""Activated LoRA: adapted from the last occurrence of the invocation sequence on, as PEFT does it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import RequestError, UnsupportedAdapterError
from loraplex.routing.invocation import invocation_start
from tests.architectures.variants import make_model
from tests.examples import examples
from tests.hook_oracle import HookOracle, active_from
from tests.parity.oracle import PeftOracle, assert_close
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

INVOCATION = [7, 8, 9]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alora")
    base = tiny_model(request.param)
    targets = linear_targets(request.param)
    settings = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
    folders = {
        "alora": random_peft_adapter(base, folder / "alora", targets=targets, seed=1, options=settings),
        "plain": random_peft_adapter(base, folder / "plain", targets=targets, seed=2),
    }
    model = MultiLoraModel(tiny_model(request.param))
    for name, path in folders.items():
        model.load_adapter(name, path)
    return model, PeftOracle(base, folders)


def prompts():
    """Invocation in the middle, twice, at the very end, at the very start, cut off at the end, absent."""
    ids = torch.randint(20, 100, (6, 12))
    ids[0, 4:7] = ids[1, 1:4] = ids[1, 6:9] = ids[2, 9:12] = ids[3, 0:3] = torch.tensor(INVOCATION)
    ids[4, 10:12] = torch.tensor(INVOCATION[:2])
    return ids, torch.ones_like(ids)


@torch.no_grad()
def test_logits_equal_peft(pair):
    model, oracle = pair
    ids, mask = prompts()
    logits = model(ids, mask, adapters=["alora"] * 6).logits
    base = model(ids, mask).logits
    for row in range(6):
        assert_close(logits[row], oracle.logits("alora", ids[row], mask[row]), f"row {row}")
    assert torch.equal(logits[0, :4], base[0, :4])
    assert not torch.equal(logits[0, 4:], base[0, 4:])
    assert torch.equal(logits[4:], base[4:])


@torch.no_grad()
def test_greedy_tokens_equal_peft_in_a_mixed_batch(pair):
    model, oracle = pair
    ids, mask = prompts()
    rows = ["alora", "plain", "alora", None, "alora", "alora"]
    options = {"max_new_tokens": 10, "do_sample": False}
    tokens = model.generate(ids, mask, adapters=rows, **options)
    for row, name in enumerate(rows):
        assert torch.equal(tokens[row : row + 1], oracle.generate(name, ids[row], mask[row], **options)), f"row {row}"


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "use_cache": False}],
    ids=str,
)
@torch.no_grad()
def test_generated_tokens_do_not_depend_on_the_search_and_the_cache(pair, options):
    """PEFT knows no beams here, and without a cache its aLoRA moves on with the end: the oracle is hooks."""
    model, oracle = pair
    ids, mask = prompts()
    ids[5, :3], mask[5, :3] = 0, 0  # padding on the left moves nothing
    ids[5, 7:10] = torch.tensor(INVOCATION)
    options = {"max_new_tokens": 6, "do_sample": False} | options
    rows = ["alora", None, "alora", "plain", "alora", "alora"]
    tokens = model.generate(ids, mask, adapters=rows, **options).view(len(rows), -1, 18)
    starts = {0: 4, 2: 9, 4: 18, 5: 7}
    for row, name in enumerate(rows):
        if row in starts:
            alone = adapted_from(oracle.base, model, starts[row], ids[row], mask[row], options)
        else:
            alone = oracle.generate(name, ids[row], mask[row], **options)
        assert torch.equal(tokens[row], alone), f"row {row}"


def adapted_from(base, model, start, ids, mask, options):
    adapter = read_adapter(model.store.version("alora").folder)
    with HookOracle(base).adapted({"alora": (adapter, active_from(start))}) as alone:
        return alone.generate(ids[None], attention_mask=mask[None], **{**options, "use_cache": False})


@torch.no_grad()
def test_tokens_far_behind_a_short_prompts_invocation_are_adapted_without_a_cache(pair):
    model, oracle = pair
    ids = torch.randint(20, 100, (2, 5), generator=torch.Generator().manual_seed(2))
    ids[:, 2:5] = torch.tensor(INVOCATION)
    options = {"max_new_tokens": 8, "do_sample": False}
    for use_cache in (False, True):
        tokens = model.generate(ids, torch.ones_like(ids), adapters=["alora", None], use_cache=use_cache, **options)
        for row, name in enumerate(["alora", None]):
            alone = oracle.generate(name, ids[row], torch.ones_like(ids[row]), use_cache=True, **options)
            assert torch.equal(tokens[row : row + 1], alone)


@torch.no_grad()
def test_rows_padded_on_the_right_equal_peft(pair):
    model, oracle = pair
    ids, mask = prompts()
    ids[:, 10:], mask[:, 10:] = 0, 0
    logits = model(ids, mask, adapters=["alora"] * 6).logits
    for row in range(6):
        assert_close(logits[row, :10], oracle.logits("alora", ids[row], mask[row])[:10], f"row {row}")


@pytest.mark.parametrize("cuts", [(8,), (5,), (8, 9, 10), (1, 5, 11)], ids=str)
@torch.no_grad()
def test_going_on_from_a_cache_equals_peft_on_all_tokens(pair, cuts):
    """The invocation may be among the cached tokens, where only the model that made the cache knows it."""
    model, oracle = pair
    ids = torch.randint(20, 100, (3, 12), generator=torch.Generator().manual_seed(4))
    ids[0, 1:4] = ids[1, 5:8] = torch.tensor(INVOCATION)
    cache, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, 12), strict=True):
        out = model(ids[:, start:stop], adapters=["alora"] * 3, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    for row in range(3):
        assert_close(logits[row], oracle.logits("alora", ids[row], torch.ones_like(ids[row])), f"row {row}")


@torch.no_grad()
def test_cache_of_tokens_that_are_not_known_is_refused(pair):
    model, _ = pair
    ids, _ = prompts()
    cache = model.base(ids[:1, :8], use_cache=True).past_key_values
    with pytest.raises(RequestError, match="past_key_values"):
        model(ids[:1, 8:], adapters=["alora"], past_key_values=cache)
    logits = model(ids[3:4, :6], adapters=["alora"], past_key_values=cache).logits  # begins with the invocation
    assert torch.isfinite(logits).all()
    cache = model(ids[:1, :8], use_cache=True).past_key_values
    cache.crop(-3)
    model.generate(ids[:1], adapters=[None], past_key_values=cache, max_new_tokens=2)  # other tokens than were noted
    with pytest.raises(RequestError, match="past_key_values"):
        model(ids[:1, 8:], adapters=["alora"], past_key_values=cache)


@torch.no_grad()
def test_latent_attention_sees_past_tokens_again_and_adapts_those_from_the_invocation_on(tmp_path):
    """What PEFT computes without a cache; with one, it counts from the end of what is cached."""
    base = make_model("deepseek_v3")
    targets = ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    settings = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
    folder = random_peft_adapter(base, tmp_path / "alora", targets=targets, options=settings)
    model = MultiLoraModel(make_model("deepseek_v3"))
    model.load_adapter("alora", folder)
    ids, mask = prompts()
    ids, mask, adapter = ids[:3], mask[:3], read_adapter(folder)
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, mask, adapters=["alora", None, "alora"], **options)
    for row, start in ((0, 4), (2, 9)):
        with HookOracle(base).adapted({"alora": (adapter, active_from(start))}) as alone:
            expected = alone.generate(ids[row : row + 1], attention_mask=mask[:1], use_cache=False, **options)
        assert torch.equal(tokens[row : row + 1], expected), f"row {row}"


@torch.no_grad()
def test_cache_whose_first_layer_keeps_a_recurrent_state_is_as_long_as_its_longest_layer(tmp_path):
    base = make_model("minimax")
    settings = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
    folder = random_peft_adapter(base, tmp_path / "alora", targets=["q_proj", "o_proj"], options=settings)
    model = MultiLoraModel(make_model("minimax"))
    model.load_adapter("alora", folder)
    ids, mask = prompts()
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids[:1], mask[:1], adapters=["alora"], **options)
    with HookOracle(base).adapted({"alora": (read_adapter(folder), active_from(4))}) as alone:
        assert torch.equal(tokens, alone.generate(ids[:1], attention_mask=mask[:1], use_cache=False, **options))


def test_alora_on_an_encoder_and_decoder_is_refused(tmp_path):
    base = tiny_model("t5")
    folder = random_peft_adapter(base, tmp_path / "a", targets=["q"])
    adapter = read_adapter(folder)
    adapter = replace(adapter, config=replace(adapter.config, alora_invocation_tokens=tuple(INVOCATION)))
    model = MultiLoraModel(base)
    with pytest.raises(UnsupportedAdapterError, match="alora_invocation_tokens"):
        model.load_adapter("a", adapter)
    assert model.names() == []


@examples(200)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_active_tokens_are_counted_as_peft_counts_them(ids, invocation):
    from types import SimpleNamespace

    config = {"a": SimpleNamespace(alora_invocation_tokens=invocation)}
    (expected,) = calculate_alora_offsets(config, "a", torch.tensor([ids]))
    start = invocation_start(ids, invocation)
    assert (0 if start is None else len(ids) - start) == (expected or 0)  # PEFT counts them from the end
