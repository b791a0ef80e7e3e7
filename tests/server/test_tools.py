"""Tools of /v1/chat/completions over HTTP: choices, streams, histories, errors; a random model led by grammars."""

import copy
import dataclasses
import json

import jsonschema
import openai
import pytest

from loraplex.errors import ConfigError
from loraplex.server.api.messages import Message, as_turns
from loraplex.server.api.tools.templates import ToolTemplate
from loraplex.server.settings import ModelSettings
from tests.server.tiny_server import running, settings
from tests.server.tool_models import ADD, ENGINE, TEMPLATES, WEATHER, function, tool_model, tool_tokenizer

pytestmark = pytest.mark.needs("llguidance")
TOOLS = [WEATHER, ADD]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]
ADD_CALL = {"name": "add", "arguments": '{"a": 1, "b": true}'}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": ADD_CALL}],
}
GIVEN = {"role": "tool", "tool_call_id": "call_1", "content": "2"}
HISTORY = [*QUESTION, CALLED, GIVEN, {"role": "user", "content": "And in Paris?"}]
OPTIONS = {"model": "tiny", "temperature": 0, "max_tokens": 150}


@pytest.fixture(scope="module")
def server(smollm2):
    with running(tool_model(tool_tokenizer(smollm2)), dataclasses.replace(settings(), engine=ENGINE)) as server:
        yield server


@pytest.fixture(scope="module", params=TEMPLATES)
def of_form(request, smollm2):
    """A server for each form of calls, and its tokenizer."""
    tokenizer = tool_tokenizer(smollm2, request.param)
    with running(tool_model(tokenizer), dataclasses.replace(settings(), engine=ENGINE)) as server:
        yield server, tokenizer


def ask(server, messages=QUESTION, tools=TOOLS, **options):
    return server.client().chat.completions.create(**OPTIONS | {"messages": messages, "tools": tools} | options)


def check_calls(message):
    assert message.tool_calls
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    for call in message.tool_calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [(call.function.name, call.function.arguments) for call in message.tool_calls]


def gathered(stream):
    """The message of a stream, and why it ended; checks what each chunk may hold."""
    content, calls, reason, roles = "", {}, None, []
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        roles.append(choice.delta.role)
        for piece in choice.delta.tool_calls or ():
            if piece.index not in calls:
                assert piece.index == len(calls)
                assert piece.id
                assert piece.type == "function"
                calls[piece.index] = [piece.function.name, ""]
            else:
                assert (piece.id, piece.type, piece.function.name) == (None, None, None)
            calls[piece.index][1] += piece.function.arguments
        assert reason is None, "nothing follows the end"
        reason = choice.finish_reason
    assert roles[0] == "assistant"
    assert set(roles[1:]) <= {None}
    return content, [tuple(call) for call in calls.values()], reason


def test_required_calls_fit_in_each_form_whole_and_streamed(of_form):
    server, _ = of_form
    answer = ask(server, tool_choice="required").choices[0]
    calls = check_calls(answer.message)
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert gathered(ask(server, tool_choice="required", stream=True)) == ("", calls, "tool_calls")


def test_a_named_function_is_called_once(of_form):
    server, _ = of_form
    answer = ask(server, tool_choice={"type": "function", "function": {"name": "add"}}).choices[0]
    ((name, _),) = check_calls(answer.message)
    assert (name, answer.finish_reason) == ("add", "tool_calls")


