"""SmolLM2 calls tools of many schemas: each call parses, is one of the tools', and fits its schema."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from loraplex import EngineConfig, MultiLoraModel
from tests.server.tiny_server import running, settings
from tests.server.tool_cases import tool_case

pytestmark = pytest.mark.needs("llguidance")
MAX_TOKENS = 300


def calls_of(client, case, choice):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": case.question}],
        tools=case.tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls", answer
    assert choice.message.content is None
    return choice.message.tool_calls


def check_cases(model, seeds):
    def check(seed):
        case = tool_case(seed)
        named = case.tools[-1]["function"]["name"]
        choice = "required" if seed % 3 else {"type": "function", "function": {"name": named}}
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        (call,) = calls_of(client, case, choice)
        assert choice == "required" or call.function.name == named
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])

    config = dataclasses.replace(settings(), engine=EngineConfig(cache_bytes=2**28, max_running=16))
    with running(model, config) as server, ThreadPoolExecutor(16) as pool:
        client = server.client().with_options(timeout=1500)
        assert len(list(pool.map(check, seeds))) == len(seeds)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_cases(smollm2):
    check_cases(MultiLoraModel.from_pretrained(smollm2), range(100))
