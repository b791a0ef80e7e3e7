"""Preemption, chunked prompts and the prefix cache: both caches of a mixture go through them together."""

from tests.vllm.worlds import counted, difference, engine, engine_core, prompts

NUM_TOKENS = 6
CHOICES = ["mix1", "mix6", "mix4", None, "protein", "mix1"]


def test_preempted_rows_equal_peft(world):
    """Every row begins with one block of 32 tokens and ends with two or three; there are six, and one is vLLM's."""
    rows = list(zip(["mix1", "mix6", None, "protein"], [prompt + prompt for prompt in prompts(4, seed=6)], strict=True))
    settings = {"num_gpu_blocks_override": 7, "max_model_len": 96, "max_num_batched_tokens": 128}
    with engine(world, {"mixtures": True}, **settings) as llm:
        preemptions = counted(engine_core(llm).scheduler, "_preempt_request")
        found = difference(llm, world, rows, 30)
        assert preemptions.count > 0
    assert found.is_none, found


def test_chunks_and_prefix_cache_equal_peft(world):
    bases = prompts(len(CHOICES), seed=5)
    rows = [
        (choice, (prompt * 12)[: 90 + 7 * i]) for i, (choice, prompt) in enumerate(zip(CHOICES, bases, strict=True))
    ]
    settings = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}
    with engine(world, {"mixtures": True}, **settings, max_loras=8) as llm:
        lookups = counted(engine_core(llm).scheduler.kv_cache_manager, "get_computed_blocks")
        cold = difference(llm, world, rows, NUM_TOKENS)
        assert cold.is_none, cold
        lookups.results.clear()
        warm = difference(llm, world, rows, NUM_TOKENS)
        assert warm.is_none, warm
        # Two blocks of 32 tokens of every row were not computed again, in neither cache.
        assert min(num_tokens for _, num_tokens, _ in lookups.results) >= 64