def test_content_before_strict_calls_and_its_stream_are_the_same(of_form):
    server, _ = of_form
    strict = [{**tool, "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    answer = ask(server, tools=strict, temperature=1, seed=3, max_tokens=40).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()]
    streamed = gathered(ask(server, tools=strict, temperature=1, seed=3, max_tokens=40, stream=True))
    assert streamed == (answer.message.content or "", calls, answer.finish_reason)


def test_template_gets_tools_and_histories_as_transformers_would(of_form):
    server, tokenizer = of_form
    body = {"messages": HISTORY, "tools": TOOLS}
    told = server.http().post("/tokenize", json=body).json()["tokens"]
    turns = as_turns([Message(**message) for message in HISTORY])
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": True}
    assert turns[2]["name"] == "add"
    text = tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert told == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "get_weather" in text


def test_special_tokens_of_a_form_are_real_in_prompts_and_answers(smollm2):
    tokenizer = tool_tokenizer(smollm2, "mistral")
    with running(tool_model(tokenizer), dataclasses.replace(settings(), engine=ENGINE)) as server:
        mark = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
        http = server.http()
        ids = http.post("/tokenize", json={"messages": HISTORY, "tools": TOOLS}).json()["tokens"]
        assert ids.count(mark) == 1
        spelt = [*QUESTION, {"role": "user", "content": "[TOOL_CALLS]"}]
        assert mark not in http.post("/tokenize", json={"messages": spelt, "tools": TOOLS}).json()["tokens"]
        answer = ask(server, tool_choice="required", logprobs=True).choices[0]
        assert answer.logprobs.content[0].token == "[TOOL_CALLS]"
        assert all(len(call.id) == 9 and call.id.isalnum() for call in answer.message.tool_calls)


def test_template_without_tools_gets_them_in_the_systems_turn(server, smollm2):
    tokenizer = tool_tokenizer(smollm2)
    body = {"messages": [{"role": "system", "content": "Be brief."}, *HISTORY], "tools": TOOLS}
    ids = server.http().post("/tokenize", json=body).json()["tokens"]
    system, user, assistant, given, last, end = tokenizer.decode(ids).split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\nYou are a function calling AI model.")
    assert json.dumps(WEATHER) in system
    assert "<tool_call>[\n" in system
    assert (
        assistant
        == f'assistant\n<tool_call>[{{"name": "add", "arguments": {ADD_CALL["arguments"]}}}]</tool_call><|im_end|>\n'
    )
    assert given == "user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    assert (user, last) == tuple(f"user\n{HISTORY[place]['content']}<|im_end|>\n" for place in (0, 3))
    assert end == "assistant\n"


IMAGE = [{"type": "text", "text": "What is it?"}, {"type": "image"}]


@pytest.mark.parametrize("takes_system", [True, False])
def test_a_template_without_tools_keeps_images_where_they_stand(smollm2, takes_system):
    tokenizer = copy.copy(tool_tokenizer(smollm2))
    if not takes_system:
        tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    calls = [CALLED["tool_calls"][0]["function"] | {"arguments": {"a": 1, "b": True}}]
    turns = [
        {"role": "user", "content": IMAGE},
        {"role": "assistant", "content": IMAGE, "tool_calls": [{"function": calls[0]}]},
        {"role": "tool", "content": IMAGE, "name": "add"},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    written, _ = ToolTemplate(tokenizer).prepared(turns, [WEATHER])
    first, assistant, given = written[-3:]
    assert [turn["role"] for turn in written] == ["system"] * takes_system + ["user", "assistant", "user"]
    assert first["content"][-2:] == IMAGE
    assert json.dumps(WEATHER) in (written[0]["content"] if takes_system else first["content"][0]["text"])
    assert assistant["content"][:2] == IMAGE
    assert "<tool_call>" in "".join(part.get("text", "") for part in assistant["content"])
    assert given["content"][1:3] == IMAGE
    texts = "".join(part.get("text", "<image>") for part in given["content"])
    assert texts == ("<tool_response>\nWhat is it?<image>\n</tool_response>\n<tool_response>\n2\n</tool_response>")


def test_no_tools_are_offered_with_none(server):
    none = server.http().post("/tokenize", json={"messages": QUESTION}).json()["count"]
    answer = ask(server, tool_choice="none", max_tokens=3)
    assert answer.usage.prompt_tokens == none
    assert answer.choices[0].message.tool_calls is None


def test_control_tokens_in_tools_are_text_or_refused(server, smollm2):
    tools = [function("f", {"<|im_end|>": {"type": "integer"}})]
    end = tool_tokenizer(smollm2).convert_tokens_to_ids("<|im_end|>")
    counts = [
        server.http().post("/tokenize", json={"messages": QUESTION, "tools": offered}).json()["tokens"].count(end)
        for offered in (tools, TOOLS)
    ]
    assert counts[0] == counts[1]
    config = dataclasses.replace(settings(), engine=ENGINE)
    with running(tool_model(tool_tokenizer(smollm2, "hermes")), config) as other:
        with pytest.raises(openai.BadRequestError, match="control tokens"):
            ask(other, tools=tools)
        escaped = {"name": "add", "arguments": '{"a": "\\u003c|im_end|>"}'}
        turn = CALLED | {"tool_calls": [CALLED["tool_calls"][0] | {"function": escaped}]}
        with pytest.raises(openai.BadRequestError, match="control tokens"):
            ask(other, [*QUESTION, turn, GIVEN])


def test_reasoning_reaches_the_template(smollm2):
    tokenizer = tool_tokenizer(smollm2, "hermes")
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace(
            "{{ message.content }}", "[{{ message.reasoning_content }}]{{ message.content }}"
        )
        with running(tool_model(tokenizer), dataclasses.replace(settings(), engine=ENGINE)) as server:
            turn = {"role": "assistant", "content": "Yes.", "reasoning_content": "It <|im_end|> rains."}
            ids = server.http().post("/tokenize", json={"messages": [*QUESTION, turn, *QUESTION]}).json()["tokens"]
    finally:
        tokenizer.chat_template = template
    assert "assistant\n[It <|im_end|> rains.]Yes." in tokenizer.decode(ids)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_parts_of_content_are_texts_whatever_caches_they_ask_for(server):
    parts = [
        {"type": "text", "text": "What is ", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "it?"},
    ]
    http = server.http()
    whole = http.post("/tokenize", json={"messages": [{"role": "user", "content": "What is it?"}]}).json()
    assert http.post("/tokenize", json={"messages": [{"role": "user", "content": parts}]}).json() == whole
    tool = WEATHER | {"cache_control": {"type": "ephemeral"}}
    answer = server.client().chat.completions.create(messages=QUESTION, tools=[tool], **OPTIONS | {"max_tokens": 2})
    assert answer.usage.completion_tokens == 2


def test_answers_of_a_schema_may_call_too(server):
    wanted = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
    answer = ask(server, response_format=form).choices[0]
    if answer.message.tool_calls:
        check_calls(answer.message)
    else:
        jsonschema.validate(json.loads(answer.message.content), wanted)
    assert answer.finish_reason in ("stop", "tool_calls")


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_schema_may_be_a_text_beside_tools(server, choice):
    wanted = '{"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}'
    body = {"structured_outputs": {"json": wanted, "disable_any_whitespace": True}}
    message = ask(server, tool_choice=choice, extra_body=body).choices[0].message
    if message.tool_calls:
        check_calls(message)
    else:
        assert choice == "auto"
        assert message.content in ('{"x":1}', '{"x":2}')


@pytest.mark.parametrize("structure", [{"regex": "a+"}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'}])
def test_calls_that_must_fit_and_another_structure_are_a_400_in_the_clients_words(server, structure):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, tool_choice="required", extra_body={"structured_outputs": structure})
    assert refused.value.body["param"] == "tools"
    assert "tool_grammar" not in refused.value.body["message"]
    free = ask(server, max_tokens=3, extra_body={"structured_outputs": structure}).choices[0].message
    assert set(free.content) <= {"a", "b"}


def test_several_answers_have_calls_of_their_own(server):
    answer = ask(server, tool_choice="required", n=3, temperature=1, seed=1)
    assert len(answer.choices) == 3
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)
    for choice in answer.choices:
        check_calls(choice.message)


def test_a_call_that_is_cut_off_ends_with_length(server):
    answer = ask(server, tool_choice="required", max_tokens=14).choices[0]
    assert answer.finish_reason == "length"


DEEP = {"type": "object"}
for _ in range(40):
    DEEP = {"type": "object", "properties": {"x": DEEP}}


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools.1", "Names must differ"),
        ({"tools": [function("f", {}, parameters=DEEP)]}, "tools.0", "nested more than 32 deep"),
        ({"tools": [function("f", {}, parameters={"type": "array"})]}, "tools.0", "of type object"),
        ({"tools": [function(f"f{i}", {}) for i in range(129)]}, "tools", "128"),
        (
            {
                "tools": [function(f"f{i}", {}, description="x" * 60_000) for i in range(3)],
            },
            "tools.2",
            "131072 characters",
        ),
        ({"tools": [function("a b", {})]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tool_choice": "sometimes"}, "tool_choice", '"none", "auto", "required"'),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "get_weather, add"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"messages": [{"role": "tool", "content": "2"}]}, "messages.0", "tool_call_id"),
        ({"messages": [*QUESTION, {"role": "assistant"}]}, "messages.1", "content or tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0", "needs content"),
        ({"messages": [QUESTION[0] | {"tool_calls": CALLED["tool_calls"]}]}, "messages.0", "only an assistant"),
        (
            {"tools": [function("f", {"x": {"type": "string", "pattern": "("}})], "tool_choice": "required"},
            None,
            "tools",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_a_400_that_names_it(server, fields, param, told):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **fields)
    assert refused.value.body["param"] == param
    assert told in refused.value.body["message"]


@pytest.mark.parametrize("arguments", ["{", "[]", '"x"', "5", '{"a":' * 50 + "1" + "}" * 50])
def test_arguments_of_histories_are_objects(server, arguments):
    turn = {
        **CALLED,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}],
    }
    with pytest.raises(openai.BadRequestError, match="arguments of a call of 'add'"):
        ask(server, [*QUESTION, turn, GIVEN | {"tool_call_id": "1"}])


def test_a_form_that_no_parser_knows_is_refused_until_one_is_named(smollm2):
    tokenizer = tool_tokenizer(smollm2, "hermes")
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("<tool_call>", "<do>")
        config = dataclasses.replace(settings(), engine=ENGINE)
        with running(tool_model(tokenizer), config) as server:
            with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
                ask(server)
            assert ask(server, tool_choice="none", max_tokens=2).usage.completion_tokens == 2
        named = dataclasses.replace(config, model=ModelSettings(served_name="tiny", tool_call_parser="hermes"))
        with running(tool_model(tokenizer), named) as server:
            check_calls(ask(server, tool_choice="required").choices[0].message)
    finally:
        tokenizer.chat_template = template


def test_parsers_have_names():
    with pytest.raises(ConfigError, match="'auto', 'hermes', 'llama3_json', 'mistral', 'qwen', 'smollm2'"):
        ModelSettings(tool_call_parser="pythonic")
