"""Answers that follow a JSON schema."""

import json

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.frontend.structured_output import _Grammars, _Structured, make_constraint
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import RequestError
from tests.parts import require
from tests.training.tiny_jobs import tiny_tokenizer

require("llguidance")
import llguidance  # noqa: E402  # a part that may be missing

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "population": {"type": "integer", "maximum": 9}},
    "required": ["city", "population"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(smollm2):
    with Engine(MultiLoraModel.from_pretrained(smollm2, dtype="float32"), EngineConfig(cache_bytes=2**27)) as engine:
        yield engine


def test_answers_follow_the_schema_beside_free_ones(engine):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    free = Request(messages, sampling=SamplingParams(max_tokens=8))
    bound = Request(messages, sampling=SamplingParams(max_tokens=60, json_schema=SCHEMA))
    wild = Request(messages, sampling=SamplingParams(max_tokens=60, json_schema=SCHEMA, temperature=0.8, seed=1))
    results = engine.generate([free, bound, wild])
    assert "Paris" in results[0].text
    for result in results[1:]:
        assert result.finish_reason == "stop"
        value = json.loads(result.text)
        assert value["city"] in ("Paris", "Rome")
        assert isinstance(value["population"], int)
        assert value["population"] <= 9
        assert set(value) == {"city", "population"}


@pytest.mark.parametrize("schema", ["{", '{"type": "nothing"}'])
def test_schemas_that_cant_be_followed_are_refused(engine, schema):
    with pytest.raises(RequestError, match="json_schema"):
        engine.generate([Request("x", sampling=SamplingParams(json_schema=schema))])


def test_whitespace_between_the_parts_has_an_end(engine):
    """However much a model likes new lines."""
    (newline,) = engine.model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    sampling = SamplingParams(max_tokens=60, json_schema=SCHEMA, logit_bias={newline: 100.0})
    (result,) = engine.generate([Request("Paris?", sampling=sampling)])
    assert result.finish_reason == "stop"
    assert "\n" in result.text
    assert "\n\n" not in result.text
    assert set(json.loads(result.text)) == {"city", "population"}


def test_an_answer_that_is_complete_ends_before_min_tokens(engine):
    sampling = SamplingParams(max_tokens=60, min_tokens=40, json_schema={"enum": ["Paris", "Rome"]})
    (result,) = engine.generate([Request("Paris?", sampling=sampling)])
    assert result.finish_reason == "stop"
    assert json.loads(result.text) in ("Paris", "Rome")
    assert len(result.token_ids) < 10, "tokens came that the schema doesn't allow"


def test_what_the_sampling_forbids_is_an_error_and_no_answer(engine):
    vocab = engine.model.tokenizer.get_vocab()
    forbidden = {token: float("-inf") for text, token in vocab.items() if "a" in text}
    sampling = SamplingParams(max_tokens=20, json_schema={"enum": ["a"]}, logit_bias=forbidden)
    (result,) = engine.generate([Request("Paris?", sampling=sampling)])
    assert result.finish_reason == "error"
    assert isinstance(result.error, RequestError)


def test_a_matcher_that_gives_up_is_an_error_and_no_answer(engine, monkeypatch):
    limits = llguidance.LLParserLimits
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **given: limits(**given, step_max_items=3))
    schema = {"type": "object", "properties": {"x": {"anyOf": [{"type": "string"}, {"type": "number"}]}}}
    with pytest.raises(RequestError, match="can't be followed"):  # at its first step here, in general at any
        engine.generate([Request("Paris?", sampling=SamplingParams(max_tokens=60, json_schema=schema))])


class Failing:
    """A matcher whose error comes at its second step."""

    steps = 0

    def compute_bitmask(self) -> bytes:
        self.steps += 1
        return bytes([255]) * 16

    def consume_token(self, token: int) -> bool:
        return True

    def is_error(self) -> bool:
        return self.steps > 1

    def is_stopped(self) -> bool:
        return self.is_error()

    def get_error(self) -> str:
        return "too many expressions<state> of the prompt"


def test_an_error_in_the_middle_is_told_and_is_no_end():
    constraint = _Structured(Failing(), "json_schema")
    constraint.allow(torch.zeros(128))
    constraint.take(5)
    assert not constraint.is_complete
    with pytest.raises(RequestError, match="too many expressions") as told:
        constraint.allow(torch.zeros(128))
    assert "prompt" not in str(told.value)
    assert not constraint.is_complete, "an error looked like a complete answer"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"enum": [f"value {number}" for number in range(10_000)]},
        {"allOf": [{"type": "string", "pattern": f".*{letter}.*{letter}.*"} for letter in "abcdefghij"]},
        {"type": "array", "items": json.loads('{"items": ' * 40 + "{}" + "}" * 40)},
        {"not a": "schema", "type": "nothing"},
        '{"type": "object"',
        "[" * 10_000,
    ],
)
def test_schemas_have_bounds_and_ends(engine, schema):
    with pytest.raises(RequestError, match="json_schema"):
        engine.generate([Request("x", sampling=SamplingParams(json_schema=schema))])


def test_a_schema_is_compiled_once_for_all_answers(engine, monkeypatch):
    made = []
    compile = _Grammars._compile
    monkeypatch.setattr(_Grammars, "_compile", lambda self, text: made.append(text) or compile(self, text))
    sampling = SamplingParams(max_tokens=20, n=4, temperature=1.0, seed=0, json_schema={"enum": ["x", "y", "zebra"]})
    (result,) = engine.generate([Request("x", sampling=sampling)])
    assert len(made) == 1
    assert all(json.loads(completion.text) in ("x", "y", "zebra") for completion in result.completions)


def test_a_tokenizer_that_cant_be_read_is_a_typed_error_and_read_once(monkeypatch):
    tokenizer = tiny_tokenizer()
    told = []
    for _ in range(2):
        with pytest.raises(RequestError, match="can't be followed with this model's") as refused:
            make_constraint({"type": "object"}, tokenizer, 128)
        told.append(str(refused.value))
        monkeypatch.setattr("llguidance.hf.from_tokenizer", None)
    assert told[0] == told[1]


def test_a_panic_is_a_typed_error(monkeypatch):
    class Panic(BaseException):
        """As Rust's, which is no Exception."""

    def panic(*given, **options):
        raise Panic("index out of range")

    monkeypatch.setattr("llguidance.hf.from_tokenizer", panic)
    with pytest.raises(RequestError, match="index out of range"):
        make_constraint({"type": "object"}, tiny_tokenizer(), 128)
