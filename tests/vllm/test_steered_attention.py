"""Attention steered and captured inside vLLM against loraplex's own model, beside rows that ask for nothing."""

import json

import numpy as np
import pytest
import torch

from loraplex.residual import AttentionRequest, CaptureRequest, Steering
from tests.vllm.residual_worlds import add_residuals, compared
from tests.vllm.worlds import TOLERANCE, TOP, answer_of, counted, engine, engine_core, lora_request, make_world, prompts

NUM_TOKENS = 6
OPTIONS = {"residuals": True, "attention": True}
SIZES = {"max_loras": 8, "max_cpu_loras": 16, "max_lora_rank": 16}
STEERED = [
    [{"start": 2, "end": 5, "strength": 6.0}],
    [{"start": 0, "end": 4, "strength": 0}],  # the first tokens see nothing then
    [{"start": 1, "end": 7, "strength": 3.0, "layers": [1], "heads": [0, 3]}, {"start": 5, "end": 9, "strength": 0.2}],
    [{"start": 2, "end": 4, "share": 0.5}, {"start": 6, "end": 8, "share": 0.3, "layers": [1], "heads": [0, 2]}],
]
CAPTURED = [
    {"layers": [0, 1], "queries": 3},
    {"layers": [1], "queries": "generated", "heads": [1, 2]},
    {"layers": None, "queries": "all", "reduce": "mean"},
]
CHOICES = [None, "protein", "block:0.5+protein", "block", "protein", None, "reft", "materials", None]


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """A world with residuals of every kind, and loraplex's own model with them."""
    world = make_world(tmp_path_factory.mktemp("steered"))
    return world, add_residuals(world)


def args_of_rows():
    """What each of CHOICES' rows asks for: steering, a capture, both, nothing."""
    extras = [{"loraplex_steer": steer} for steer in STEERED]
    extras += [{"loraplex_capture": json.dumps(capture)} for capture in CAPTURED]
    return [*extras, {"loraplex_steer": json.dumps(STEERED[0]), "loraplex_capture": CAPTURED[0]}, None]


def generate(llm, rows, extras, num_tokens=NUM_TOKENS):
    """Answers and request ids."""
    from vllm import SamplingParams

    options = {"temperature": 0, "logprobs": 2 * TOP, "ignore_eos": True, "detokenize": False}
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for _, prompt in rows],
        [SamplingParams(max_tokens=num_tokens, extra_args=extra, **options) for extra in extras],
        lora_request=[lora_request(choice, {}) for choice, _ in rows],
        use_tqdm=False,
    )
    return [answer_of(output.outputs[0]) for output in outputs], [output.request_id for output in outputs]


def steerings(extra):
    given = (extra or {}).get("loraplex_steer") or []
    given = json.loads(given) if isinstance(given, str) else given
    return [
        Steering(
            spans=((one["start"], one["end"]),),
            strength=one.get("strength", 1.0),
            share=one.get("share"),
            layers=None if one.get("layers") is None else tuple(one["layers"]),
            heads=None if one.get("heads") is None else tuple(one["heads"]),
        )
        for one in given
    ]


def check_captures(model, llm, row, extra, answer, request_id):
    (choice, prompt), given = row, extra["loraplex_capture"]
    wanted = json.loads(given) if isinstance(given, str) else given
    heads = None if wanted.get("heads") is None else tuple(wanted["heads"])
    layers = None if wanted["layers"] is None else tuple(wanted["layers"])
    capture = CaptureRequest(layers=layers, heads=heads, reduce=wanted.get("reduce"))
    request = AttentionRequest(capture=capture, steering=[steerings(extra)], prompt_lengths=[len(prompt)])
    model(torch.tensor([[*prompt, *answer.tokens[:-1]]]), adapters=[choice], attention=request, use_cache=False)
    (found,) = llm.collective_rpc("loraplex_attention", args=(request_id,))[0]
    num_prompt, queries = len(prompt), wanted["queries"]
    places = {"all": (0, None), "generated": (num_prompt - 1, None)}
    start, stop = places[queries] if queries in places else (num_prompt - queries, num_prompt)
    expected = request.captures[0].weights[:, :, start:stop]
    assert found["query_positions"] == list(range(start, start + expected.shape[2]))
    assert found["layers"] == list(layers or range(2))
    weights = np.array(found["weights"])
    np.testing.assert_allclose(weights, expected, atol=1e-4)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-4)
    assert llm.collective_rpc("loraplex_attention", args=(request_id,))[0] == []  # given once


def check(model, llm, rows, extras, num_tokens=NUM_TOKENS):
    answers, ids = generate(llm, rows, extras, num_tokens)
    found = compared(model, rows, answers, [steerings(extra) for extra in extras])
    assert found.is_none, found
    for row, extra, answer, request_id in zip(rows, extras, answers, ids, strict=True):
        if extra is not None and "loraplex_capture" in extra:
            check_captures(model, llm, row, extra, answer, request_id)
    return answers


@pytest.mark.vllm_smoke
def test_steered_and_captured_rows_equal_loraplexs_own(residual):
    world, model = residual
    rows, extras = list(zip(CHOICES, prompts(len(CHOICES)), strict=True)), args_of_rows()
    with engine(world, OPTIONS, **SIZES) as llm:
        answers = check(model, llm, rows, extras)
        # the control: the same answers aren't those of rows that aren't steered
        wrong = compared(model, rows[:3], answers[:3])
        assert wrong.largest > 10 * TOLERANCE, wrong


