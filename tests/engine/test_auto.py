"""adapters="auto" in the engine: the base model's pass chooses, and the answer is that of the adapter by name."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex import (
    Candidates,
    Engine,
    EngineConfig,
    MultiLoraModel,
    Request,
    SamplingParams,
    SpectrConfig,
    XLoraConfig,
)
from loraplex.adapters.prompt_centroid import PromptCentroid
from loraplex.engine.request import RequestResult
from loraplex.errors import (
    AdapterNotFoundError,
    BaseModelMismatchError,
    ConfigError,
    LinkSyntaxError,
    NameFormatError,
    RequestError,
    UnsupportedAdapterError,
)
from loraplex.models.auto.prompt_states import fit_centroids
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

NAMES = ("a", "b", "c")
NUM_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


def drawn(seed: int, count: int, low: int = 5, high: int = VOCAB_SIZE - 1, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, length), generator=generator).tolist()


BACKGROUND = drawn(99, 20)
# Prompts of each adapter differ little: a tiny random model's last states hardly show what they have in common.
ENDS = dict(zip((*NAMES, "mix"), drawn(1000, 4, length=30), strict=True))
OWN = {name: [[*row, *ENDS[name]] for row in drawn(i, 12, length=4)] for i, name in enumerate(NAMES)}
FIT = {name: rows[:6] for name, rows in OWN.items()}
ASKED = {name: rows[6:] for name, rows in OWN.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: random_peft_adapter(tiny_model("llama"), root / name, targets=linear_targets("llama"), seed=i, r=4)
        for i, name in enumerate(NAMES)
    }


def make_model(folders: dict[str, Path]) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama"))
    for name, folder in folders.items():
        model.load_adapter(name, folder)
    for name, centroid in fit_centroids(model.base, FIT, BACKGROUND).items():
        model.registry.set_centroid(name, centroid)
    return model


@pytest.fixture
def model(folders: dict[str, Path]) -> MultiLoraModel:
    return make_model(folders)


def auto(prompt: Sequence[int], **fields: Any) -> Request:
    return Request(prompt, adapters="auto", **({"sampling": GREEDY} | fields))


def ran(result: RequestResult) -> str | None:
    assert result.error is None
    assert result.auto is not None
    return result.auto.name


def oracle_scores(prompt: Sequence[int]) -> dict[str, float]:
    """In float64, by transformers' own decoder."""
    base = copy.deepcopy(tiny_model("llama")).double()

    @torch.no_grad()
    def state(ids: Sequence[int]) -> Tensor:
        return base.model(torch.tensor([ids])).last_hidden_state[0, -1]

    def mean(rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([state(row) for row in rows]).mean(dim=0)

    background = mean(BACKGROUND)
    return {
        name: float(torch.cosine_similarity(state(prompt) - background, mean(FIT[name]) - background, dim=0))
        for name in NAMES
    }


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("max_step_tokens", [8, 64])
def test_answers_are_those_of_the_adapter_by_name(
    model: MultiLoraModel, max_step_tokens: int, prefix_cache: bool
) -> None:
    config = EngineConfig(max_step_tokens=max_step_tokens, block_tokens=4, prefix_cache=prefix_cache)
    asked = [(name, prompt) for name in NAMES for prompt in ASKED[name][:3]]
    with Engine(model, config) as engine:
        expected = engine.generate([Request(prompt, adapters=name, sampling=GREEDY) for name, prompt in asked])
        for _ in range(2):
            found = engine.generate([auto(prompt) for _, prompt in asked])
            assert [ran(result) for result in found] == [name for name, _ in asked]
            assert [result.token_ids for result in found] == [result.token_ids for result in expected]
        assert engine.stats().num_blocks_held == 0


def test_scores_are_the_cosines_of_float64(model: MultiLoraModel) -> None:
    prompts = [ASKED[name][0] for name in NAMES] + drawn(5, 4)
    ids = [torch.tensor([prompt]) for prompt in prompts]
    with Engine(model, EngineConfig(auto_floor=-1)) as engine:
        results = engine.generate([auto(prompt) for prompt in prompts])
    for prompt, row, result in zip(prompts, ids, results, strict=True):
        scores = oracle_scores(prompt)
        best = max(scores, key=lambda name: scores[name])
        (choice,) = model.choose_adapters(row, floor=-1)
        for own in (result.auto, choice):
            assert own is not None
            assert (own.name, own.num_candidates) == (best, 3)
            assert own.score == pytest.approx(scores[best], abs=1e-4)


def test_floor_lets_the_base_model_answer(model: MultiLoraModel) -> None:
    prompt = drawn(7, 1)[0]
    score = max(oracle_scores(prompt).values())
    for floor, is_base in ((score + 0.01, True), (score - 0.01, False)):
        with Engine(model, EngineConfig(auto_floor=floor)) as engine:
            result = engine.generate([auto(prompt)])[0]
            (expected,) = engine.generate([Request(prompt, adapters=ran(result), sampling=GREEDY)])
        assert (ran(result) is None) == is_base
        assert result.token_ids == expected.token_ids
    with pytest.raises(ConfigError, match="auto_floor is 1"):
        EngineConfig(auto_floor=1.5)


def test_only_candidates_are_chosen(model: MultiLoraModel) -> None:
    prompt = ASKED["a"][0]
    scores = oracle_scores(prompt)
    second = max("bc", key=lambda name: scores[name])
    with Engine(model, EngineConfig(auto_floor=-1)) as engine:
        among = engine.generate([auto(prompt, candidates=Candidates(names=["b", "c", "unknown"]))])[0]
        none = engine.generate([auto(prompt, candidates=Candidates(names=[]))])[0]
        with pytest.raises(RequestError, match="nothing to choose from"):
            engine.generate([auto(prompt, candidates=Candidates(names=[], base=False))])
        with pytest.raises(RequestError, match="list of names"):
            engine.generate([auto(prompt, candidates=Candidates(names="abc"))])
    assert ran(among) == second
    assert among.auto is not None
    assert among.auto.num_candidates == 2
    assert ran(none) is None
    assert none.auto is not None
    assert none.auto.score is None


def test_below_the_floor_without_a_base_model_is_an_error(model: MultiLoraModel) -> None:
    with Engine(model, EngineConfig(auto_floor=1.0)) as engine:
        sampling = SamplingParams(max_tokens=2, n=3)
        (result,) = engine.generate([auto(drawn(7, 1)[0], candidates=Candidates(base=False), sampling=sampling)])
        assert [type(completion.error) for completion in result.completions] == [RequestError] * 3
        assert "may not answer" in str(result.error)
        assert engine.stats().num_blocks_held == engine.stats().num_running == engine.stats().num_waiting == 0
        assert engine.generate([auto(ASKED["a"][0])])[0].error is None


def test_several_answers_stop_tokens_and_sampling(model: MultiLoraModel) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3)
    prompt = ASKED["b"][1]
    with Engine(model, EngineConfig()) as engine:
        expected = engine.generate([Request(prompt, adapters="b", sampling=sampling)])[0]
        found = engine.generate([auto(prompt, sampling=sampling)])[0]
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in expected.completions]
    assert [c.finish_reason for c in found.completions] == [c.finish_reason for c in expected.completions]


