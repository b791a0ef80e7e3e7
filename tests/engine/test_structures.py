"""Answers that match an expression, are one of some choices or follow a grammar, and lists of tokens and words."""

import random
import re

import pytest
import torch

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.engine.frontend.structured_output import MAX_GRAMMAR_BYTES
from loraplex.engine.sampling.restrictions import MAX_BAD_WORD_TOKENS, Restrictions, bad_word_tokens
from loraplex.engine.sampling.sampler import Sampler
from loraplex.errors import RequestError
from loraplex.models.checkpoints.loading import load_tokenizer
from tests.parts import require

require("llguidance")

ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine(smollm2):
    with Engine(MultiLoraModel.from_pretrained(smollm2, dtype="float32"), EngineConfig(cache_bytes=2**26)) as engine:
        yield engine


def texts_of(engine, **options):
    sampling = [SamplingParams(max_tokens=24, temperature=1.0, seed=seed, **options) for seed in range(6)]
    results = engine.generate([Request(ASKED, sampling=one) for one in sampling])
    assert all(result.error is None for result in results)
    return [result.text for result in results if result.finish_reason == "stop"]


def test_answers_match_a_regular_expression(engine):
    texts = texts_of(engine, regex=r"[0-9]{3}-[a-z]{2,4}")
    assert len(texts) == 6
    assert all(re.fullmatch(r"[0-9]{3}-[a-z]{2,4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_answers_are_one_of_the_choices(engine):
    texts = texts_of(engine, choice=("Paris", "Rome", 'a "quoted"\nline', "ünïcode"))
    assert len(texts) == 6
    assert set(texts) <= {"Paris", "Rome", 'a "quoted"\nline', "ünïcode"}


MARKS = "abc de.*+?|[](){}^$&~#-_<>%\n\t\"'\\é中"


@pytest.mark.parametrize(("number", "length"), [(3000, 15), pytest.param(40, 200, marks=pytest.mark.slow)])
def test_thousands_of_choices_with_any_characters(engine, number, length):
    draw = random.Random(number)
    choices = tuple("x" + "".join(draw.choices(MARKS, k=length)) for _ in range(number))
    sampling = [SamplingParams(max_tokens=600, temperature=1.0, seed=seed, choice=choices) for seed in range(2)]
    results = engine.generate([Request(ASKED, sampling=one) for one in sampling])
    assert [result.finish_reason for result in results] == ["stop", "stop"]
    assert {result.text for result in results} <= set(choices)


def test_choices_that_begin_others_can_be_chosen(engine):
    bias = dict.fromkeys(engine.model.tokenizer(" 1", add_special_tokens=False)["input_ids"], 100.0)
    texts = texts_of(engine, choice=("1", "1 1", "1 1 1"), logit_bias=bias)
    assert set(texts) == {"1 1 1"}


def test_what_is_too_much_for_the_grammars_is_said_so(engine):
    doubled = "\n".join(f"a{number}: a{number + 1} a{number + 1}" for number in range(60))
    sampling = SamplingParams(max_tokens=6, grammar=f'start: a0\n{doubled}\na60: "x"')
    (result,) = engine.generate([Request(ASKED, sampling=sampling)])
    assert result.finish_reason == "error"
    assert "grammar can't be followed" in str(result.error)
    assert "logit_bias" not in str(result.error)


@pytest.mark.parametrize(
    "grammar", ['start: "SELECT " word\nword: /[a-z]{1,6}/', 'root ::= "SELECT " word\nword ::= [a-z]{1,6}']
)
def test_answers_follow_a_grammar_in_either_form(engine, grammar):
    texts = texts_of(engine, grammar=grammar)
    assert texts
    assert all(re.fullmatch(r"SELECT [a-z]{1,6}", text) for text in texts)


def test_json_without_whitespace(engine):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    texts = texts_of(engine, json_schema=schema | {"additionalProperties": False}, json_whitespace=False)
    assert set(texts) <= {'{"a":"x"}', '{"a":"y"}'}
    assert texts


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"regex": "a", "choice": ("b",)},
        {"regex": ""},
        {"choice": ()},
        {"choice": ("a", "")},
        {"choice": "ab"},
        {"grammar": "no grammar ((("},
        {"grammar": "root ::= " + "(" * 5000},
        {"grammar": "a" * (MAX_GRAMMAR_BYTES + 1)},
        {"allowed_token_ids": ()},
        {"allowed_token_ids": (10**6,)},
        {"allowed_token_ids": (1.5,)},
        {"bad_words": ("",)},
        {"bad_words": "word"},
        {"bad_words": ("word " * MAX_BAD_WORD_TOKENS,)},
        {"include_stop": 1},
    ],
    ids=lambda options: str(options)[:40],
)
def test_what_cant_be_followed_is_refused_before_anything_runs(engine, options):
    with pytest.raises(RequestError, match=next(iter(options))):
        engine.generate([Request("x", sampling=SamplingParams(**options))])
    assert engine.stats().num_running == 0


