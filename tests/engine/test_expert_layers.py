"""Layers with experts in one call: every row is what PEFT gives it alone, with the same bits beside any others."""

from pathlib import Path

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.worker.fusion import linear_products
from loraplex.engine.worker.fusion.cpu_fusion import stack_of
from loraplex.kernels.packed_experts import PackedExperts
from loraplex.kernels.tuning import ALL_TOKENS, ProductChoice
from tests.architectures.checks import CHOICES, NUM_NEW, assert_same_answer
from tests.architectures.expert_adapters import EXPERTS, ExpertCase, write_expert_adapter
from tests.architectures.variants import W, make_config, make_model

pytestmark = pytest.mark.needs("compiler")
# Of different parameters and ranks: experts, router, one matrix of some layers, linear modules.
PARAMETERS = {
    "experts": EXPERTS,
    "all": (*EXPERTS, "gate.weight"),
    "down": ("layers.1.mlp.experts.down_proj",),
    "router": ("gate.weight",),
}
SPECS = (None, "experts", "all:0.5+down", "router", None, "down", "experts+router")


def make_adapted(folder: Path, dtype: torch.dtype) -> MultiLoraModel:
    base = make_model("qwen3_moe")
    folders = {
        name: write_expert_adapter(base, folder / name, parameters, r=2 + i, seed=i)
        for i, (name, parameters) in enumerate(PARAMETERS.items())
    }
    model = MultiLoraModel(base.to(dtype))
    for name, path in folders.items():
        model.load_adapter(name, path)
    return model


def requests(max_tokens: int = 6) -> list[Request]:
    draw = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    lengths = (7, 2 * W + 3, 5, 21, 40, 3, 11)
    prompts = [torch.randint(3, 110, (length,), generator=draw).tolist() for length in lengths]
    return [Request(prompt, adapters=spec, sampling=sampling) for prompt, spec in zip(prompts, SPECS, strict=True)]