def test_the_base_models_pass_is_reused_for_its_own_answer_and_the_next_choice(model: MultiLoraModel) -> None:
    prompt = drawn(7, 1, length=64)[0]
    with Engine(model, EngineConfig(auto_floor=1.0, block_tokens=4)) as engine:
        engine.generate([auto(prompt)])
        first = engine.stats().counts.num_prompt_tokens
        engine.generate([auto(prompt)])
        again = engine.stats().counts.num_prompt_tokens - first
    assert 64 <= first <= 64 + 4
    assert again <= 2 * 4
    with Engine(model, EngineConfig(block_tokens=4)) as engine:
        (result,) = engine.generate([auto(ASKED["a"][0])])
        assert result.num_cached_tokens == 0, "the adapter's own keys and values were not there"
        assert engine.stats().counts.num_prompt_tokens == 2 * len(ASKED["a"][0])


def test_salts_keep_choosing_passes_apart(model: MultiLoraModel) -> None:
    prompt = drawn(7, 1, length=64)[0]
    with Engine(model, EngineConfig(auto_floor=1.0, block_tokens=4)) as engine:
        for salt in ("x", "y"):
            before = engine.stats().counts.num_prompt_tokens
            engine.generate([auto(prompt, cache_salt=salt)])
            assert engine.stats().counts.num_prompt_tokens - before >= 64


def test_every_delta_says_what_was_chosen(model: MultiLoraModel) -> None:
    with Engine(model, EngineConfig()) as engine:
        request_id = engine.add_request(auto(ASKED["c"][0]))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        result = engine.pop_result(request_id)
    assert result is not None
    assert len(deltas) == NUM_TOKENS
    assert {delta.auto for delta in deltas} == {result.auto}
    assert ran(result) == "c"


@pytest.mark.parametrize("num_steps", [0, 1, 2, 40])
def test_cancelled_at_any_time(model: MultiLoraModel, num_steps: int) -> None:
    sampling = SamplingParams(max_tokens=200, n=2, ignore_eos=True)
    with Engine(model, EngineConfig(max_step_tokens=16, block_tokens=4)) as engine:
        request_id = engine.add_request(auto(ASKED["a"][0], sampling=sampling))
        for _ in range(num_steps):
            engine.step()
        engine.cancel(request_id)
        engine.step()
        result = engine.pop_result(request_id)
        stats = engine.stats()
    assert result is not None
    assert [completion.finish_reason for completion in result.completions] == ["cancelled"] * 2
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_held, stats.num_passes) == (0, 0, 0, 0)
    assert all(state.num_leases == 0 for state in model.adapters())


