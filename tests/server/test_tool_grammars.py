"""Grammars of calls: what a form writes by a schema is allowed, what doesn't fit isn't."""

import json

import pytest
import torch

from loraplex.engine.frontend.structured_output import constraint_of
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import RequestError
from loraplex.server.api.tools.definitions import FunctionDefinition
from loraplex.server.api.tools.forms import FORMS
from loraplex.server.api.tools.grammar import CallRules, UnwritableSchemaError, call_grammar
from loraplex.server.api.tools.templates import ToolTemplate
from tests.server.tool_models import ADD, TEMPLATES, WEATHER, tool_tokenizer

pytestmark = pytest.mark.needs("llguidance")
FUNCTIONS = [FunctionDefinition(**tool["function"]) for tool in (WEATHER, ADD)]
GOOD = ("get_weather", {"city": "Rome", "unit": "celsius"})
XML = (
    '<tool_call>\n<function=get_weather>\n<parameter=city>\n"Rome"\n</parameter>\n<parameter=unit>\ncelsius\n'
    "</parameter>\n</function>\n</tool_call>"
)


def tool_constraint(grammar, tokenizer, vocab_size, *, end_tokens):
    return constraint_of(SamplingParams(tool_grammar=grammar), tokenizer, vocab_size, end_tokens=end_tokens)


class Grammar:
    """The grammar of a tokenizer's form, asked about texts."""

    def __init__(self, tokenizer, functions=FUNCTIONS, **rules):
        self.template = ToolTemplate(tokenizer)
        self.form = self.template.form
        options = {"must_call": True, "max_calls": self.form.max_calls} | rules
        grammar = call_grammar(self.form, CallRules(functions=functions, **options), self.template.special_tokens)
        self._tokenizer = tokenizer
        self._matcher = tool_constraint(
            grammar, tokenizer, len(tokenizer), end_tokens=[tokenizer.eos_token_id]
        )._matcher

    def allows(self, text, *, whole=True):
        matcher = self._matcher.deep_copy()
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and (matcher.is_accepting() or not whole)


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_that_fit_are_allowed_and_others_are_not(smollm2, name):
    grammar = Grammar(tool_tokenizer(smollm2, name))
    form = grammar.form
    assert form.name == name.partition("-")[0]

    def written(*calls):
        if form.kind == "json":
            return form.calls(calls)
        return "\n".join([XML if call == GOOD else f"<tool_call>\n<function={call[0]}>\n</function>" for call in calls])

    assert grammar.allows(written(GOOD))
    assert grammar.allows(written(GOOD, GOOD)) == (form.max_calls > 1)
    assert not grammar.allows(written(GOOD)[:-3])
    assert not grammar.allows("Text. " + written(GOOD), whole=False)
    for wrong in (
        ("unknown", {}),
        ("get_weather", {}),
        ("get_weather", {"city": "Oslo"}),
        ("add", {"a": 100, "b": True}),
    ):
        assert not grammar.allows(written(wrong))
    if form.kind == "json":
        assert grammar.allows(form.call("add", {"a": 5, "b": False}).join([form.begin + form.start, form.close]))
        assert not grammar.allows(written(("get_weather", {"city": "Rome", "other": 1})))


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_may_stand_before_strict_calls(smollm2, name):
    grammar = Grammar(tool_tokenizer(smollm2, name), must_call=False)
    form = grammar.form
    call = XML if form.kind == "xml" else form.calls([GOOD])
    for text in ("", "Hello, {you}.\nA line.", call):
        assert grammar.allows(text)
    assert grammar.allows("Let me see." + call)
    if form.begin:  # without a mark, what begins with text is all text
        assert not grammar.allows("Let me see." + call.replace("Rome", "Oslo"), whole=False)
        assert not grammar.allows(form.begin + "text", whole=False)
    assert not grammar.allows(call.replace("Rome", "Oslo"), whole=False)
    assert not grammar.allows(call + " and more", whole=False)


def test_one_call_at_most_where_calls_are_not_parallel(smollm2):
    grammar = Grammar(tool_tokenizer(smollm2), max_calls=1)
    assert grammar.allows(grammar.form.calls([GOOD]))
    assert not grammar.allows(grammar.form.calls([GOOD, GOOD]))


def test_content_of_a_schema_beside_calls(smollm2):
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    grammar = Grammar(tool_tokenizer(smollm2), must_call=False, content_schema=schema)
    assert grammar.allows('{"x": 2}')
    assert grammar.allows(grammar.form.calls([GOOD]))
    assert not grammar.allows("Text")
    assert not grammar.allows('{"x": 3}')


def test_references_lead_into_the_functions_own_schema(smollm2):
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    node |= {"required": ["next"], "additionalProperties": False}
    schema = {"type": "object", "properties": {"list": {"$ref": "#/$defs/node"}}, "required": ["list"]}
    function = FunctionDefinition(name="walk", parameters=schema | {"$defs": {"node": node}})
    for name in ("hermes", "qwen"):
        grammar = Grammar(tool_tokenizer(smollm2, name), [function])
        value = {"next": {"next": None}}
        text = grammar.form.calls([("walk", {"list": value})])
        if grammar.form.kind == "xml":
            start, end = "<tool_call>\n<function=walk>\n<parameter=list>\n", "\n</parameter>\n</function>\n</tool_call>"
            text = f"{start}{json.dumps(value)}{end}"
        assert grammar.allows(text)
        assert not grammar.allows(text.replace("null", "1"))


def test_parameters_that_have_no_place_in_a_form_are_refused():
    for parameters in ({"anyOf": [{}, {}]}, {"properties": {"a>b": {}}}, {"properties": {}, "required": ["a"]}):
        rules = CallRules(functions=[FunctionDefinition(name="f", parameters=parameters)], must_call=True, max_calls=1)
        with pytest.raises(UnwritableSchemaError, match="this model's form of calls"):
            call_grammar(FORMS["qwen"], rules, {})


def test_schemas_that_allow_nothing_or_are_too_large_are_refused(smollm2):
    tokenizer = tool_tokenizer(smollm2)
    loop = FunctionDefinition(name="f", parameters={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})
    with pytest.raises(RequestError, match="grammar of the tools"):
        Grammar(tokenizer, [loop])
    with pytest.raises(RequestError, match="grammar of the tools has 300000 characters"):
        tool_constraint("x" * 300_000, tokenizer, len(tokenizer), end_tokens=[])


def test_an_answer_ends_by_any_of_its_end_tokens_where_the_grammar_may_end(smollm2):
    tokenizer = tool_tokenizer(smollm2)
    (first,), (more,) = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab")
    ends = [tokenizer.eos_token_id, 7]
    grammar = '%llguidance {}\nstart: "a" "b"*\n'
    constraint = tool_constraint(grammar, tokenizer, len(tokenizer), end_tokens=ends)

    def allowed():
        logits = torch.zeros(len(tokenizer))
        constraint.allow(logits)
        return set(logits.isfinite().nonzero().flatten().tolist())

    assert first in allowed()
    assert not allowed() & {*ends, more}
    constraint.take(first)
    assert {*ends, more} <= allowed()
    assert first not in allowed()
    assert not constraint.is_complete
    constraint.take(7)
    assert constraint.is_complete
