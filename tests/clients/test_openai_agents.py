"""OpenAI's Agents SDK, over both APIs: an agent calls its function, and answers with what that gave."""

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

from tests.clients.shared import NAME, QUESTION, weather

set_tracing_disabled(True)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
@pytest.mark.parametrize("stops", ["stop_on_first_tool", "run_llm_again"])
def test_an_agent_calls_its_function(url, kind, stops):
    called = []

    @function_tool
    def get_weather(is_metric: bool) -> str:
        """Get the weather."""
        called.append(is_metric)
        return weather("Paris", "celsius" if is_metric else "fahrenheit")

    client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
    agent = Agent(
        name="Weather",
        instructions="Answer questions about the weather.",
        model=kind(model=NAME, openai_client=client),
        tools=[get_weather],
        tool_use_behavior=stops,
        model_settings=ModelSettings(temperature=0, max_tokens=60, tool_choice="required", parallel_tool_calls=False),
    )
    result = Runner.run_sync(agent, QUESTION, max_turns=4)
    assert called
    assert result.final_output.startswith("Sunny") if stops == "stop_on_first_tool" else result.final_output
