"""Answers that follow a JSON schema."""

import json

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling import SamplingParams
from loraplex.errors import RequestError
from tests.parts import require

require("llguidance")
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
