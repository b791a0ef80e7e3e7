"""The body of /v1/responses, without what needs a server that keeps responses."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from loraplex.server.api.bodies import Count, JsonSchema, ResponseFormat
from loraplex.server.api.body import Body, NullableBody, one_of
from loraplex.server.api.tools.definitions import MAX_TOOLS, FunctionDefinition, FunctionName

_MAX_ITEMS = 4096
_MAX_PARTS = 1024
_OF_OUTPUTS = frozenset({"id", "status"})  # that items have which a server gave


class TextPart(NullableBody):
    """A text that a client wrote, or that an answer had."""

    ignored: ClassVar = frozenset({"annotations", "logprobs", "cache_control"})

    type: Literal["input_text", "output_text", "text"]
    text: str


class ImagePart(NullableBody):
    """A picture in a user's turn, as a data URI."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "high"] | None = None

    def as_chat_part(self) -> dict[str, Any]:
        """The same of /v1/chat/completions."""
        return {"type": "image_url", "image_url": {"url": self.image_url, "detail": self.detail}}


class RefusalPart(NullableBody):
    type: Literal["refusal"]
    refusal: str


class ReasoningPart(NullableBody):
    type: Literal["reasoning_text", "summary_text"]
    text: str


Part = TextPart | ImagePart | RefusalPart
Parts = Annotated[list[Annotated[Part, Field(discriminator="type")]], Field(max_length=_MAX_PARTS)]
Content = one_of(
    str | Parts, 'a text or parts of type "input_text", "input_image" or "output_text"; other parts are not supported'
)


class MessageItem(NullableBody):
    """A turn."""

    ignored: ClassVar = _OF_OUTPUTS | {"phase"}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content  # type: ignore[valid-type]


class FunctionCallItem(NullableBody):
    """A call that an answer made."""

    ignored: ClassVar = _OF_OUTPUTS
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "async": (False,),
    }

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: str


class FunctionOutputItem(NullableBody):
    """What a function gave."""

    ignored: ClassVar = _OF_OUTPUTS

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: Content  # type: ignore[valid-type]


class ReasoningItem(NullableBody):
    """What an answer's reasoning was; the next turn of the assistant has it as `reasoning_content`."""

    ignored: ClassVar = _OF_OUTPUTS | {"encrypted_content"}

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(max_length=_MAX_PARTS)] = Field(default_factory=list)
    content: Annotated[list[ReasoningPart], Field(max_length=_MAX_PARTS)] | None = None


WholeItem = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem


class ItemReference(NullableBody):
    """An item of an earlier answer, by its id."""

    type: Literal["item_reference"]
    id: str = Field(min_length=1, max_length=256)


def _kind(item: Any) -> Any:
    """A message may leave its type out."""
    return (item.get("type") or "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]


def _as_items(given: Any) -> Any:
    """A text alone is a user's turn."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponseTool(FunctionDefinition):
    """A function, which this API has without an object around it."""

    type: Literal["function"]


class ResponseToolChoice(Body):
    type: Literal["function"]
    name: FunctionName


class TextFormat(NullableBody):
    """The form of an answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "TextFormat":
        """Raises ValueError for a schema that is missing."""
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError('type "json_schema" needs a schema')
        return self

    def as_response_format(self) -> ResponseFormat:
        """The same of /v1/chat/completions."""
        schema = None if self.schema_ is None else JsonSchema.model_validate({"schema": self.schema_})
        return ResponseFormat(type=self.type, json_schema=schema)


class TextOptions(NullableBody):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponseStreamOptions(NullableBody):
    include_obfuscation: bool | None = None  # random characters, so that sizes don't tell tokens


class ResponsesBody(NullableBody):
    """A request that has all that it needs with it: this server keeps no responses."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "include": ([], ["reasoning.encrypted_content"]),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "reasoning": ({},),
        "top_logprobs": (0,),
    }

    model: str = Field(min_length=1, max_length=8192)
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=_MAX_ITEMS),
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: one_of(  # type: ignore[valid-type]
        Literal["none", "auto", "required"] | ResponseToolChoice | None,
        '"none", "auto", "required" or {"type": "function", "name": ...}',
    ) = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    text: TextOptions | None = None
    store: bool | None = None  # responses are not kept; without it, later requests may refer to items
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = Field(None, max_length=1024)
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=1024)
    # Not OpenAI's, as in /v1/chat/completions.
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    priority: int | None = Field(None, ge=-1000, le=1000)
    cache_salt: str | None = Field(None, max_length=1024)
