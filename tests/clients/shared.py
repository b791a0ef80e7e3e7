"""What the clients ask, and the function that they offer."""

from typing import Literal

from pydantic import BaseModel, Field

NAME = "smollm2-135m"
QUESTION = "What is the weather in Paris, in celsius?"


class Weather(BaseModel):
    """Get the weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"] = Field(description="The city.")
    unit: Literal["celsius", "fahrenheit"] = Field(description="The unit.")


def weather(city: str, unit: str) -> str:
    """What the function gives."""
    assert city in ("Paris", "Rome", "Oslo")
    assert unit in ("celsius", "fahrenheit")
    return f"Sunny, 20 degrees {unit}, in {city}."
