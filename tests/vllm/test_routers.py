"""Mixtures with routers inside vLLM against loraplex's own model, and Arrow against PEFT's, in mixed batches."""

import pytest
import torch

from tests.vllm.router_mixtures import KINDS, add_router_mixtures
from tests.vllm.worlds import (
    LINK,
    TOLERANCE,
    TOP,
    Answer,
    Difference,
    counted,
    difference,
    engine,
    engine_core,
    generate,
    lora_manager,
    make_world,
    prompts,
)

NUM_TOKENS = 6
CHOICES = [None, *KINDS, "protein", LINK, "spectr:0.5+arrow:0.7", "linear:-0.5+protein:0.3+static:2", None]
SIZES = {"max_loras": 14, "max_cpu_loras": 24, "max_lora_rank": 64}


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A world with mixtures of every kind, and loraplex's own model with them."""
    world = make_world(tmp_path_factory.mktemp("routed"))
    return world, add_router_mixtures(world)


@torch.no_grad()
def compared(model, rows, answers):
    """The answers against what loraplex's own model says to the same tokens, one row at a time."""
    found = Difference()
    for (choice, prompt), answer in zip(rows, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logits = model(ids, adapters=[choice], use_cache=False).logits[0, len(prompt) - 1 : -1]
        best = torch.log_softmax(logits.float(), dim=-1).topk(TOP)
        tops = [dict(zip(i, p, strict=True)) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        found.add(answer, Answer(best.indices[:, 0].tolist(), tops))
    return found


def test_every_kind_of_row_in_one_batch(routed):
    world, model = routed
    rows = list(zip(CHOICES, prompts(len(CHOICES)), strict=True))
    with engine(world, {"routers": True}, **SIZES, enable_prefix_caching=False) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
        assert found.num_tokens == len(rows) * NUM_TOKENS
        assert found.is_none, found
        arrow = [("arrow", prompt) for _, prompt in rows[:2]]
        assert difference(llm, world, arrow, NUM_TOKENS).is_none  # PEFT's own
        found = compared(model, rows[::-1][:6], generate(llm, rows[::-1][:6], NUM_TOKENS))  # other slots
        assert found.is_none, found
        # the control: experts without gates
        routers = lora_manager(llm)._adapter_manager.routers
        routers.apply = lambda *args: None
        gated = [row for row in rows if row[0] in KINDS and row[0] != "static"]
        found = compared(model, gated, generate(llm, gated, NUM_TOKENS))
        assert found.largest > 10 * TOLERANCE, found


def test_beside_mixtures_with_a_scaling_pass(routed):
    world, model = routed
    choices = ["xlora", "arrow", None, "xlora:0.5+spectr", "protein", "linear:0.5+xlora:0.5"]
    rows = list(zip(choices, prompts(len(choices), seed=2), strict=True))
    with engine(world, {"routers": True, "mixtures": True}, **SIZES, enable_prefix_caching=False) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
    assert found.is_none, found


def test_chunks_preemption_and_the_prefix_cache(routed):
    world, model = routed
    choices = ["arrow", "spectr", None, "linear", "protein", "arrow"]
    rows = [
        (choice, (prompt * 12)[: 60 + 7 * i])
        for i, (choice, prompt) in enumerate(zip(choices, prompts(6, seed=5), strict=True))
    ]
    settings = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "num_gpu_blocks_override": 14}
    with engine(world, {"routers": True}, **SIZES | settings | {"max_model_len": 128}) as llm:
        preemptions = counted(engine_core(llm).scheduler, "_preempt_request")
        lookups = counted(engine_core(llm).scheduler.kv_cache_manager, "get_computed_blocks")
        for _ in range(2):
            found = compared(model, rows, generate(llm, rows, 30))
            assert found.is_none, found
        assert preemptions.count > 0
        assert max(num_tokens for _, num_tokens, _ in lookups.results) >= 32  # not computed again


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fully_sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers(routed, fully_sharded, monkeypatch):
    """Row-parallel layers have a part of the input each: routers read the sum of both workers' values."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    world, model = routed
    rows = list(zip(CHOICES, prompts(len(CHOICES)), strict=True))
    settings = {"tensor_parallel_size": 2, "fully_sharded_loras": fully_sharded, "distributed_executor_backend": "mp"}
    with engine(world, {"routers": True}, **SIZES | settings) as llm:
        found = compared(model, rows, generate(llm, rows, NUM_TOKENS))
    assert found.is_none, found
