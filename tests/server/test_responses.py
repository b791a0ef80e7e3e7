"""/v1/responses: bodies, items and events, checked against the types of the package openai."""

import dataclasses
import json

import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from loraplex.engine.async_engine import AsyncEngine
from loraplex.errors import EngineError
from loraplex.server.api.messages import Message, as_turns
from loraplex.server.api.responses.bodies import ResponsesBody
from loraplex.server.api.responses.recent_items import RecentItems
from loraplex.server.api.responses.turns import response_messages
from tests.server.tiny_server import running, settings
from tests.server.tool_models import ADD, ENGINE, WEATHER, tool_model, tool_tokenizer

pytestmark = pytest.mark.needs("llguidance")
EVENT = TypeAdapter(ResponseStreamEvent)
TOOLS = [{"type": "function", "strict": True} | tool["function"] for tool in (WEATHER, ADD)]
SCHEMAS = {tool["name"]: tool["parameters"] for tool in TOOLS}
BODY = {"model": "tiny", "input": "What is the weather in Rome?", "max_output_tokens": 12, "temperature": 0}
MUST_CALL = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 150}
SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
HISTORY = [
    {"role": "developer", "content": "Answer in French."},
    {"role": "user", "content": [{"type": "input_text", "text": "Add "}, {"type": "input_text", "text": "them."}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "I add."}]},
    {
        "type": "function_call",
        "call_id": "c1",
        "name": "add",
        "arguments": '{"a": 1}',
        "id": "fc_1",
        "status": "completed",
    },
    {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a": 2}'},
    {"type": "function_call_output", "call_id": "c1", "output": "1"},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "3.", "annotations": [], "logprobs": []}],
    },
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture(scope="module")
def server(smollm2):
    with running(tool_model(tool_tokenizer(smollm2)), dataclasses.replace(settings(), engine=ENGINE)) as server:
        yield server


def events_of(server, **fields):
    """The events of a stream, each of the type that the client knows, and with its number."""
    text = server.http().post("/v1/responses", json=BODY | fields | {"stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(items):
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


def test_text_is_what_the_chat_answers(server):
    client = server.client()
    response = client.responses.create(**BODY)
    messages = [{"role": "user", "content": BODY["input"]}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    told = (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens)
    assert told == (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens)
    raw = server.http().post("/v1/responses", json=BODY | {"metadata": {"a": "b"}, "user": "me"}).json()
    Response.model_validate(raw)
    assert (raw["metadata"], raw["user"], raw["store"]) == ({"a": "b"}, "me", False)


def test_sampling_that_a_request_leaves_open_is_told_as_it_was(server):
    body = {name: value for name, value in BODY.items() if name != "temperature"}
    state = server.server.state
    own, state.sampling_defaults = state.sampling_defaults, {"temperature": 0.5, "top_p": 0.75}
    try:
        told = server.http().post("/v1/responses", json=body).json()
    finally:
        state.sampling_defaults = own
    assert (told["temperature"], told["top_p"]) == (0.5, 0.75)


@pytest.mark.parametrize("fields", [{}, MUST_CALL], ids=["text", "calls"])
def test_obfuscation_hides_the_sizes_of_deltas(server, fields):
    events = events_of(server, stream_options={"include_obfuscation": True}, **fields)
    deltas = [event for event in events if event["type"].endswith(".delta")]
    assert len(deltas) > 1
    assert {(len(event["delta"].encode()) + len(event["obfuscation"])) % 32 for event in deltas} == {0}
    assert not any("obfuscation" in event for event in events if event not in deltas)
    plain = events_of(server, **fields)
    told = ["".join(e["delta"] for e in some if e["type"].endswith(".delta")) for some in (plain, events)]
    assert told[0] == told[1]
    assert not any("obfuscation" in event for event in plain)


def test_events_tell_the_whole_text(server):
    events = events_of(server)
    kinds = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = events[-1]["response"]
    assert "".join(deltas) == events[-4]["text"] == last["output"][0]["content"][0]["text"]
    assert without_ids(last["output"]) == without_ids(server.http().post("/v1/responses", json=BODY).json()["output"])


def test_calls_fit_their_schemas_and_their_events_tell_them(server):
    events = events_of(server, **MUST_CALL)
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.completed"
    assert response["status"] == "completed"
    for place, item in enumerate(response["output"]):
        assert item["type"] == "function_call"
        jsonschema.validate(json.loads(item["arguments"]), SCHEMAS[item["name"]])
        own = [event for event in events if event.get("item_id") == item["id"]]
        assert {event["output_index"] for event in own} == {place}
        assert own[-1]["type"] == "response.function_call_arguments.done"
        assert "".join(event["delta"] for event in own[:-1]) == own[-1]["arguments"] == item["arguments"]
    whole = server.http().post("/v1/responses", json=BODY | MUST_CALL).json()
    Response.model_validate(whole)
    assert without_ids(whole["output"]) == without_ids(response["output"])


def test_the_clients_own_stream_ends_with_the_same_response(server):
    with server.client().responses.stream(**BODY | MUST_CALL) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output[0].parsed_arguments.keys() <= SCHEMAS[final.output[0].name]["properties"].keys()


def test_a_named_function_and_text_of_a_schema(server):
    client = server.client()
    named = client.responses.create(**BODY | MUST_CALL | {"tool_choice": {"type": "function", "name": "add"}})
    assert [item.name for item in named.output] == ["add"]
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(**BODY | {"text": form, "max_output_tokens": 100})
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    assert response.status == "completed"
    assert response.text.format.schema_ == SCHEMA


def test_items_are_the_turns_of_a_chat():
    body = ResponsesBody(model="tiny", input=HISTORY, instructions="Be brief.")
    call = {"type": "function", "function": {"name": "add"}}
    calls = [{**call, "id": f"c{n}", "function": {"name": "add", "arguments": f'{{"a": {n}}}'}} for n in (1, 2)]
    messages = [
        {"role": "system", "content": "Be brief.\n\nAnswer in French."},
        {"role": "user", "content": "Add them."},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "I add."},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "3."},
        {"role": "user", "content": "Thanks."},
    ]
    assert as_turns(response_messages(body, {}.get)) == as_turns([Message(**message) for message in messages])


def test_null_is_no_value(server):
    nulls = dict.fromkeys(
        ("unheard_of", "previous_response_id", "include", "truncation", "reasoning", "stream_options")
    )
    part = {"type": "input_text", "text": BODY["input"], "prompt_cache_breakpoint": None}
    item = {"type": None, "role": "user", "content": [part], "status": None}
    plain = server.http().post("/v1/responses", json=BODY).json()
    told = server.http().post("/v1/responses", json=BODY | nulls | {"input": [item], "text": {"format": None}}).json()
    assert without_ids(told["output"]) == without_ids(plain["output"])
    assert told["usage"]["input_tokens"] == plain["usage"]["input_tokens"]


def test_outputs_are_inputs_of_the_next_request(server):
    client = server.client()
    first = client.responses.create(**BODY | MUST_CALL)
    items = [{"role": "user", "content": BODY["input"]}, *first.output]
    items += [{"type": "function_call_output", "call_id": item.call_id, "output": "5"} for item in first.output]
    again = client.responses.create(**BODY | {"input": items, "tools": TOOLS, "max_output_tokens": 3})
    assert again.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, MUST_CALL], ids=["text", "calls"])
