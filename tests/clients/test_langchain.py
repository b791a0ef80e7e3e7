"""LangChain's ChatOpenAI."""

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from tests.clients.shared import NAME, QUESTION, Weather, weather


def chat(url, **options):
    return ChatOpenAI(
        base_url=url, api_key="none", model=NAME, temperature=0, max_tokens=60, timeout=600, max_retries=0, **options
    )


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_bound_tools_whole_and_streamed(url, use_responses_api):
    bound = chat(url, use_responses_api=use_responses_api).bind_tools(
        [Weather], tool_choice="Weather", parallel_tool_calls=False
    )
    message = bound.invoke(QUESTION)
    (call,) = message.tool_calls
    assert call["name"] == "Weather"
    gathered = None
    for chunk in bound.stream(QUESTION):
        gathered = chunk if gathered is None else gathered + chunk
    assert [(call["name"], call["args"]) for call in gathered.tool_calls] == [(call["name"], call["args"])]
    given = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    answer = chat(url, use_responses_api=use_responses_api).invoke(
        [HumanMessage(QUESTION), message, given], max_tokens=16
    )
    assert answer.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_of_a_model(url, method):
    found = chat(url).with_structured_output(Weather, method=method).invoke(QUESTION)
    assert isinstance(found, Weather)


def test_structured_output_in_json_mode(url):
    asked = 'Answer with this JSON object alone: {"city": "Paris"}'
    found = chat(url).with_structured_output(None, method="json_mode").invoke(asked)
    assert isinstance(found, dict)


def test_text_streams(url):
    text = "".join(chunk.text for chunk in chat(url).stream("Say hello.", max_tokens=8))
    assert text == chat(url).invoke("Say hello.", max_tokens=8).text
