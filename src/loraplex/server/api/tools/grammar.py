"""Grammars of answers that call tools, in llguidance's form of Lark: each call parses and fits its schema."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.server.api.closed_schemas import closed
from loraplex.server.api.tools.definitions import FunctionDefinition
from loraplex.server.api.tools.forms import CallForm

# JSON as templates write it: small models write blanks without an end where they may.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_XML_KEYS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description"}
_LIMITS_OF_TEXTS = ("pattern", "format", "minLength", "maxLength")


@dataclass(frozen=True, kw_only=True)
class CallRules:
    """What an answer may be."""

    functions: Sequence[FunctionDefinition]
    must_call: bool  # else it may be content, too
    max_calls: int
    content_schema: Mapping[str, Any] | None = None  # of content; None: any text
    content_spaces: bool = True  # behind its commas and colons


class UnwritableSchemaError(ValueError):
    """A function's parameters can't be written in a model's form of calls."""


def call_grammar(form: CallForm, rules: CallRules, special_tokens: Mapping[str, int]) -> str:
    """The grammar of an answer. `special_tokens`: those that a tokenizer has, which no text spells.

    Raises UnwritableSchemaError.
    """
    writer = _Writer(form, special_tokens)
    calls = [writer.call(number, function) for number, function in enumerate(rules.functions)]
    more = f" ({writer.text(form.separator)} call){{0,{rules.max_calls - 1}}}" if rules.max_calls > 1 else ""
    rest = " ".join(filter(None, [writer.text(form.start), f"call{more}", writer.text(form.close)]))
    lines = ["%llguidance {}", *writer.start(rules, rest), "call: " + " | ".join(name for name, _ in calls)]
    return "\n".join([*lines, *(f"{name}: {rule}" for name, rule in calls), *writer.rules]) + "\n"


def is_json_coded(schema: Any) -> bool:
    """Whether a parameter of the form with tags is written as JSON, not as the text that it is."""
    if not isinstance(schema, dict) or schema.get("type") != "string":
        return True
    return any(limit in schema for limit in _LIMITS_OF_TEXTS)


class _Writer:
    """Rules of one form."""

    def __init__(self, form: CallForm, special_tokens: Mapping[str, int]) -> None:
        self._form = form
        self._special = special_tokens
        self.rules: list[str] = []

    def start(self, rules: CallRules, rest: str) -> list[str]:
        """The rule for a whole answer. What of it is content ends where calls begin."""
        begin = self.text(self._form.begin)
        if rules.must_call:
            return [f"start: {begin} {rest}"]
        if rules.content_schema is not None:
            return [f"start: content | {begin} {rest}", f"content: %json {_content(rules)}"]
        if not self._form.begin:
            return [f"start: TEXT | {rest}", r"TEXT: /(\s*[^\s{](.|\n)*)?/"]
        lines = [r"TEXT: /(.|\n)*/"]
        if begin.startswith("<["):
            return [f"start: TEXT | TEXT {begin} {rest}", *lines]
        return [f"start: TEXT | begin {rest}", *lines, f"begin[lazy]: TEXT {begin}"]

    def call(self, number: int, function: FunctionDefinition) -> tuple[str, str]:
        """The name and text of the rule for calls of a function."""
        form = self._form
        schema = closed(
            {"type": "object"} | ({"properties": {}} if function.parameters is None else function.parameters)
        )
        if form.kind == "xml":
            arguments = self._xml_arguments(number, schema)
        else:
            arguments = f"arguments_{number}"
            self.rules.append(f"{arguments}: %json {_json(schema)}")
        head = self.text(f"{form.before_name}{function.name}{form.before_arguments}")
        return f"call_{number}", " ".join(filter(None, [head, arguments, self.text(form.after_arguments)]))

    def text(self, text: str) -> str:
        """A text as terminals; special tokens in it are named by their ids."""
        for token, number in self._special.items():
            if token in text:
                before, _, after = text.partition(token)
                return " ".join(filter(None, [self.text(before), f"<[{number}]>", self.text(after)]))
        return json.dumps(text) if text else ""

    def _xml_arguments(self, number: int, schema: Mapping[str, Any]) -> str:
        """All parameters in the schema's order; those that aren't required may be left out."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not set(schema) <= _XML_KEYS or not isinstance(properties, dict) or not set(required) <= set(properties):
            raise UnwritableSchemaError(
                "this model's form of calls has a text for each argument, so the parameters must be an object with "
                f"properties and required alone, not {sorted(set(schema) - _XML_KEYS)}."
            )
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        names = []
        for place, (key, value) in enumerate(properties.items()):
            if not key or any(mark in key for mark in ">\n"):
                raise UnwritableSchemaError(f"this model's form of calls can't have an argument named {key!r}.")
            name = f"argument_{number}_{place}"
            self.rules.append(f"{name}: {self._xml_value(name, value, definitions, json.dumps(f'<parameter={key}>'))}")
            names.append(name if key in required else f"{name}?")
        return " ".join(names)

    def _xml_value(self, name: str, schema: Any, definitions: Mapping[str, Any], begin: str) -> str:
        end = json.dumps("\n</parameter>\n")
        values = schema.get("enum") if isinstance(schema, dict) else None
        if isinstance(schema, dict) and "const" in schema:
            values = [schema["const"]]
        if is_json_coded(schema):
            full = {**schema, **definitions} if isinstance(schema, dict) else schema
            return f'{begin} "\\n" %json {_json(full)} {end}'
        if values is not None:
            return f'{begin} "\\n" ({" | ".join(json.dumps(str(value)) for value in values)}) {end}'
        self.rules.append(f"{name}_text[lazy]: /(.|\\n)*/ {end}")
        return f'{begin} "\\n" {name}_text'


def _json(schema: Any, spacing: Mapping[str, Any] = _SPACING) -> str:
    return json.dumps({**schema, "x-guidance": spacing} if isinstance(schema, Mapping) else schema)


def _content(rules: CallRules) -> str:
    return _json(rules.content_schema, _SPACING if rules.content_spaces else {"whitespace_flexible": False})