def test_an_answer_has_allowed_tokens_only(engine):
    allowed = (284, 339, 5, 1717)
    (result,) = engine.generate([Request(ASKED, sampling=SamplingParams(max_tokens=8, allowed_token_ids=allowed))])
    assert set(result.token_ids) <= set(allowed)
    assert len(result.token_ids) == 8


def test_allowed_tokens_that_are_forbidden_otherwise_leave_none(engine):
    sampling = SamplingParams(max_tokens=8, allowed_token_ids=(5,), logit_bias={5: -float("inf")})
    (result,) = engine.generate([Request(ASKED, sampling=sampling)])
    assert result.finish_reason == "error"
    assert "allowed_token_ids" in str(result.error)


def test_bad_words_never_come(engine):
    (free,) = engine.generate([Request(ASKED, sampling=SamplingParams(max_tokens=12))])
    assert "Paris" in free.text
    (bound,) = engine.generate([Request(ASKED, sampling=SamplingParams(max_tokens=12, bad_words=("Paris", "France")))])
    assert "Paris" not in bound.text
    assert "France" not in bound.text


def test_bad_words_are_vllms_token_sequences(smollm2):
    """vLLM's rule (SamplingParams.update_from_tokenizer), written out."""
    tokenizer = load_tokenizer(smollm2)
    words = ["Paris", " Paris", "antidisestablishmentarianism", "x y"]
    expected = []
    for word in words:
        for prefix in ("", " "):
            tokens = tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)
            if not prefix or (tokens[0] != expected[-1][0] and len(tokens) == len(expected[-1])):
                expected.append(tokens)
    assert bad_word_tokens(words, tokenizer) == expected


def test_a_bad_words_last_token_is_forbidden_behind_the_others_alone():
    rule = Restrictions(None, [[3, 4, 5], [7], [4, 6]])
    cases = {(): {7}, (3,): {7}, (3, 4): {5, 6, 7}, (9, 3, 4): {5, 6, 7}, (4,): {6, 7}, (4, 3): {7}}
    for answer, forbidden in cases.items():
        logits = torch.zeros(10)
        rule.apply(logits, answer)
        assert set((logits == -float("inf")).nonzero().flatten().tolist()) == forbidden, answer


def test_bad_words_count_the_answer_and_not_the_prompt():
    sampling = SamplingParams(bad_words=("a b",))
    sampler = Sampler(sampling, (3,), (), 0, None, Restrictions(None, [[3, 4]]))
    values = torch.zeros(10)
    values[4], values[3] = 2.0, 1.0
    assert sampler.choose(values) == 4
    sampler.took(3)
    assert sampler.choose(values) == 3
    sampler.took(5)
    assert sampler.choose(values) == 4


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_in_the_text_where_that_is_wanted(engine, include):
    sampling = SamplingParams(max_tokens=12, stop=("is Par", "capital of"), include_stop=include)
    (result,) = engine.generate([Request(ASKED, sampling=sampling)])
    assert result.finish_reason == "stop"
    assert result.text.endswith("capital of") == include
    assert result.text == ("The capital of" if include else "The ")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_tokens_text_is_there_where_that_is_wanted(engine, include):
    (free,) = engine.generate([Request(ASKED, sampling=SamplingParams(max_tokens=6))])
    sampling = SamplingParams(max_tokens=12, stop_token_ids=(free.token_ids[3],), include_stop=include)
    (result,) = engine.generate([Request(ASKED, sampling=sampling)])
    assert result.token_ids == free.token_ids[:4]
    tokenizer = engine.model.tokenizer
    assert result.text == tokenizer.decode(free.token_ids[: 4 if include else 3])


def test_special_tokens_are_in_the_text_where_they_are_wanted(engine):
    sampling = SamplingParams(max_tokens=64, include_stop=True, skip_special_tokens=False)
    (result,) = engine.generate([Request(ASKED, sampling=sampling)])
    assert result.finish_reason == "stop"
    assert result.text.endswith("<|im_end|>")


def test_a_stop_string_before_min_tokens_is_text(engine):
    sampling = SamplingParams(max_tokens=12, min_tokens=6, stop=("capital",))
    (free,) = engine.generate([Request(ASKED, sampling=SamplingParams(max_tokens=12))])
    (result,) = engine.generate([Request(ASKED, sampling=sampling)])
    assert "capital" in free.text
    assert result.text == free.text
