"""Residuals inside vLLM against loraplex's own model: every kind in one batch with base, adapter and mixture rows."""

import pytest

from tests.vllm.residual_worlds import VECTORS, add_residuals, compared
from tests.vllm.worlds import TOLERANCE, counted, engine, engine_core, generate, lora_manager, make_world, prompts

NUM_TOKENS = 6
VECTOR_CHOICES = [*VECTORS, "late:-2", "heard", "calm:0.5", "reft", "reft_mlp:0.7", "block:0.5+reft+first:2"]
VECTOR_CHOICES += ["ia3", "ia3:-0.5+after+protein"]
LINKED_CHOICES = ["linked", "linked:0.5+linked_late", "linked_late:-2+heard+linked:0.7", "linked+block:0.5+ia3+protein"]
SIZES = {"max_loras": 20, "max_cpu_loras": 40, "max_lora_rank": 16}


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """A world with residuals of every kind, and loraplex's own model with them."""
    from tests.vllm.worlds import add_mixtures

    world = add_mixtures(make_world(tmp_path_factory.mktemp("residual")), (1,))
    model = add_residuals(world)
    model.load_mixture("mix1", world.named / "mix1")
    return world, model


def rows_of(choices, **more):
    return list(zip(choices, prompts(len(choices), **more), strict=True))


@pytest.mark.vllm_smoke
def test_vectors_and_interventions_equal_loraplexs_own(residual):
    world, model = residual
    rows = rows_of([None, *VECTOR_CHOICES, "protein", "materials:0.5+block:0.3+protein", None])
    with engine(world, {"residuals": True}, **SIZES) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
        assert found.num_tokens == len(rows) * NUM_TOKENS
        assert found.is_none, found
        found = compared(model, rows[::-1][:6], generate(llm, rows[::-1][:6], NUM_TOKENS))  # other slots
        assert found.is_none, found
        # the control: the residuals of the slot before
        residuals = lora_manager(llm)._adapter_manager.residuals
        slots = dict(residuals._slots)
        residuals._slots |= {slot: slots.get(slot - 1, own) for slot, own in slots.items()}
        residuals.forget_batch()
        chosen = [row for row in rows if row[0] in VECTORS or row[0] == "ia3"]
        wrong = compared(model, chosen, generate(llm, [(c, [*p]) for c, p in chosen], NUM_TOKENS))
        assert wrong.largest > 10 * TOLERANCE, wrong


@pytest.mark.vllm_smoke
def test_linked_residuals_equal_loraplexs_own(residual):
    world, model = residual
    rows = rows_of([None, *LINKED_CHOICES, "block", "protein", None])
    with engine(world, {"linked": 2}, **SIZES, enable_prefix_caching=False) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
        assert found.is_none, found
        # the control: one cache for both of a link's residuals, as tokens alone might not show
        caches = lora_manager(llm)._adapter_manager._linked
        copies = caches._copies
        caches._copies = {layer: own[:1] * 2 for layer, own in copies.items()}
        chosen = [row for row in rows if row[0] == "linked:0.5+linked_late"]
        wrong = compared(model, chosen, generate(llm, chosen, NUM_TOKENS))
        assert wrong.largest > 10 * TOLERANCE, wrong


def test_caches_of_some_layers_serve_residuals_of_those(residual):
    """A vector before a linked residual acts on all its layers, with caches there or without."""
    world, model = residual
    rows = rows_of(["linked_late+heard", "heard+linked_late:0.5", "heard", None, "block:0.5+linked_late"])
    with engine(world, {"linked": 1, "attention_layers": [1]}, **SIZES, enable_prefix_caching=False) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
    assert found.is_none, found


def test_beside_mixtures_with_a_scaling_pass(residual):
    world, model = residual
    rows = rows_of(["mix1", "linked", "mix1:0.5+block:0.5", None, "mix1+linked:0.7", "after+mix1", "protein"])
    with engine(world, {"mixtures": True, "linked": 1}, **SIZES, enable_prefix_caching=False) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
    assert found.is_none, found


def test_preempted_rows_equal_loraplexs_own(residual):
    """Every row begins with one block of 32 tokens and ends with two or three; there are six, and one is vLLM's."""
    world, model = residual
    choices = ["linked:0.5+linked_late", "after", None, "first+linked"]
    rows = [(choice, prompt + prompt) for choice, prompt in rows_of(choices, seed=6)]
    settings = {"num_gpu_blocks_override": 7, "max_model_len": 96, "max_num_batched_tokens": 128}
    with engine(world, {"linked": 2}, **settings) as llm:
        preemptions = counted(engine_core(llm).scheduler, "_preempt_request")
        found = compared(model, rows, generate(llm, rows, 30))
        assert preemptions.count > 0
    assert found.is_none, found


def test_chunks_and_the_prefix_cache_equal_loraplexs_own(residual):
    world, model = residual
    choices = ["linked:0.5+linked_late", "block", None, "reft", "ia3", "protein+linked", "after"]
    rows = [(choice, (prompt * 12)[: 90 + 7 * i]) for i, (choice, prompt) in enumerate(rows_of(choices, seed=5))]
    settings = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}
    with engine(world, {"linked": 2}, **settings, max_loras=8, max_cpu_loras=16) as llm:
        lookups = counted(engine_core(llm).scheduler.kv_cache_manager, "get_computed_blocks")
        cold = generate(llm, rows, NUM_TOKENS)
        assert compared(model, rows, cold).is_none
        lookups.results.clear()
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
        assert found.is_none, found
        # Two blocks of 32 tokens of every row were not computed again, in no cache.
        assert min(num_tokens for _, num_tokens, _ in lookups.results) >= 64
        # A prompt that is another's with its answer: "after" acts on the answer's tokens only where they are generated.
        longer = [("after", [*rows[-1][1], *cold[-1].tokens])]
        found = compared(model, longer, generate(llm, longer, NUM_TOKENS))
        assert found.is_none, found