def test_a_fault_ends_a_request_that_chooses(model: MultiLoraModel) -> None:
    with Engine(model, EngineConfig(max_step_tokens=8, block_tokens=4)) as engine:
        request_id = engine.add_request(auto(ASKED["a"][0], sampling=SamplingParams(n=2)))
        engine.step()
        engine.fail(RuntimeError("a fault"))
        result = engine.pop_result(request_id)
        assert result is not None
        assert [completion.finish_reason for completion in result.completions] == ["error"] * 2
        assert ran(engine.generate([auto(ASKED["a"][0])])[0]) == "a"


def test_an_adapter_that_is_unloaded_meanwhile_ends_its_request(model: MultiLoraModel) -> None:
    with Engine(model, EngineConfig(max_step_tokens=8, block_tokens=4)) as engine:
        request_id = engine.add_request(auto(ASKED["a"][0]))
        engine.step()
        model.unload("a")
        while engine.has_work:
            engine.step()
        result = engine.pop_result(request_id)
    assert result is not None
    assert result.auto is not None
    assert result.auto.name != "a"


def test_few_slots_and_blocks_are_enough(folders: dict[str, Path]) -> None:
    from loraplex import StoreConfig

    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(num_slots=1))
    for name, folder in folders.items():
        model.load_adapter(name, folder)
    for name, centroid in fit_centroids(model.base, FIT, BACKGROUND).items():
        model.registry.set_centroid(name, centroid)
    asked = [(name, prompt) for name in NAMES for prompt in ASKED[name][:3]]
    config = EngineConfig(max_step_tokens=16, block_tokens=4, max_running=3, cache_bytes=30 * 4 * 2 * 2 * 2 * 16 * 4)
    with Engine(model, config) as engine:
        found = engine.generate([auto(prompt) for _, prompt in asked])
        assert [ran(result) for result in found] == [name for name, _ in asked]


@pytest.mark.parametrize("kind", ["spectr", "xlora"])
def test_a_mixture_is_chosen_by_its_own_centroid(model: MultiLoraModel, kind: str) -> None:
    model.create_mixture("mix", ["a", "b"], SpectrConfig() if kind == "spectr" else XLoraConfig())
    own = [[*row, *ENDS["mix"]] for row in drawn(40, 8, length=4)]
    centroid = fit_centroids(model.base, {"mix": own[:6]}, BACKGROUND)["mix"]
    model.registry.set_centroid("mix", centroid)
    with Engine(model, EngineConfig()) as engine:
        expected = engine.generate([Request(own[7], adapters="mix", sampling=GREEDY, return_scalings=True)])[0]
        found = engine.generate([auto(own[7], return_scalings=True)])[0]
    assert ran(found) == "mix"
    assert found.token_ids == expected.token_ids
    assert found.scalings is not None
    assert expected.scalings is not None
    assert torch.allclose(found.scalings[0].values, expected.scalings[0].values, atol=1e-5)
    model.unload("mix")
    assert model.registry.auto.names() == list(NAMES)


def test_generate_and_calls_choose_rows(model: MultiLoraModel) -> None:
    prompts = [ASKED["a"][0], ASKED["b"][0], ASKED["c"][0][4:]]
    ids, mask = torch.zeros(2, 3, 34, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 34 - len(prompt) :], mask[row, 34 - len(prompt) :] = torch.tensor(prompt), 1
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, mask, adapters=["auto", "b", "auto"], **options)
    assert torch.equal(found, model.generate(ids, mask, adapters=["a", "b", "c"], **options))
    with torch.no_grad():
        logits = model(ids, mask, adapters=["auto", None, "auto"]).logits
        assert torch.equal(logits, model(ids, mask, adapters=["a", None, "c"]).logits)
        with pytest.raises(RequestError, match="past_key_values"):
            model(ids[:, :1], adapters=["auto"] * 3, past_key_values=object())


def test_names_and_links_with_auto_are_refused(model: MultiLoraModel, folders: dict[str, Path]) -> None:
    with pytest.raises(NameFormatError, match="reserved"):
        model.load_adapter("auto", folders["a"])
    with Engine(model, EngineConfig()) as engine:
        for link in ("auto:0.5", "a+auto", [("auto", 1.0)]):
            with pytest.raises(LinkSyntaxError, match="'auto'"):
                engine.generate([Request([5, 6], adapters=link)])


def test_centroids_follow_what_is_loaded(model: MultiLoraModel, folders: dict[str, Path]) -> None:
    index = model.registry.auto
    model.load_adapter("b", folders["b"], replace=True)  # whose folder has none
    assert index.names() == ["a", "c"]
    model.unload("c")
    assert index.names() == ["a"]
    with pytest.raises(AdapterNotFoundError):
        model.registry.set_centroid("c", index.get("a"))
    other = PromptCentroid(mean=torch.ones(3), background=torch.zeros(3), num_prompts=1)
    with pytest.raises(BaseModelMismatchError, match="size 3"):
        model.registry.set_centroid("a", other)
    with pytest.raises(UnsupportedAdapterError, match="decoder"):
        fit_centroids(tiny_model("t5"), {"a": [[5]]}, [[6]])