def bits(result: RequestResult) -> tuple[object, ...]:
    return result.error, result.token_ids, result.logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_beside_any_others(tmp_path: Path, calls: list[int], dtype: torch.dtype) -> None:
    """Rows with adapters of experts and routers, and rows without."""
    model = make_adapted(tmp_path, dtype)
    with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
        assert all(stack_of(layer) is not None for layer in model.base.model.layers)
        calls.clear()
        together = engine.generate(requests())
        assert max(calls) > sum(len(request.prompt) for request in requests()) // 2, "prompts in one call"
        calls.clear()
        alone = [engine.generate([request])[0] for request in requests()]
        assert len(calls) == 6 * len(SPECS), "nothing ran module by module"
    assert [bits(one) for one in together] == [bits(one) for one in alone]
    with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
        plain = engine.generate([Request(one.prompt, sampling=one.sampling) for one in requests()])
    for spec, one, other in zip(SPECS, together, plain, strict=True):
        assert (one.logprobs == other.logprobs) == (spec is None), f"{spec} changes nothing, or the base's own row"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_work_without_changing_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of layers that are large enough for several threads, with columns that fill no whole share."""
    config = make_config("qwen3_moe")
    for name, value in (("hidden_size", 136), ("moe_intermediate_size", 104), ("num_experts", 9)):
        setattr(config, name, value)
    config.num_experts_per_tok = 4
    base = make_model("qwen3_moe", config=config)
    folder = write_expert_adapter(base, tmp_path / "a", (*EXPERTS, "gate.weight"), r=5)
    model = MultiLoraModel(base.to(dtype))
    model.load_adapter("a", folder)
    asked = [
        Request(request.prompt, adapters=spec, sampling=request.sampling)
        for request, spec in zip(requests(), (None, "a", "a", None, "a", None, "a"), strict=True)
    ]
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
                assert all(stack_of(layer) is not None for layer in model.base.model.layers)
                found.append([bits(result) for result in engine.generate(asked)])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert all(error is None for error, *_ in found[0])


@torch.no_grad()
def test_groups_of_experts_and_corrections_decide(calls: list[int]) -> None:
    """Of a model in which groups and corrections change most choices, against transformers."""
    config = make_config("glm4_moe")
    for name, value in (("n_routed_experts", 12), ("n_group", 4), ("topk_group", 2), ("num_experts_per_tok", 3)):
        setattr(config, name, value)
    config.routed_scaling_factor = 2.5
    case = ExpertCase("glm4_moe")
    base = make_model("glm4_moe", config=config)
    for path, buffer in base.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(1))
    prompts = [row.tolist() for row in case.rows]
    sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=1)
    with Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22)) as engine:
        assert all(stack_of(layer) is not None for layer in base.model.layers)
        results = engine.generate([Request(prompt, sampling=sampling) for prompt in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt + list(result.token_ids)])
        logprobs = base(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        assert result.logprobs is not None
        assert logprobs.argmax(dim=-1).tolist() == list(result.token_ids)
        chosen = torch.tensor([step.logprob for step in result.logprobs])
        torch.testing.assert_close(chosen, logprobs.amax(dim=-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_packed_experts_are_held_once_and_given_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MultiLoraModel(make_model(name).to(torch.bfloat16))
    before = {path: value.clone() for path, value in model.base.state_dict().items()}
    answers = []
    for is_packed in (True, False):
        choice = ProductChoice(is_packed=is_packed, max_compiled_tokens=ALL_TOKENS)
        monkeypatch.setattr(linear_products, "choices", lambda shapes, choice=choice: dict.fromkeys(shapes, choice))
        with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
            assert any(isinstance(weight, PackedExperts) for weight in model.base.parameters()) == is_packed
            assert all(stack_of(layer) is not None for layer in model.base.model.layers)
            plain = [Request(request.prompt, sampling=request.sampling) for request in requests()]
            answers.append([list(result.token_ids) for result in engine.generate(plain)])
            during = model.base.state_dict()
            assert all(torch.equal(during[path], value) for path, value in before.items())
            ids = torch.randint(3, 110, (2, 9), generator=torch.Generator().manual_seed(0))
            outside = model.base(ids).logits
            assert torch.isfinite(outside).all()
        assert not any(isinstance(weight, PackedExperts) for weight in model.base.parameters())
        after = model.base.state_dict()
        assert all(torch.equal(after[path], value) for path, value in before.items())
    same = [a == b for pair in zip(*answers, strict=True) for a, b in zip(*pair, strict=True)]
    assert sum(same) / len(same) > 0.6  # a last bit may send a token to another expert


def test_more_tokens_for_an_expert_than_the_compiled_product_is_best_for_run_by_torch(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_products, "unpacked_limit", lambda shape: 3)
    model = MultiLoraModel(make_model("qwen3_moe"))  # of 4 experts, a token goes to 2
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
        for length, called in ((6, True), (7, False)):
            calls.clear()
            engine.generate([Request(list(range(3, 3 + length)), sampling=sampling)])
            assert bool(calls) == called, f"{length} tokens"


@torch.no_grad()
def test_linked_experts_in_one_call_are_what_peft_gives(calls: list[int]) -> None:
    case = ExpertCase("qwen3_moe")
    sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=1)
    asked = [
        Request(prompt.tolist(), adapters=choice, sampling=sampling)
        for prompt, choice in zip(case.rows, CHOICES, strict=True)
    ]
    with Engine(case.model(), EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
        calls.clear()
        results = engine.generate(asked)
        assert len(calls) == NUM_NEW, "one call for each step"
    for prompt, choice, result in zip(case.rows, CHOICES, results, strict=True):
        assert result.logprobs is not None
        chosen = [step.logprob for step in result.logprobs]
        expected = case.oracle.steps(choice, prompt, None, NUM_NEW)
        assert_same_answer(list(result.token_ids), chosen, expected, f"{choice}")
