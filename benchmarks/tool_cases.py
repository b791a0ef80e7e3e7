"""A hundred cases of calling tools in the categories of BFCL, over ten functions, with the calls that are right.

After the Berkeley Function Calling Leaderboard (gorilla.cs.berkeley.edu): simple (one function is offered), multiple
(one of three), parallel (two calls of one function), and here forced (tool_choice names it). Made by templates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo")
UNITS = ("celsius", "fahrenheit")
CURRENCIES = ("USD", "EUR", "JPY", "GBP")
LANGUAGES = ("French", "German", "Spanish", "Italian")


def _function(name: str, description: str, properties: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_CITY = {"type": "string", "enum": [*CITIES]}
_WHOLE = {"type": "integer", "minimum": 0, "maximum": 1000}
_TEXT = {"type": "string", "maxLength": 40}
FUNCTIONS = {
    tool["function"]["name"]: tool
    for tool in (
        _function(
            "get_weather",
            "Get the weather of a city.",
            {"city": _CITY, "unit": {"type": "string", "enum": [*UNITS]}},
            ("city",),
        ),
        _function("add", "Add two whole numbers.", {"a": _WHOLE, "b": _WHOLE}, ("a", "b")),
        _function(
            "convert_currency",
            "Convert an amount of money.",
            {
                "amount": {"type": "number", "minimum": 0, "maximum": 100000},
                "source": {"type": "string", "enum": [*CURRENCIES]},
                "target": {"type": "string", "enum": [*CURRENCIES]},
            },
            ("amount", "source", "target"),
        ),
        _function(
            "translate", "Translate a text.", {"text": _TEXT, "language": {"enum": [*LANGUAGES]}}, ("text", "language")
        ),
        _function(
            "set_timer",
            "Set a timer.",
            {"minutes": _WHOLE, "label": {"anyOf": [_TEXT, {"type": "null"}]}},
            ("minutes",),
        ),
        _function(
            "book_flight",
            "Book a flight.",
            {"origin": _CITY, "destination": _CITY, "passengers": {"type": "integer", "minimum": 1, "maximum": 9}},
            ("origin", "destination", "passengers"),
        ),
        _function(
            "make_list",
            "Make a shopping list.",
            {"items": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 4}},
            ("items",),
        ),
        _function(
            "switch_light", "Switch a light on or off.", {"room": _TEXT, "on": {"type": "boolean"}}, ("room", "on")
        ),
        _function(
            "molecule_mass",
            "Compute the mass of a molecule.",
            {"formula": {"type": "string", "pattern": "^([A-Z][a-z]?[0-9]{0,2}){1,6}$"}},
            ("formula",),
        ),
        _function(
            "search",
            "Search documents.",
            {
                "query": _TEXT,
                "filter": {
                    "type": "object",
                    "properties": {
                        "year": {"type": "integer", "minimum": 1900, "maximum": 2030},
                        "open": {"type": "boolean"},
                    },
                    "required": ["year"],
                    "additionalProperties": False,
                },
            },
            ("query", "filter"),
        ),
    )
}
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ToolCase:
    """A question, what is offered with it, and the calls that are right."""

    category: str
    question: str
    tools: list[dict[str, Any]]
    calls: tuple[Call, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of the request


def _asked(number: int) -> tuple[str, Call]:
    """A question that one call answers."""
    city, other = CITIES[number % 5], CITIES[(number + 2) % 5]
    count, language = 2 + number % 7, LANGUAGES[number % 4]
    unit, money = UNITS[number % 2], CURRENCIES[number % 4]
    target = CURRENCIES[(number + 1) % 4]
    room, is_on = ("kitchen", "bedroom", "garage")[number % 3], number % 2 == 0
    formula, thing = ("H2O", "CO2", "CH4", "NaCl")[number % 4], ("water", "thank you", "good night")[number % 3]
    asked: tuple[tuple[str, Call], ...] = (
        (f"What is the weather in {city}, in {unit}?", ("get_weather", {"city": city, "unit": unit})),
        (f"Add {count} and {10 * count}.", ("add", {"a": count, "b": 10 * count})),
        (
            f"How much is {50 * count} {money} in {target}?",
            ("convert_currency", {"amount": 50 * count, "source": money, "target": target}),
        ),
        (f"Translate '{thing}' into {language}.", ("translate", {"text": thing, "language": language})),
        (f"Set a timer of {count} minutes called tea.", ("set_timer", {"minutes": count, "label": "tea"})),
        (
            f"Book a flight from {city} to {other} for {count} people.",
            ("book_flight", {"origin": city, "destination": other, "passengers": count}),
        ),
        ("Make a shopping list of milk and bread.", ("make_list", {"items": ["milk", "bread"]})),
        (f"Switch the light in the {room} {'on' if is_on else 'off'}.", ("switch_light", {"room": room, "on": is_on})),
        (f"What is the mass of {formula}?", ("molecule_mass", {"formula": formula})),
        (
            f"Search for papers about {city} from {2000 + count}, open access only.",
            ("search", {"query": city, "filter": {"year": 2000 + count, "open": True}}),
        ),
    )
    return asked[number % len(asked)]


def tool_cases() -> Iterator[ToolCase]:
    """All hundred: 40 simple, 30 multiple, 20 parallel, 10 forced."""
    names = [*FUNCTIONS]
    for number in range(40):
        question, call = _asked(number)
        yield ToolCase(
            category="simple", question=question, tools=[FUNCTIONS[call[0]]], calls=(call,), options=_REQUIRED
        )
    for number in range(30):
        question, call = _asked(number)
        place = names.index(call[0])
        offered = sorted({call[0], names[(place + 3) % 10], names[(place + 7) % 10]})
        yield ToolCase(
            category="multiple",
            question=question,
            tools=[FUNCTIONS[name] for name in offered],
            calls=(call,),
            options=_REQUIRED,
        )
    for number in range(20):
        (first, one), (second, other) = _asked(number), _asked(number + 10)
        yield ToolCase(
            category="parallel",
            question=f"{first} {second}",
            tools=[FUNCTIONS[one[0]]],
            calls=(one, other),
            options=_REQUIRED,
        )
    for number in range(10):
        question, call = _asked(number)
        choice = {"type": "function", "function": {"name": call[0]}}
        tools = [FUNCTIONS[call[0]], FUNCTIONS[names[(number + 5) % 10]]]
        yield ToolCase(
            category="forced", question=question, tools=tools, calls=(call,), options={"tool_choice": choice}
        )


_REQUIRED = {"tool_choice": "required"}
