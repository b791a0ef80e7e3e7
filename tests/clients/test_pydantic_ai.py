"""Pydantic AI's agents, over both APIs."""

import pytest
from pydantic_ai import Agent, ModelSettings
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.output import NativeOutput
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.shared import NAME, QUESTION, Weather

SETTINGS = ModelSettings(temperature=0, max_tokens=60, parallel_tool_calls=False, timeout=600)


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(request, url):
    return request.param(NAME, provider=OpenAIProvider(base_url=url, api_key="none"))


@pytest.mark.parametrize("output", [Weather, NativeOutput(Weather)], ids=["tool", "native"])
def test_output_is_a_model(model, output):
    result = Agent(model, output_type=output, model_settings=SETTINGS, instructions="Be brief.").run_sync(QUESTION)
    assert isinstance(result.output, Weather)


def test_text(model):
    assert Agent(model).run_sync("Say hello.", model_settings=SETTINGS | {"max_tokens": 12}).output