def test_attention_is_served_without_residuals(residual):
    world, model = residual
    rows, extras = list(zip([None, "protein"], prompts(2), strict=True)), [args_of_rows()[3], args_of_rows()[7]]
    with engine(world, {"attention": True}, **SIZES) as llm:
        check(model, llm, rows, extras)


def test_preempted_rows_equal_loraplexs_own(residual):
    """Every row begins with one block of 32 tokens and ends with two or three; there are six, and one is vLLM's."""
    world, model = residual
    choices = [None, "protein", "block:0.5+protein", None]
    rows = [(choice, prompt + prompt) for choice, prompt in zip(choices, prompts(4, seed=6), strict=True)]
    settings = {"num_gpu_blocks_override": 7, "max_model_len": 96, "max_num_batched_tokens": 128}
    extras = [args_of_rows()[3], args_of_rows()[7], args_of_rows()[5], None]
    with engine(world, OPTIONS, **settings, **SIZES) as llm:
        preemptions = counted(engine_core(llm).scheduler, "_preempt_request")
        check(model, llm, rows, extras, 30)
        assert preemptions.count > 0


def test_chunks_and_the_prefix_cache_equal_loraplexs_own(residual):
    world, model = residual
    bases = prompts(len(CHOICES), seed=5)
    rows = [
        (choice, (prompt * 12)[: 90 + 7 * i]) for i, (choice, prompt) in enumerate(zip(CHOICES, bases, strict=True))
    ]
    settings = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}
    with engine(world, OPTIONS, **settings, **SIZES) as llm:
        check(model, llm, rows, args_of_rows())
        lookups = counted(engine_core(llm).scheduler.kv_cache_manager, "get_computed_blocks")
        check(model, llm, rows, args_of_rows())
        reused = sorted(num_tokens for _, num_tokens, _ in lookups.results)
        assert reused[:4] == [0] * 4  # rows that capture compute everything themselves
        assert reused[4] >= 64
        # the same prompts, steered otherwise: none of the blocks above
        check(model, llm, rows[:3], [args_of_rows()[1], args_of_rows()[2], None])


@pytest.mark.parametrize(
    ("choice", "extra", "words"),
    [
        (None, {"loraplex_steer": [{"start": 2, "end": 99, "strength": 2}]}, r"span \(2, 99\)"),
        (None, {"loraplex_steer": "["}, "JSON"),
        (None, {"loraplex_capture": {"layers": [2], "queries": 1}}, r"layers \[2\]"),
        ("linked", {"loraplex_steer": STEERED[0]}, "linked residuals"),
        ("damaged", None, "can't be read"),
    ],
)
def test_what_cant_be_done_is_refused_before_it_runs(request_salts, choice, extra, words):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=words):
        request_salts(choice, extra)


def test_salts_tell_what_keys_depend_on(request_salts):
    from vllm.exceptions import VLLMValidationError

    plain = request_salts("protein", None)
    assert plain is None
    assert request_salts("after", None) != request_salts("after", None, num_prompt=11)
    steer = {"loraplex_steer": STEERED[0]}
    assert request_salts(None, steer) == request_salts(None, {"loraplex_steer": json.dumps(STEERED[0])})
    assert request_salts(None, steer) != request_salts(None, {"loraplex_steer": STEERED[1]})
    capture = {"loraplex_capture": CAPTURED[0]}
    assert request_salts(None, capture) != request_salts(None, capture)
    assert "tenant" in request_salts("after", steer, salt="tenant")
    for own in (None, "tenant"):  # a client's salt that is written as the plugin's would be
        salted = request_salts(None, steer, salt=own)
        assert request_salts(None, None, salt=salted) != salted
        assert request_salts(None, None, salt=f"loraplex steer {STEERED[0]}") != salted
    assert request_salts(None, None, salt="tenant") != request_salts(None, None, salt="other")
    assert request_salts("block", None, resumable=True) is None
    for choice, extra in (("after", None), ("block", steer)):
        with pytest.raises(VLLMValidationError, match="streaming input"):
            request_salts(choice, extra, resumable=True)
    with pytest.raises(VLLMValidationError, match="beam search"):
        request_salts("after", None, request_id="cmpl-1-0-abc-beam-3")


@pytest.fixture(scope="module")
def request_salts(residual):
    """What makes the salt of a request, without an engine."""
    from types import SimpleNamespace

    from vllm import SamplingParams

    from loraplex.vllm_plugin.catalog import FolderCatalog
    from loraplex.vllm_plugin.options import PluginOptions
    from loraplex.vllm_plugin.request_salts import RequestSalts

    world, model = residual
    (world.named / "damaged").mkdir(exist_ok=True)
    (world.named / "damaged" / "residual_config.json").write_text("{")
    options = PluginOptions(folder=str(world.named), linked=1, **OPTIONS)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=model.base.config))
    salts = RequestSalts(config, options, FolderCatalog(options))

    def salted(choice, extra, num_prompt=12, salt=None, **more):
        request = SimpleNamespace(
            lora_request=lora_request(choice, {}),
            prompt_token_ids=list(range(num_prompt)),
            sampling_params=SamplingParams(max_tokens=4, extra_args=extra),
            cache_salt=salt,
            **{"request_id": "cmpl-1-0-abc", **more},
        )
        salts.add(request)
        return request.cache_salt

    return salted
