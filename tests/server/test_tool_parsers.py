"""Calls read from answers' texts, whole and in pieces of any length."""

import json
import random
import time

import pytest

from loraplex.server.api.tools.definitions import FunctionDefinition
from loraplex.server.api.tools.events import CallBegin, ContentPiece, ReadAnswer, read_answer
from loraplex.server.api.tools.forms import FORMS, HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_BARE, MISTRAL_PLAIN, SMOLLM2
from loraplex.server.api.tools.json_scanner import JsonScanner
from loraplex.server.api.tools.parser import make_parser

QWEN = FORMS["qwen"]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
FUNCTIONS = {name: FunctionDefinition(name=name, parameters=PARAMETERS) for name in ("weather", "add")}
HARD = {"city": 'a "} ]</tool_call> \\ \u00e9\n', "n": 3, "list": [{"x": "{["}], "none": None}


def read(form, text):
    """The whole answer, the same in pieces of all lengths."""
    whole = read_answer(make_parser(form, FUNCTIONS), text)
    for length in (1, 2, 3, 5, 7, 11):
        parser = make_parser(form, FUNCTIONS)
        events = [e for start in range(0, len(text), length) for e in parser.feed(text[start : start + length])]
        found = ReadAnswer.of_events([*events, *parser.end()])
        found.is_cut = parser.is_in_call
        assert found == whole, f"in pieces of {length}"
    return whole.content, [(call.name, call.arguments) for call in whole.calls]


@pytest.mark.parametrize("form", [HERMES, SMOLLM2, LLAMA3_JSON, MISTRAL, MISTRAL_PLAIN, MISTRAL_BARE])
def test_calls_are_read_as_their_form_writes_them(form):
    calls = [("weather", HARD), ("add", {}), ("weather", {"city": "Rome"})]
    content, found = read(form, form.calls(calls))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_parameters_with_tags_become_values_of_their_types():
    text = (
        "Let me look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n34\n</parameter>\n<parameter=n>\n5\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>"
    )
    content, calls = read(QWEN, text)
    assert content == "Let me look."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("weather", {"city": "12\n34", "n": 5}),
        ("add", {}),
    ]


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, '<tool_call>\n{"arguments": {"n": 1}, "name": "add"}\n</tool_call>', "", [("add", '{"n": 1}')]),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"n\\": 1}"}</tool_call>', "", [("add", '{"n": 1}')]),
        (HERMES, '<tool_call>\n{"name": "add"}\n</tool_call>\n', "", [("add", "{}")]),
        (HERMES, 'A. \n<tool_call>{"name": "add", "arguments": {}}</tool_call>\n\nB.', "A.\n\nB.", [("add", "{}")]),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"n": 1', "", [("add", '{"n": 1')]),  # cut off
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "abcdefghi"}]', "", [("add", "{}")]),
        (MISTRAL, 'Yes.[TOOL_CALLS]add[ARGS]{"n": 1}', "Yes.", [("add", '{"n": 1}')]),
        (LLAMA3_JSON, '<|python_tag|>{"name": "add", "parameters": {}}', "", [("add", "{}")]),
        (LLAMA3_JSON, '\n {"name": "add", "arguments": {}}', "", [("add", "{}")]),
    ],
)
def test_variants_that_models_write(form, text, content, calls):
    assert read(form, text) == (content, calls)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, " No call at all. \n"),
        (HERMES, "It is written as <tool_call>, you see."),
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": 5}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "ad'),
        (HERMES, "<tool_ca"),
        (SMOLLM2, "<tool_call>[]</tool_call>"),
        (LLAMA3_JSON, '{"answer": 5}'),
        (LLAMA3_JSON, 'See {"name": "add", "parameters": {}}'),
        (LLAMA3_JSON, "<|python"),
        (MISTRAL, "[TOOL_CALLS]no call"),
        (QWEN, "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        (QWEN, "<tool_call>\nadd\n</tool_call>"),
    ],
)
def test_what_is_no_call_stays_content(form, text):
    assert read(form, text) == (text, [])


def test_a_call_is_told_before_its_arguments_are_complete():
    parser = make_parser(HERMES, FUNCTIONS)
    assert parser.feed("Wait") == [ContentPiece("Wait")]
    assert parser.feed('. <tool_call>\n{"name": "weather", "argu') == [ContentPiece(".")]
    begin, piece = parser.feed('ments": {"city": "Ro')
    assert begin == CallBegin(0, "weather")
    assert piece.text == '{"city": "Ro'
    assert [event.text for event in parser.feed('me"}}\n</tool')] == ['me"}']
    assert parser.feed("_call>") + parser.end() == []


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_call_is_cut_until_its_arguments_are_complete(form):
    text = "<tool_call>\n<function=add>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"
    text = form.calls([("add", {"n": 1})]) if form.kind == "json" else text
    end = "</function>" if form.kind == "xml" else "}"
    place = text.index(end)
    for length, is_cut in ((place - 1, True), (place + len(end), False), (len(text), False)):
        answer = read_answer(make_parser(form, FUNCTIONS), text[:length])
        assert (len(answer.calls), answer.is_cut) == (1, is_cut)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_texts_of_any_kind_are_read_the_same_in_any_pieces(form):
    draw = random.Random(0)
    parts = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<function=add>",
        "</function>",
        '"',
        "\\",
        "{",
        "}",
        "[",
        "]",
    ]
    parts += [
        '{"name": "add", "arguments": ',
        '"parameters": {}',
        ", ",
        "; ",
        "\n",
        "text",
        "<parameter=n>",
        "</parameter>",
    ]
    for _ in range(300):
        read(form, "".join(draw.choices(parts, k=draw.randrange(12))))


@pytest.mark.parametrize("form", [*FORMS.values(), MISTRAL_PLAIN], ids=lambda form: form.name + form.kind)
@pytest.mark.parametrize("head", ["", "a", "a[ARGS]", "{", '{"name"', "[", "<function=add>", '{"name": "add",'])
def test_blanks_without_end_take_no_longer_than_their_length(form, head):
    """What a model writes is the client's wish: it may ask for thousands of blanks, token by token."""
    parser = make_parser(form, FUNCTIONS)
    began = time.process_time()
    parser.feed(form.begin + " " * 2000 + head)
    for _ in range(2000):
        parser.feed(" ")
    parser.feed("\u00e9")
    parser.end()
    assert time.process_time() - began < 5


def test_scanner_finds_the_end_of_values():
    draw = random.Random(0)
    for _ in range(200):
        text = json.dumps({"".join(draw.choices('ab"\\{}[]', k=5)): [draw.choice([1, "]}", {"x": '\\"'}])]})
        scanner, fed, stop = JsonScanner(), 0, None
        while stop is None:
            piece = (text + "} more")[fed : fed + draw.randrange(1, 5)]
            stop = scanner.scan(piece)
            fed += len(piece) if stop is None else stop
        assert fed == len(text)
