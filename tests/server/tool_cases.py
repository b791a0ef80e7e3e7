"""Cases of calling tools, made by seeds: a question, and one to four functions with schemas of many kinds."""

import random
from dataclasses import dataclass
from typing import Any

_TOPICS = (
    ("weather", "What will the weather be in Paris on Friday?"),
    ("flight", "Book a flight from Rome to Oslo for two people."),
    ("recipe", "Find a recipe with tomatoes that takes less than 30 minutes."),
    ("molecule", "Draw the molecule of caffeine in a small picture."),
    ("meeting", "Set up a meeting with Ada and Grace at noon."),
    ("order", "Order three boxes of green tea."),
    ("translation", "Translate good morning into French."),
    ("sum", "Add 12 and 30."),
)
_VERBS = ("get", "set", "find", "make")
_FIELDS = ("place", "date", "amount", "unit", "name", "options", "tags", "limit", "note", "kind")
_WORDS = ("small", "large", "red", "green", "Paris", "Rome", "metric", "daily", "none")


@dataclass(frozen=True)
class ToolCase:
    """A question and the tools that are offered with it, in OpenAI's form."""

    question: str
    tools: list[dict[str, Any]]


def tool_case(seed: int) -> ToolCase:
    draw = random.Random(seed)
    topic, question = _TOPICS[seed % len(_TOPICS)]
    names = draw.sample(_VERBS, draw.randint(1, len(_VERBS)))
    return ToolCase(question, [_tool(draw, f"{verb}_{topic}") for verb in names])


def _tool(draw: random.Random, name: str) -> dict[str, Any]:
    function = {"name": name, "description": name.replace("_", " ").capitalize() + "."}
    return {"type": "function", "function": function | {"parameters": _object(draw, depth=2)}}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(_FIELDS, draw.randint(1, 3))
    required = [name for name in names if draw.random() < 0.7]
    schema = {"type": "object", "properties": {name: _value(draw, depth) for name in names}, "required": required}
    return schema | ({} if draw.random() < 0.3 and depth == 2 else {"additionalProperties": False})


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _choice, _whole, _number, _switch, _maybe]
    if depth:
        kinds += [_list, lambda draw: _object(draw, depth - 1)]
    return draw.choice(kinds)(draw)


def _text(draw: random.Random) -> dict[str, Any]:
    return {"type": "string", "description": "A text.", "maxLength": draw.choice([8, 12, 16])}


def _choice(draw: random.Random) -> dict[str, Any]:
    return {"type": "string", "enum": draw.sample(_WORDS, draw.randint(2, 4))}


def _whole(draw: random.Random) -> dict[str, Any]:
    return {"type": "integer", "minimum": draw.choice([0, 1, -5]), "maximum": draw.choice([10, 99])}


def _number(draw: random.Random) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "maximum": draw.choice([1, 250])}


def _switch(_: random.Random) -> dict[str, Any]:
    return {"type": "boolean"}


def _maybe(draw: random.Random) -> dict[str, Any]:
    return {"anyOf": [_choice(draw), {"type": "null"}]}


def _list(draw: random.Random) -> dict[str, Any]:
    item = draw.choice([_choice, _whole, _switch])(draw)
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 3}
