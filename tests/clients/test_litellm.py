"""LiteLLM, as a client of a server with OpenAI's API."""

import json

import litellm

from tests.clients.shared import NAME, QUESTION, Weather, weather

litellm.telemetry = False
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather.", "parameters": Weather.model_json_schema()},
}


def test_chat_stream_and_tools(url):
    options = {"model": f"openai/{NAME}", "api_base": url, "api_key": "none", "temperature": 0, "timeout": 600}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]}
    ]
    whole = litellm.completion(messages=messages, max_tokens=8, **options).choices[0].message.content
    chunks = litellm.completion(messages=messages, max_tokens=8, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    choice = litellm.completion(
        messages=messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=60, **options
    ).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    given = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
    answer = litellm.completion(
        messages=[*messages, choice.message.model_dump(), given], tools=[TOOL], max_tokens=8, **options
    )
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_responses(url):
    response = litellm.responses(
        model=f"openai/{NAME}", api_base=url, api_key="none", input="Say hello.", temperature=0, max_output_tokens=8
    )
    assert response.output[0].content[0].text
