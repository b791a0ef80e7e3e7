"""What a request can ask for, and how it ends: several answers, seeds, stops, cancelling, errors."""

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterNotFoundError, CapacityError, ConfigError, LinkSyntaxError, RequestError
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters
from tests.tiny_models import VOCAB_SIZE, random_peft_adapter

CONFIG = EngineConfig(cache_bytes=2**22)
PROMPT = tuple(range(20, 40))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_adapters("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folders) -> MultiLoraModel:
    return make_model("llama", folders)


def test_a_seed_gives_the_same_tokens_in_any_batch(model):
    sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12)
    others = [prompted.request(max_tokens=12, temperature=1.0) for prompted in prompts((9, 30))]
    with Engine(model, CONFIG) as engine:
        alone = engine.generate([Request(PROMPT, adapters="0", sampling=sampled)])[0].token_ids
        among = engine.generate([*others, Request(PROMPT, adapters="0", sampling=sampled), *others[:2]])[10].token_ids
        other_seed = SamplingParams(temperature=1.0, top_p=0.9, seed=6, max_tokens=12)
        differs = engine.generate([Request(PROMPT, adapters="0", sampling=other_seed)])[0].token_ids
    assert alone == among
    assert alone != differs


def test_n_answers_differ_and_read_the_prompt_once(model):
    with Engine(model, CONFIG) as engine:
        result = engine.generate([Request(PROMPT * 3, sampling=SamplingParams(n=4, temperature=1.5, max_tokens=8))])[0]
        counts = engine.stats().counts
    assert [completion.index for completion in result.completions] == [0, 1, 2, 3]
    assert len({completion.token_ids for completion in result.completions}) == 4
    assert result.token_ids == result.completions[0].token_ids
    # 60 tokens: three blocks of 16 are shared, and each answer computes the rest.
    assert counts.num_prompt_tokens == 60 + 3 * 12


def test_logprobs_come_with_each_token(model):
    with Engine(model, CONFIG) as engine:
        result = engine.generate([Request(PROMPT, adapters="0", sampling=SamplingParams(max_tokens=5, logprobs=2))])[0]
    assert result.logprobs is not None
    ids = torch.tensor([[*PROMPT, *result.token_ids]])
    with torch.no_grad():
        expected = torch.log_softmax(model(ids, adapters=["0"]).logits[0], dim=-1)
    for place, entry in enumerate(result.logprobs):
        own = expected[len(PROMPT) + place - 1]
        assert entry.token_id == result.token_ids[place]
        assert entry.logprob == pytest.approx(float(own[entry.token_id]), abs=1e-3)
        assert entry.rank == 1
        assert len(entry.top) == 2


def test_a_stop_token_ends_an_answer(model):
    greedy = answer(model, prompts((20,))[0], 10)
    place = next(i for i in range(1, 10) if greedy[i] not in greedy[:i])
    with Engine(model, CONFIG) as engine:
        stopping = prompts((20,))[0].request(max_tokens=10, stop_token_ids=(greedy[place],))
        result = engine.generate([stopping])[0]
    assert result.token_ids == greedy[: place + 1]
    assert result.finish_reason == "stop"


def test_a_cancelled_request_frees_what_it_held_and_the_others_go_on(model):
    asked = prompts((12, 40))
    with Engine(model, CONFIG) as engine:
        ids = [engine.add_request(prompted.request(max_tokens=10)) for prompted in asked]
        for _ in range(4):
            engine.step()
        for request_id in ids[::2]:
            engine.cancel(request_id)
        engine.cancel("request-never-seen")
        while engine.has_work:
            engine.step()
        results = [engine.pop_result(request_id) for request_id in ids]
        stats = engine.stats()
    assert [result.finish_reason for result in results] == ["cancelled", "length"] * 5
    for prompted, result in list(zip(asked, results, strict=True))[1::2]:
        assert_same(model, prompted, result, answer(model, prompted, 10))
    assert (stats.num_blocks_held, stats.num_passes) == (0, 0)
    assert all(state.num_leases == 0 for state in model.adapters())


