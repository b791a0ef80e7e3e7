"""Calls are read from answers' texts as vLLM's parsers read them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loraplex.server.api.tools.definitions import FunctionDefinition
from loraplex.server.api.tools.events import read_answer
from loraplex.server.api.tools.forms import FORMS
from loraplex.server.api.tools.parser import make_parser

FUNCTIONS = {name: FunctionDefinition(name=name) for name in ("weather", "add")}
CALLS = [("weather", {"city": 'a "} ] \\ é\n', "list": [{"x": "{["}], "none": None}), ("add", {})]
TEXTS = {
    "hermes": [
        FORMS["hermes"].calls(CALLS),
        FORMS["hermes"].calls(CALLS[1:]),
        "Let me see." + FORMS["hermes"].calls(CALLS[:1]),
        '<tool_call>{"arguments": {"n": 1}, "name": "add"}</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"n": 1}}',
        "No call, <tool_cal",
        "<tool_call>\nno call\n</tool_call>",
    ],
    "llama3_json": [
        FORMS["llama3_json"].calls(CALLS),
        FORMS["llama3_json"].calls(CALLS[1:]),
        "<|python_tag|>" + FORMS["llama3_json"].calls(CALLS[:1]),
        '{"name": "add", "arguments": {"n": 1}}',
        "No call.",
    ],
}


@pytest.mark.parametrize("form", TEXTS)
def test_calls_are_those_that_vllm_reads(form: str, smollm2: Path) -> None:
    from vllm.tool_parsers import ToolParserManager

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<|python_tag|>"])
    for text in TEXTS[form]:
        expected = ToolParserManager.get_tool_parser(form)(tokenizer).extract_tool_calls(text, None)
        found = read_answer(make_parser(FORMS[form], FUNCTIONS), text)
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in expected.tool_calls]
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls
        assert found.content == (expected.content or "")
