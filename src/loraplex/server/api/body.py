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
            if name not in cls.ignored and not _is_among(value, cls.neutral.get(name, ()))
        }


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