def test_items_of_the_last_answers_may_be_referred_to(server, fields, stream):
    """As the AI SDK does, which takes responses to be kept unless `store` is false."""
    raw = BODY | fields
    first = (
        events_of(server, **fields)[-1]["response"] if stream else server.http().post("/v1/responses", json=raw).json()
    )
    given = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "5"}
        for item in first["output"]
        if "call_id" in item
    ]
    question, last = ({"role": "user", "content": text} for text in (BODY["input"], "And now?"))
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    counts = [
        server.http().post("/v1/responses", json=raw | {"input": [question, *items, *given, last]}).json()["usage"]
        for items in (references, first["output"])
    ]
    assert counts[0]["input_tokens"] == counts[1]["input_tokens"] > first["usage"]["input_tokens"]


def test_items_are_the_owners_and_not_kept_where_that_isnt_wanted(server):
    item = server.http().post("/v1/responses", json=BODY | {"store": False}).json()["output"][0]
    refused = server.http().post("/v1/responses", json=BODY | {"input": [{"type": "item_reference", "id": item["id"]}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input.0")
    kept = RecentItems(max_bytes=100)
    kept.keep("one", [{"id": "a", "text": "x" * 40}])
    assert kept.find("one", "a") == {"id": "a", "text": "x" * 40}
    assert kept.find("other", "a") is None
    kept.keep("one", [{"id": "b", "text": "x" * 40}])
    assert (kept.find("one", "a"), kept.find("one", "b") is None) == (None, False)
    kept.keep("one", [{"id": "c", "text": "x" * 400}])
    assert kept.find("one", "c") is None, "an item above the bound is kept"


def test_a_failure_in_a_stream_is_an_event(server, monkeypatch):
    submit = AsyncEngine.submit

    async def failing(engine, request, collector):
        request_id = await submit(engine, request, collector)
        collector.fail(EngineError("no more memory"))
        return request_id

    monkeypatch.setattr(AsyncEngine, "submit", failing)
    events = events_of(server)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert "no more memory" in events[-2]["message"]
    assert events[-1]["response"]["status"] == "failed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "item_reference", "id": "x"}]}, "input.1"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "x"}]}]},
            "input.0.message.content",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]},
            "input",  # the model takes none
        ),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_it(server, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().responses.create(**BODY, extra_body=fields)
    assert refused.value.body["param"] == param
