"""The base of all bodies: unknown fields are errors, and numbers are finite."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

_MAX_FIELDS = 128


class Body(BaseModel):
    """A JSON object whose fields all mean something here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # Fields of OpenAI's API that do nothing with these values, and so may be there; other values are refused.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    # Fields of clients that do nothing here whatever their values are.
    ignored: ClassVar[frozenset[str]] = frozenset()
    null_is_absent: ClassVar[bool] = False  # null, of any field, is the same as leaving it out

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MAX_FIELDS:  # each unknown one would be an error of its own
            raise ValueError(f"an object has {len(data)} fields, and no object has more than {_MAX_FIELDS}")
        return {
            name: value
            for name, value in data.items()
            if name not in cls.ignored
            and not (value is None and cls.null_is_absent)
            and not _is_among(value, cls.neutral.get(name, ()))
        }


def _describe_neutral(schema: dict[str, Any], kind: type[Any]) -> None:
    """Let the description tell what `drop_neutral` lets pass."""
    if not kind.null_is_absent:
        return
    schema["additionalProperties"] = {"type": "null"}
    known = {name: {"enum": [*values, None]} for name, values in kind.neutral.items()}
    schema["properties"] = known | schema.get("properties", {})


class NullableBody(Body):
    """A body for which null is the same as leaving a field out, as clients send it for all that they don't use."""

    model_config = ConfigDict(json_schema_extra=_describe_neutral)
    null_is_absent: ClassVar = True


def one_of(kinds: Any, description: str, **constraints: Any) -> Any:
    """A field of several types, whose error is one sentence instead of one for each type."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise ValueError(f"must be {description}") from None

    return Annotated[kinds, Field(**constraints), WrapValidator(check)]


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in values)
