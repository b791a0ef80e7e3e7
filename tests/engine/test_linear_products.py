"""Which linear product an engine's passes run, as it was measured; and what becomes of weights that it holds packed."""

import pytest
import torch

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.engine.worker.fusion import linear_products
from loraplex.kernels.packed_weight import PackedWeight
from loraplex.kernels.tuning import ALL_TOKENS, ProductChoice
from loraplex.layers.lora_linear import LoraLinear
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.needs("compiler")

LENGTHS = (5, 9, 3, 7, 4, 6)


def choose(monkeypatch, **choice) -> None:
    monkeypatch.setattr(linear_products, "choices", lambda shapes: dict.fromkeys(shapes, ProductChoice(**choice)))


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 100, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Request(prompt, sampling=SamplingParams(max_tokens=5, logprobs=2, ignore_eos=True)) for prompt in prompts]


def logprobs(result):
    return (result.error, result.token_ids, result.logprobs)


@pytest.fixture
def torch_products(monkeypatch) -> list[int]:
    """The numbers of tokens for which torch's product ran."""
    seen: list[int] = []
    run = LoraLinear.run_alone

    def counted(self, x, plan):
        seen.append(x.shape[:-1].numel())
        return run(self, x, plan)

    monkeypatch.setattr(LoraLinear, "run_alone", counted)
    return seen


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_torchs_product_runs_where_it_is_faster(batch_invariant, torch_products, monkeypatch):
    choose(monkeypatch, is_packed=False, max_compiled_tokens=4)
    model = MultiLoraModel(tiny_model("llama"))
    config = EngineConfig(prefix_cache=False, batch_invariant=batch_invariant)
    with Engine(model, config) as engine:
        torch_products.clear()
        together = engine.generate(requests())
        assert (min(torch_products, default=None)) == (None if batch_invariant else len(LENGTHS))
        torch_products.clear()
        alone = [engine.generate([request])[0] for request in requests()]
        assert max(torch_products, default=None) == (None if batch_invariant else max(LENGTHS))
    if batch_invariant:
        assert [logprobs(result) for result in together] == [logprobs(result) for result in alone]
    assert not any("lora_max_compiled" in vars(module) for module in model.base.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_packed_weights_are_held_once_and_given_back(name, torch_products, monkeypatch):
    model = MultiLoraModel(tiny_model(name, dtype=torch.bfloat16))
    before = {path: value.clone() for path, value in model.base.state_dict().items()}
    results = []
    for is_packed in (True, False):
        choose(monkeypatch, is_packed=is_packed, max_compiled_tokens=ALL_TOKENS)
        with Engine(model, EngineConfig(prefix_cache=False)) as engine:
            packed = [module for module in model.base.modules() if isinstance(module, LoraLinear)]
            packed = [module for module in packed if isinstance(module.weight, PackedWeight)]
            assert bool(packed) == is_packed
            torch_products.clear()
            results.append([list(result.token_ids) for result in engine.generate(requests())])
            assert torch_products == []
            during = model.base.state_dict()
            assert all(torch.equal(during[path], value) for path, value in before.items())
        assert not any(isinstance(parameter, PackedWeight) for parameter in model.base.parameters())
        after = model.base.state_dict()
        assert all(torch.equal(after[path], value) for path, value in before.items())
    same = [sum(a == b for a, b in zip(*pair, strict=True)) / 5 for pair in zip(*results, strict=True)]
    assert sum(same) / len(same) > 0.6  # near ties of a random model in bfloat16 may be decided otherwise


def test_a_failed_start_gives_weights_back(monkeypatch):
    choose(monkeypatch, is_packed=True, max_compiled_tokens=ALL_TOKENS)
    model = MultiLoraModel(tiny_model("llama", dtype=torch.bfloat16))
    packed = []

    real = linear_products.pack

    def pack(module, memory):
        if len(packed) == 4:
            raise MemoryError
        packed.append(module)
        real(module, memory)

    monkeypatch.setattr(linear_products, "pack", pack)
    with pytest.raises(MemoryError):
        Engine(model, EngineConfig())
    assert len(packed) == 4
    assert not any(isinstance(parameter, PackedWeight) for parameter in model.base.parameters())
    monkeypatch.setattr(linear_products, "pack", real)
    with Engine(model, EngineConfig(prefix_cache=False)) as engine:
        assert all(result.error is None for result in engine.generate(requests()))


def test_step_tokens_are_a_number_once_the_engine_runs():
    model = MultiLoraModel(tiny_model("llama"))
    for given, expected in ((None, 256), (64, 64)):
        with Engine(model, EngineConfig(max_step_tokens=given)) as engine:
            assert engine._core.runner.config.max_step_tokens == expected
