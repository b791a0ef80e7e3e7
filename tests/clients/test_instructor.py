"""Instructor, whose answers are models."""

import instructor
import openai
import pytest

from tests.clients.shared import NAME, QUESTION, Weather


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA])
def test_answers_are_models(url, mode):
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0), mode=mode)
    found = client.chat.completions.create(
        model=NAME,
        response_model=Weather,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=150,
        max_retries=0,
    )
    assert isinstance(found, Weather)
