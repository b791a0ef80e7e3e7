"""LlamaIndex's OpenAILike."""

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.shared import NAME, QUESTION, Weather, weather


@pytest.fixture
def llm(url):
    return OpenAILike(
        model=NAME,
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        temperature=0,
        max_tokens=60,
        timeout=600,
        max_retries=0,
    )


def test_chat_and_completion(llm):
    whole = llm.chat([ChatMessage("Say hello.")], max_tokens=8).message.content
    assert "".join(part.delta or "" for part in llm.stream_chat([ChatMessage("Say hello.")], max_tokens=8)) == whole
    assert llm.complete("Say hello.", max_tokens=8).text


def test_tools(llm):
    tool = FunctionTool.from_defaults(fn=weather, name="get_weather", fn_schema=Weather)
    answer = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert tool.call(**call.tool_kwargs).content.startswith("Sunny")
    last = list(llm.stream_chat_with_tools([tool], user_msg=QUESTION, tool_required=True))[-1]
    (streamed,) = llm.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs
    assert llm.predict_and_call([tool], user_msg=QUESTION, tool_required=True).response.startswith("Sunny")
