"""What a body's answers must follow, as sampling parameters: OpenAI's response_format and vLLM's two forms."""

from typing import Any

from loraplex.errors import RequestError
from loraplex.json_files import parse_json
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import GenerationBody, ResponseFormat, StructuredOutputs
from loraplex.server.api.closed_schemas import closed
from loraplex.server.api.tools.definitions import check_depth


def structure_of(body: GenerationBody) -> dict[str, Any]:
    """At most one of json_schema, regex, choice and grammar. Raises ApiError where several are asked for."""
    found = [
        *_of_response_format(body.response_format),
        *_of_structured_outputs(body.structured_outputs),
        *_given("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar),
    ]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ApiError(BAD_REQUEST, f"{names} can't all hold for one answer. Give one of them.", param=found[1][0])
    structure = dict(found[0][1]) if found else {}
    if body.structured_outputs is not None and body.structured_outputs.disable_any_whitespace:
        structure["json_whitespace"] = False
    return structure


Found = tuple[str, dict[str, Any]]  # the field that asks for it, and the sampling parameter


def _of_response_format(wanted: ResponseFormat | None) -> list[Found]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [("response_format", {"json_schema": {"type": "object"}})]
    if wanted.json_schema is None:
        message = 'response_format of type "json_schema" needs json_schema: {"schema": ...}.'
        raise ApiError(BAD_REQUEST, message, param="response_format.json_schema")
    return [("response_format", {"json_schema": _closed_schema("response_format", wanted.json_schema.schema_)})]


def _of_structured_outputs(wanted: StructuredOutputs | None) -> list[Found]:
    if wanted is None:
        return []
    found = _given("structured_outputs.", wanted.json_, wanted.regex, wanted.choice, wanted.grammar)
    if wanted.json_object:
        found.append(("structured_outputs.json_object", {"json_schema": {"type": "object"}}))
    if not found:
        message = "structured_outputs needs one of json, regex, choice, grammar and json_object."
        raise ApiError(BAD_REQUEST, message, param="structured_outputs")
    return found


def _given(prefix: str, json: Any, regex: str | None, choice: list[str] | None, grammar: str | None) -> list[Found]:
    asked = {
        "json": ("json_schema", None if json is None else _closed_schema(f"{prefix}json", json)),
        "regex": ("regex", regex),
        "choice": ("choice", None if choice is None else tuple(choice)),
        "grammar": ("grammar", grammar),
    }
    return [(prefix + name, {option: value}) for name, (option, value) in asked.items() if value is not None]


def _closed_schema(param: str, given: dict[str, Any] | str) -> dict[str, Any]:
    """A schema, or its text. Raises ApiError for what is none, or nested too deep to be looked at."""
    try:
        schema = parse_json(given) if isinstance(given, str) else given
        if not isinstance(schema, dict):
            raise ValueError(f"it is {str(schema)[:50]!r}, no object")
        check_depth(schema, param)
    except ValueError as error:
        message = f"{param} is no JSON schema: {error}. Give an object, or its text."
        raise ApiError(BAD_REQUEST, message, param=param, quotes_request=True) from error
    except RequestError as error:
        raise ApiError(BAD_REQUEST, str(error), param=param) from error
    return closed(schema)