@pytest.mark.parametrize(
    ("request_", "error", "names"),
    [
        (Request(()), RequestError, "prompt"),
        (Request([VOCAB_SIZE]), RequestError, str(VOCAB_SIZE)),
        (Request([True]), RequestError, "True"),
        (Request(PROMPT, adapters="unknown"), AdapterNotFoundError, "unknown"),
        (Request(PROMPT, adapters="0:"), LinkSyntaxError, "0:"),
        (Request(range(1, 120)), RequestError, "119 tokens"),
        (Request(PROMPT, adapters="science", sampling=SamplingParams(max_tokens=70)), CapacityError, "2 passes"),
        (Request(PROMPT, sampling=SamplingParams(stop_token_ids=(VOCAB_SIZE,))), RequestError, str(VOCAB_SIZE)),
    ],
)
def test_what_cant_be_served_is_refused_before_anything_runs(model, request_, error, names):
    with Engine(model, EngineConfig(cache_bytes=8 * 2**13, max_length=100)) as engine:
        with pytest.raises(error, match=names):
            engine.generate([Request(PROMPT), request_])
        assert not engine.has_work
        assert engine.stats().counts.num_steps == 0


def test_a_request_whose_adapter_is_gone_fails_alone(model):
    asked = prompts((12,))[:3]
    with Engine(model, CONFIG) as engine:
        ids = [engine.add_request(prompted.request(max_tokens=6)) for prompted in asked]
        late = engine.add_request(Request(PROMPT, adapters="2:0.5", sampling=SamplingParams(max_tokens=6)))
        model.unload("second")
        model.unload("science")
        model.unload("2")
        while engine.has_work:
            engine.step()
        failed = engine.pop_result(late)
        assert failed.finish_reason == "error"
        assert isinstance(failed.error, AdapterNotFoundError)
        for prompted, request_id in zip(asked, ids, strict=True):
            assert_same(model, prompted, engine.pop_result(request_id), answer(model, prompted, 6))


def test_a_pass_that_fails_ends_only_the_requests_that_cant_run(model, monkeypatch):
    asked = prompts((12,))[:3]
    with Engine(model, CONFIG) as engine:
        run = engine._runner.run

        def fails_for_zero(chunks):
            if any(chunk.sequence.state.request.adapters == "0" for chunk in chunks):
                raise RuntimeError("out of memory")
            return run(chunks)

        monkeypatch.setattr(engine._runner, "run", fails_for_zero)
        results = engine.generate([prompted.request(max_tokens=6) for prompted in asked])
        assert [result.finish_reason for result in results] == ["length", "error", "length"]
        assert "out of memory" in str(results[1].error)
        assert engine.stats().num_blocks_held == 0


def test_a_closed_engine_refuses_and_ends_what_ran(model):
    engine = Engine(model, CONFIG)
    request_id = engine.add_request(Request(PROMPT))
    engine.step()
    engine.close()
    assert engine.pop_result(request_id).finish_reason == "cancelled"
    with pytest.raises(RequestError, match="closed"):
        engine.add_request(Request(PROMPT))


def test_a_running_request_keeps_its_version_and_new_ones_get_the_new(model, folders, tmp_path):
    prompted = next(p for p in prompts((15,)) if p.adapters == "0")
    old = answer(model, prompted, 8)
    changed = random_peft_adapter(model.base, tmp_path / "new", targets=["q_proj", "v_proj"], seed=77)
    for mixture in ("science", "second"):
        model.unload(mixture)
    with Engine(model, CONFIG) as engine:
        running = engine.add_request(prompted.request(max_tokens=8))
        engine.step()
        engine.step()
        model.load_adapter("0", changed, replace=True)
        late = engine.add_request(prompted.request(max_tokens=8))
        while engine.has_work:
            engine.step()
        new = answer(model, prompted, 8)
        assert new != old, "the new version must change the answer"
        assert_same(model, prompted, engine.pop_result(late), new)
        assert engine.pop_result(running).token_ids == old


def test_adapters_on_disk_are_loaded_while_others_run(folders):
    model = make_model("llama", folders, host_bytes=70_000)
    tiers = {state.name: state.tier for state in model.adapters()}
    assert "disk" in tiers.values(), "the budget must push some adapter out"
    asked = [prompted for prompted in prompts((12,)) if prompted.adapters in (None, "0", "1", "2")]
    with Engine(model, EngineConfig(cache_bytes=2**22, max_running=2)) as engine:
        results = engine.generate([prompted.request(max_tokens=6) for prompted in asked * 2])
    for prompted, result in zip(asked * 2, results, strict=True):
        assert_same(model, prompted, result, answer(model, prompted, 6))


@pytest.mark.parametrize("options", [{"max_running": 0}, {"block_tokens": 1.5}, {"draft": 1}, {"max_length": 1}])
def test_engine_options_that_cant_be_used_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EngineConfig(**options)


def test_a_cache_too_small_for_a_block_is_refused(model):
    before = model.base.config._attn_implementation
    with pytest.raises(ConfigError, match="cache_bytes"):
        Engine(model, EngineConfig(cache_bytes=100))
    assert model.base.config._attn_implementation == before
