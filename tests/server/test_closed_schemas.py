"""Objects of schemas are closed where that changes nothing but what a model may add."""

import jsonschema
import pytest

from loraplex.server.api.closed_schemas import closed

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}
CLOSED_POINT = POINT | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (POINT, CLOSED_POINT),
        ({"type": "array", "items": POINT}, {"type": "array", "items": CLOSED_POINT}),
        ({"anyOf": [POINT, {"type": "null"}]}, {"anyOf": [CLOSED_POINT, {"type": "null"}]}),
        ({"$ref": "#/$defs/p", "$defs": {"p": POINT}}, {"$ref": "#/$defs/p", "$defs": {"p": CLOSED_POINT}}),
        ({"properties": {"p": POINT}}, {"properties": {"p": CLOSED_POINT}, "additionalProperties": False}),
    ],
)
def test_objects_with_properties_have_no_more(schema, expected):
    assert closed(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        POINT | {"additionalProperties": {"type": "string"}},
        POINT | {"patternProperties": {"^y": {}}},
        POINT | {"anyOf": [{"properties": {"y": {}}, "required": ["y"]}, {"required": ["x"]}]},
        {"allOf": [POINT, {"type": "object", "properties": {"y": {}}, "required": ["y"]}]},
        {"$ref": "#/$defs/p", "$defs": {"p": POINT, "q": {"not": {"required": ["x"]}}}},
    ],
)
def test_others_stay_as_they_are(schema):
    assert closed(schema) == schema


def test_what_fits_a_closed_schema_fits_the_schema():
    schema = {"type": "object", "properties": {"p": POINT, "q": {"oneOf": [POINT, {"type": "string"}]}}}
    for value in ({}, {"p": {}}, {"p": {"x": 1}, "q": "text"}, {"q": {"x": 2}}):
        jsonschema.validate(value, closed(schema))
        jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"p": {"more": 1}}, closed(schema))
