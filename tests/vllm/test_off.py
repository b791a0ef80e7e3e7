"""Without `additional_config` the plugin changes nothing; with links alone there is no second cache."""

from tests.vllm.worlds import difference, engine, engine_core, lora_manager, prompts


def names_of_attention(llm):
    registry = engine_core(llm).vllm_config.compilation_config.static_forward_context
    return [name for name in registry if name.endswith("attn")]


def test_engine_that_doesnt_ask_has_vllms_own_manager(world, register):
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    with engine(world, None) as llm:
        assert type(lora_manager(llm)) is LRUCacheWorkerLoRAManager
        assert len(names_of_attention(llm)) == world.base.config.num_hidden_layers


def test_links_alone_have_no_second_cache(world, register):
    rows = [("protein:0.7+materials:0.3", prompts(1)[0]), (None, prompts(1)[0])]
    with engine(world, {}) as llm:
        assert len(names_of_attention(llm)) == world.base.config.num_hidden_layers
        found = difference(llm, world, rows, 6)
    assert found.is_none, found
