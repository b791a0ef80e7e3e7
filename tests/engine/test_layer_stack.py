"""Decoder layers that run in one call: the same bits as module by module, and only where nobody looks inside."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.worker.fusion import layer_stack
from loraplex.engine.worker.fusion.cpu_fusion import stack_of
from loraplex.engine.worker.fusion.layer_stack import chains
from tests.architectures import variants as architectures
from tests.engine.engines import (
    CHOICES,
    add_residuals,
    answer,
    assert_same,
    make_model,
    module_by_module,
    prompts,
    write_adapters,
)
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

CONFIG = EngineConfig(cache_bytes=2**22, prefix_cache=False)
pytestmark = pytest.mark.needs("compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3", "gemma2", "gemma3"])
def test_same_bits_as_module_by_module(
    tmp_path: Path, calls: list[int], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_adapters(name, tmp_path)
    monkeypatch.setattr("tests.engine.engines.tiny_model", lambda name: tiny_model(name, dtype=dtype))
    monkeypatch.setattr(layer_stack, "USUAL_CHUNK_KEYS", 0)  # without tiles: module by module, torch attends to chunks
    model = make_model(name, folders)
    requests = [prompted.request(max_tokens=9, logprobs=2) for prompted in prompts((5, 30, 11))]
    with Engine(model, CONFIG) as engine:
        calls.clear()
        together = engine.generate(requests)
        assert max(calls) > len(CHOICES) // 2, "rows of all kinds in one call"
        one_by_one = module_by_module(engine, model.base.model.layers[1].mlp.down_proj, requests, calls)
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert (ours.error, ours.token_ids, ours.logprobs) == (None, theirs.token_ids, theirs.logprobs)


@pytest.mark.parametrize(("max_step_tokens", "length"), [(64, 37), (16, 37), (256, 80)])
def test_a_prompts_chunks_run_in_one_call(tmp_path: Path, calls: list[int], max_step_tokens: int, length: int) -> None:
    model = make_model("llama", write_adapters("llama", tmp_path), mixtures=False)
    config = EngineConfig(cache_bytes=2**22, prefix_cache=False, max_step_tokens=max_step_tokens, block_tokens=8)
    with Engine(model, config) as engine:
        for prompted in prompts((length,), CHOICES[:5]):
            calls.clear()
            result = engine.generate([prompted.request(max_tokens=4)])[0]
            assert max(calls) == min(max_step_tokens, length)
            assert_same(model, prompted, result, answer(model, prompted, 4))


def test_long_chunks_run_module_by_module(tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_stack, "USUAL_CHUNK_KEYS", 100)
    model = make_model("llama", write_adapters("llama", tmp_path), mixtures=False)
    with Engine(model, CONFIG) as engine:
        for length, called in ((13, True), (14, False)):  # 91 and 105 keys
            calls.clear()
            prompted = prompts((length,))[0]
            assert_same(
                model, prompted, engine.generate([prompted.request(max_tokens=3)])[0], answer(model, prompted, 3)
            )
            assert (calls[:1] == [length]) == called


def test_a_hook_of_the_user_sees_its_module_run(tmp_path: Path, calls: list[int]) -> None:
    model = make_model("llama", write_adapters("llama", tmp_path), mixtures=False)
    seen: list[int] = []
    with Engine(model, CONFIG) as engine:
        model.base.model.layers[0].self_attn.register_forward_hook(lambda *args: seen.append(1))
        engine.generate([prompts((5,))[0].request(max_tokens=4)])
    assert len(seen) == 4


def test_dora_and_functions_run_module_by_module(tmp_path: Path, calls: list[int]) -> None:
    model = add_residuals(make_model("llama", write_adapters("llama", tmp_path)))
    dora = {"use_dora": True}
    folder = random_peft_adapter(
        tiny_model("llama"), tmp_path / "d", targets=linear_targets("llama"), seed=4, options=dora
    )
    model.load_adapter("dora", folder)
    for choice in ("dora", "0+f"):
        prompted = prompts((9,), [choice])[0]
        with Engine(model, CONFIG) as engine:
            calls.clear()
            result = engine.generate([prompted.request(max_tokens=6)])[0]
        assert calls == []
        assert_same(model, prompted, result, answer(model, prompted, 6))


def test_layers_that_compute_something_else_are_left_alone(calls: list[int]) -> None:
    base = tiny_model("llama")
    former = type(base.model.layers[1])

    class OddLayer(former):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 0.5

    base.model.layers[1].__class__ = OddLayer
    model = MultiLoraModel(base)
    prompted = prompts((12,))[0]
    with Engine(model, CONFIG) as engine:
        assert type(base.model.layers[1]) is OddLayer
        assert type(base.model.layers[0]) is not former
        calls.clear()
        result = engine.generate([prompted.request(max_tokens=6)])[0]
        assert calls, "the first layer alone is a stack"
    assert_same(model, prompted, result, answer(model, prompted, 6))


def test_runs_are_cut_where_something_stands_between_layers() -> None:
    a, b, c = (nn.Identity() for _ in range(3))
    one, two, three, four = (torch.zeros(1) for _ in range(4))
    joined = [(a, one, two), (b, two, three), (c, three, four)]
    cut = [(a, one, two), (b, three, four), (c, four, one)]
    assert chains([a, b, c], [joined]) == [[a, b, c]]
    assert chains([a, b, c], [joined, cut]) == [[a], [b, c]]
    assert chains([a, c], [joined]) == [[a], [c]]
    assert chains([a, b, c], [joined, [(b, one, two)]]) == [], "another order in each pass"
    assert chains([a], [[(a, one, two), (a, two, three)]]) == [], "a layer that is used twice"


def test_layers_of_other_sizes_are_in_one_stack(calls: list[int]) -> None:
    base = tiny_model("llama")
    mlp = base.model.layers[1].mlp
    inner = mlp.gate_proj.out_features
    for name, size_in, size_out in (
        ("gate_proj", 64, inner * 2),
        ("up_proj", 64, inner * 2),
        ("down_proj", inner * 2, 64),
    ):
        setattr(mlp, name, nn.Linear(size_in, size_out, bias=False).requires_grad_(False))
    model = MultiLoraModel(base.eval())
    prompted = prompts((12,))[0]
    with Engine(model, CONFIG) as engine:
        calls.clear()
        result = engine.generate([prompted.request(max_tokens=6)])[0]
        assert len(calls) == 6, "one call for the prompt and for each token after it but the last"
    assert_same(model, prompted, result, answer(model, prompted, 6))


def test_all_layers_of_a_deep_model_are_in_one_stack(calls: list[int]) -> None:
    """Only the first few are compared; the others are of their kinds."""
    config = tiny_model("llama").config
    config.num_hidden_layers = 7
    base = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    model = MultiLoraModel(base)
    with Engine(model, CONFIG):
        stacks = {stack_of(layer) for layer in base.model.layers}
        assert [len(stack) for stack in stacks if stack is not None] == [7]
        with Engine(model, CONFIG) as another:  # which starts with passes through some of them
            calls.clear()
            prompted = prompts((12,))[0]
            result = another.generate([prompted.request(max_tokens=4)])[0]
            assert len(calls) == 4
    assert_same(model, prompted, result, answer(model, prompted, 4))


def test_a_hook_on_a_layer_sees_what_it_makes(calls: list[int]) -> None:
    base = tiny_model("llama")
    model = MultiLoraModel(base)
    prompted = prompts((9,))[0]
    seen: list[torch.Tensor] = []
    with Engine(model, CONFIG) as engine:
        calls.clear()
        base.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        engine.generate([prompted.request(max_tokens=1)])
        assert calls == []
    expected = model(torch.tensor([prompted.prompt]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "gemma3"])
def test_a_row_has_the_same_bits_in_any_batch(
    tmp_path: Path, calls: list[int], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_adapters(name, tmp_path)
    monkeypatch.setattr("tests.engine.engines.tiny_model", lambda name: tiny_model(name, dtype=dtype))
    model = make_model(name, folders, mixtures=False)
    requests = [prompted.request(max_tokens=9, logprobs=2) for prompted in prompts((5, 30, 11), CHOICES[:5])]
    with Engine(model, CONFIG) as engine:
        calls.clear()
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
        assert max(calls) >= 5, "all rows in one call"
        assert min(calls) == 1
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.error, ours.token_ids, ours.logprobs) == (None, theirs.token_ids, theirs.logprobs)


def test_layers_with_unknown_routers_have_their_attention_in_one_call(calls: list[int]) -> None:
    base = architectures.make_model("phimoe")
    model = MultiLoraModel(base)
    prompted = prompts((12,))[0]
    with Engine(model, CONFIG) as engine:
        assert all(stack_of(layer) is None and stack_of(layer.self_attn) is not None for layer in base.model.layers)
        calls.clear()
        result = engine.generate([prompted.request(max_tokens=6)])[0]
        assert len(calls) == 2 * 6, "a call for each layer"
    assert_same(model, prompted, result, answer(model, prompted, 6))
