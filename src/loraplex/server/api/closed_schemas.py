"""JSON schemas whose objects have no more than their properties, where they don't say that they may have more.

A model that may add properties goes on adding them; what has none of them fits the schema as well.
"""

from collections.abc import Mapping
from typing import Any

# With these, a schema's properties may stand elsewhere: what looks like one more may be theirs.
_ELSEWHERE = ("allOf", "if", "then", "else", "dependentSchemas", "unevaluatedProperties", "not")
_OF_OBJECTS = ("anyOf", "oneOf", "$ref", "$dynamicRef", "patternProperties")


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with closed objects; as it is where it has parts that must all hold."""
    return dict(schema) if _has_elsewhere(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(made.get(key), Mapping):
            made[key] = {name: _closed(value) for name, value in made[key].items()}
    if isinstance(made.get("items"), Mapping):
        made["items"] = _closed(made["items"])
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(made.get(key), list) and "properties" not in made:
            made[key] = [_closed(value) for value in made[key]]
    is_plain = "properties" in made and not any(key in made for key in _OF_OBJECTS)
    return made | {"additionalProperties": False} if is_plain and "additionalProperties" not in made else made


def _has_elsewhere(schema: Any) -> bool:
    level: list[Any] = [schema]
    while level:
        value = level.pop()
        if isinstance(value, Mapping):
            if any(key in value for key in _ELSEWHERE):
                return True
            level += value.values()
        elif isinstance(value, list):
            level += value
    return False
