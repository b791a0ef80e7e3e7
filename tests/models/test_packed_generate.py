"""`generate` on packed passes: the tokens of transformers' own loop, and its own loop wherever they can't run."""

import threading

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.engine.packed_generate import PackedGenerator
from loraplex.errors import AdapterNotFoundError, CapacityError, RequestError
from loraplex.residual.registry import AttentionRequest
from tests.engine.engines import INVOCATION, make_model, write_adapters
from tests.tiny_models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.needs("compiler")

ROWS = [None, "0", "0:0.5+2:0.7", "alora", "science", "second:0.5+1"]
LENGTHS = (3, 40, 17, 9, 21, 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_adapters(name, tmp_path_factory.mktemp(name)) for name in ("llama", "gpt2", "gemma2")}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, folders):
    return make_model(request.param, folders[request.param])


@pytest.fixture
def llama(folders):
    return make_model("llama", folders["llama"])


def batch() -> dict[str, torch.Tensor]:
    """A row of each kind, padded on the left."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(ROWS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = torch.randint(7, VOCAB_SIZE, (length,), generator=draw)
        mask[row, -length:] = 1
    ids[ROWS.index("alora"), -4:-2] = torch.tensor(INVOCATION)
    return {"input_ids": ids, "attention_mask": mask}


def both(model: MultiLoraModel, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """What the packed passes and transformers' own loop give, from the same random numbers."""
    made = []
    for packed in (True, False):
        torch.manual_seed(5)
        made.append(model.generate(**{**batch(), "adapters": ROWS, "packed": packed, **options}))
    return made[0], made[1]


