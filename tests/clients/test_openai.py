"""OpenAI's own client."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.shared import NAME, QUESTION, Weather, weather


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)


TOOL = openai.pydantic_function_tool(Weather, name="get_weather")


def test_chat_and_stream_say_the_same(client):
    options = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0,
        "max_tokens": 8,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_tools_until_the_answer(client):
    messages = [{"role": "user", "content": QUESTION}]
    options = {"model": NAME, "tools": [TOOL], "temperature": 0, "max_tokens": 60}
    choice = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **options
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    given = weather(**json.loads(call.function.arguments))
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": given}]
    answer = client.chat.completions.create(
        messages=messages, tool_choice="none", **options | {"max_tokens": 16}
    ).choices[0]
    assert answer.message.content


def test_stream_of_calls_is_gathered_by_the_client(client):
    with client.chat.completions.stream(
        model=NAME,
        messages=[{"role": "user", "content": QUESTION}],
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=60,
    ) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(call.function.parsed_arguments, Weather)


class Verdict(BaseModel):
    answer: Literal["yes", "no"]


def test_parse_gives_models(client):
    parsed = client.chat.completions.parse(
        model=NAME,
        messages=[{"role": "user", "content": "Is water wet?"}],
        response_format=Verdict,
        temperature=0,
        max_tokens=40,
    )
    assert parsed.choices[0].message.parsed.answer in ("yes", "no")


def test_responses(client):
    options = {"model": NAME, "temperature": 0, "instructions": "Be brief."}
    text = client.responses.create(input="Say hello.", max_output_tokens=8, **options)
    assert text.output_text
    events = list(client.responses.create(input="Say hello.", max_output_tokens=8, stream=True, **options))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text.output_text
    parsed = client.responses.parse(input="Is water wet?", text_format=Verdict, max_output_tokens=40, **options)
    assert parsed.output_parsed.answer in ("yes", "no")


def test_responses_with_functions(client):
    tool = {"type": "function", "name": "get_weather", "parameters": TOOL["function"]["parameters"], "strict": True}
    options = {"model": NAME, "temperature": 0, "tools": [tool]}
    items = [{"role": "user", "content": QUESTION}]
    first = client.responses.create(
        input=items, tool_choice="required", parallel_tool_calls=False, max_output_tokens=60, **options
    )
    (call,) = first.output
    items += [
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": weather(**json.loads(call.arguments))},
    ]
    assert client.responses.create(input=items, tool_choice="none", max_output_tokens=16, **options).output_text


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="unknown", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=NAME, input="x", previous_response_id="resp_1")