OPTIONS = {
    "greedy": {"do_sample": False, "max_new_tokens": 12},
    "sampled": {"do_sample": True, "max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "several": {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3},
    "penalties": {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "ends": {"do_sample": True, "max_new_tokens": 24, "eos_token_id": list(range(0, VOCAB_SIZE, 9)), "pad_token_id": 0},
    "length": {"do_sample": False, "max_length": max(LENGTHS) + 4},
    "default length": {"do_sample": False},
    "undrafted": {"do_sample": False, "max_new_tokens": 12, "draft": False},
    "config": {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=5)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_transformers_own_loop(model, name):
    packed, own = both(model, **OPTIONS[name])
    assert packed.tolist() == own.tolist()


def test_rows_of_other_adapters_differ(model):
    """The comparison above would not notice adapters that do nothing."""
    packed, _ = both(model, **OPTIONS["greedy"])
    base = model.generate(**batch(), packed=True, **OPTIONS["greedy"])
    changed = (packed != base)[:, max(LENGTHS) :].any(dim=1).tolist()
    assert changed == [False, *[True] * (len(ROWS) - 1)]


def test_a_row_gets_the_same_tokens_alone(model):
    together, _ = both(model, **OPTIONS["greedy"])
    for row, (choice, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        ids = batch()["input_ids"][row : row + 1, -length:]
        alone = model.generate(ids, adapters=[choice], packed=True, **OPTIONS["greedy"])
        assert alone[0].tolist() == together[row, -alone.shape[1] :].tolist()


def test_prompts_longer_than_a_pass_are_cut(llama, monkeypatch):
    monkeypatch.setattr("loraplex.engine.packed_generate.pass_tokens", lambda runner: 16)
    packed, own = both(llama, **OPTIONS["greedy"])
    assert packed.tolist() == own.tolist()


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True


class Odd(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, float("-inf"))


class AfterThree(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 3)


def test_callbacks_of_the_caller_see_what_they_see_in_transformers_own_loop(llama):
    streams = []
    made = []
    for packed in (True, False):
        streams.append(Streamed())
        ids = batch()["input_ids"][1:2]
        made.append(
            llama.generate(
                ids,
                adapters=["0"],
                packed=packed,
                do_sample=False,
                max_new_tokens=9,
                streamer=streams[-1],
                logits_processor=[Odd()],
                stopping_criteria=[AfterThree(ids.shape[1])],
            )
        )
    assert made[0].tolist() == made[1].tolist()
    assert made[0].shape[1] == max(LENGTHS) + 3
    assert all(token % 2 for token in made[0][0, max(LENGTHS) :].tolist())
    assert streams[0].told == streams[1].told
    assert all(stream.has_ended for stream in streams)


LEFT_TO_TRANSFORMERS = {
    "beams": ({"num_beams": 2}, "beam"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "an own cache": ({"past_key_values": object()}, "past_key_values"),
    "a whole output": ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    "captures": ({"attention": AttentionRequest()}, "captured attention"),
    "scalings": ({"return_scalings": True}, "scalings are asked for"),
    "right padding": ({"attention_mask": batch()["attention_mask"].flip(1)}, "padded on the left"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale"),
    "too long": ({"max_new_tokens": 10**6}, "longer than"),
    "too many": ({"num_return_sequences": 10**6, "do_sample": True}, "room"),
}


@pytest.mark.parametrize("name", LEFT_TO_TRANSFORMERS)
def test_a_call_that_packed_passes_cannot_run_says_why(llama, name):
    options, word = LEFT_TO_TRANSFORMERS[name]
    with pytest.raises(RequestError, match=f"packed=True, but .*{word}"):
        llama.generate(**{**batch(), "adapters": ROWS, "packed": True, "max_new_tokens": 2, **options})
    assert not any(state.num_leases for state in llama.adapters())


def test_by_default_such_a_call_runs_in_transformers_own_loop(llama):
    made = llama.generate(**batch(), adapters=ROWS, num_beams=2, do_sample=False, max_new_tokens=3)
    assert made.shape == (len(ROWS), max(LENGTHS) + 3)


def test_nothing_is_held_after_a_call_that_fails_or_ends(llama):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llama.generate(**batch(), adapters=ROWS, packed=True, max_new_tokens=3, logits_processor=[Broken()])
    both(llama, **OPTIONS["greedy"])
    generator = llama._runner._packed
    assert generator._num_promised == generator._runner.pool.num_held == generator._runner.table.num_rows_held == 0
    assert not any(state.num_leases for state in llama.adapters())


def test_wrong_adapters_are_refused_as_ever(llama):
    with pytest.raises(AdapterNotFoundError, match="nowhere"):
        llama.generate(**batch(), adapters=[*ROWS[:-1], "nowhere"], packed=True)


def test_too_many_adapters_are_named_together(folders):
    small = make_model("llama", folders["llama"], mixtures=False, num_slots=2)
    with pytest.raises(CapacityError, match="'0', '1', '2'"):
        small.generate(batch()["input_ids"][:3], adapters=["0", "1", "2"], packed=True)


def test_weights_in_another_place_are_found(llama):
    """A runner that knows where weights lay would read memory that is somebody else's."""
    before, _ = both(llama, **OPTIONS["greedy"])
    for parameter in llama.base.parameters():
        parameter.data = parameter.data * 1.5
    packed, own = both(llama, **OPTIONS["greedy"])
    assert packed.tolist() == own.tolist() != before.tolist()


def test_calls_of_several_threads_and_an_engine_share_the_model(llama):
    expected, _ = both(llama, **OPTIONS["greedy"])
    made: list[torch.Tensor] = []
    with Engine(llama, EngineConfig()) as engine:
        calls = [
            threading.Thread(
                target=lambda: made.append(llama.generate(**batch(), adapters=ROWS, packed=True, **OPTIONS["greedy"]))
            )
            for _ in range(4)
        ]
        for call in calls:
            call.start()
        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        (result,) = engine.generate([Request(batch()["input_ids"][1].tolist(), adapters="0", sampling=sampling)])
        for call in calls:
            call.join()
    assert [tokens.tolist() for tokens in made] == [expected.tolist()] * 4
    assert list(result.token_ids) == expected[1, max(LENGTHS) :].tolist()
    after, _ = both(llama, **OPTIONS["greedy"])
    assert after.tolist() == expected.tolist()


def test_closing_gives_the_base_model_back():
    base = tiny_model("llama")
    classes = [type(module) for module in base.modules()]
    model = MultiLoraModel(base)
    model.generate(batch()["input_ids"], packed=True, max_new_tokens=2)
    assert [type(module) for module in base.modules()] != classes
    model.close()
    assert [type(module) for module in base.modules()] == classes


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1"])
def test_a_model_with_states_is_left_to_transformers(name):
    from tests.architectures.variants import make_model as make_variant

    model = MultiLoraModel(make_variant(name))
    ids = batch()["input_ids"][1:2]
    with pytest.raises(RequestError, match="packed=True"):
        model.generate(ids, packed=True, max_new_tokens=2)
    assert model.generate(ids, max_new_tokens=2).shape == (1, max(LENGTHS) + 2)


def test_a_model_without_room_for_its_keys_is_left_to_transformers(llama, monkeypatch):
    small = EngineConfig(prefix_cache=False, cache_bytes=1)
    monkeypatch.setattr("loraplex.engine.packed_generate.EngineConfig", lambda **_: small)
    ids = batch()["input_ids"][1:2]
    with pytest.raises(RequestError, match=r"packed=True, but .*cache_bytes"):
        llama.generate(ids, packed=True, max_new_tokens=2)
    assert llama.generate(ids, max_new_tokens=2).shape == (1, max(LENGTHS) + 2)


def test_drafts_are_counted(llama):
    before = llama.draft_counts.drafted
    llama.generate(**batch(), adapters=ROWS, packed=True, **OPTIONS["greedy"])
    assert llama.draft_counts.drafted > before


def test_mixtures_of_every_kind_of_head_are_the_two_pass_ones(folders):
    model = make_model("llama", folders["llama"], mixtures=False)
    configs = {
        "top": XLoraConfig(top_k_lora=2),
        "hot": XLoraConfig(softmax_temperature=0.2, layerwise_scalings=True),
        "pass": XLoraConfig(scaling_pass_value=0.3),
    }
    for seed, (name, config) in enumerate(configs.items()):
        model.create_mixture(name, ["0", "1", "2"], config, seed=seed)
    packed, own = both(model, adapters=[None, *configs, "top:0.5+hot", "pass:2+0"], do_sample=False, max_new_tokens=10)
    assert packed.tolist() == own.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # whose weights are packed where there are tiles
def test_the_first_call_alone_makes_a_runner(dtype, monkeypatch):
    starts, llama = [], MultiLoraModel(tiny_model("llama", dtype=dtype))
    start = PackedGenerator._start
    monkeypatch.setattr(PackedGenerator, "_start", lambda self, devices: starts.append(1) or start(self, devices))
    for _ in range(3):
        llama.generate(batch()["input_ids"], max_new_tokens=1)
    assert len(starts) == 1
