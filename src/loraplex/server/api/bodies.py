"""The bodies of requests, as clients send them: unknown fields are errors, and numbers are finite."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from loraplex.server.api.body import Body, NullableBody, one_of
from loraplex.server.api.messages import Message
from loraplex.server.api.refused_fields import NEUTRAL
from loraplex.server.api.tools.definitions import ToolChoice, ToolList

_MAX_TOKEN_ID = 2**31 - 1
_MAX_BIASES = 1024
_MAX_STOPS = 16
_LONGEST_STOP = 1024
_MAX_STEERINGS = 64
_MAX_PROMPTS = 4096  # whatever `max_prompts` allows
_MAX_BAD_WORDS = 256
_MAX_METADATA = 16  # pairs, as OpenAI's
_LONGEST_GRAMMAR = 2**16  # the engine's limits are tighter
_MAX_TEMPLATE_VARIABLES = 32


def is_token_ids(value: Any) -> bool:
    """Whether it is a list of token ids: as pydantic would find, in a tenth of the time, and with one error at most."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= _MAX_TOKEN_ID)


def _token_ids(value: Any) -> list[int]:
    if not is_token_ids(value):
        raise ValueError(f"must be a list of token ids, whole numbers from 0 to {_MAX_TOKEN_ID}")
    ids: list[int] = value
    return ids


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
TokenIds = Annotated[list[int], PlainValidator(_token_ids, json_schema_input_type=list[TokenId])]
StopText = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Indices = Annotated[list[Annotated[int, Field(ge=0, le=100_000)]], Field(min_length=1, max_length=4096)]


TemplateVariables = Annotated[
    dict[Annotated[str, Field(max_length=64)], Any], Field(max_length=_MAX_TEMPLATE_VARIABLES)
]


class StreamOptions(NullableBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: in each chunk, of its answer so far
    include_obfuscation: bool | None = None  # random characters, so that sizes don't tell tokens


class JsonSchema(NullableBody):
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")  # null is none at all: the field is required
    strict: bool | None = None


class ResponseFormat(NullableBody):
    """ "text", "json_object" (any object), or "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Grammar = Annotated[str, Field(min_length=1, max_length=_LONGEST_GRAMMAR)]
Choices = Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=4096)]


class StructuredOutputs(NullableBody):
    """vLLM's: one of json, regex, choice, grammar and json_object."""

    neutral: ClassVar = {
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": NEUTRAL["structural_tag"],
    }

    json_: dict[str, Any] | Grammar | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None


class CaptureAttention(Body):
    """Which attention weights come back; as loraplex.residual.capture.CaptureRequest."""

    layers: Indices | None = None
    heads: Indices | None = None
    queries: one_of(Literal["all", "generated"] | Count, '"all", "generated" or a whole number from 1 on') = "all"  # type: ignore[valid-type]
    reduce: Literal["mean"] | None = None
    dtype: Literal["float16", "float32"] = "float16"
    encoding: Literal["base64", "list"] = "base64"


class Steer(Body):
    """Multiply the attention to tokens [start, end) of the prompt, or to every place of a text in it, by strength.

    Or let them get at least a share of it.
    """

    start: int | None = Field(None, ge=0, le=2**31 - 1)
    end: int | None = Field(None, ge=1, le=2**31 - 1)
    text: str | None = Field(None, min_length=1, max_length=65_536)
    strength: float | None = Field(None, ge=0, le=1e6)
    share: float | None = Field(None, gt=0, lt=1)
    layers: Indices | None = None
    heads: Indices | None = None


class GenerationBody(NullableBody):
    """Sampling options, streaming, and the extensions."""

    neutral: ClassVar = dict(NEUTRAL)

    model: str = Field(min_length=1, max_length=8192)
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=_MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Count | None = None
    stop: one_of(  # type: ignore[valid-type]
        StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None,
        f"a text or up to {_MAX_STOPS} texts, each of 1 to {_LONGEST_STOP} characters",
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MAX_BIASES)] | None = None
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=_MAX_METADATA
    )
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,128}$")
    session_id: str | None = Field(None, max_length=1024)
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Grammar | None = None
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=_MAX_BAD_WORDS)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    truncation_side: Literal["left", "right"] | None = None
    user: str | None = Field(None, max_length=1024)
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=1024)
    cache_salt: str | None = Field(None, max_length=1024)
    priority: int | None = Field(None, ge=-1000, le=1000)
    return_scalings: bool | None = None
    capture_attention: CaptureAttention | None = None
    steer: Annotated[list[Steer], Field(max_length=_MAX_STEERINGS)] | None = None
    residual_layers: Annotated[dict[Annotated[str, Field(max_length=128)], Indices], Field(max_length=64)] | None = None


class ChatBody(GenerationBody):
    neutral: ClassVar = GenerationBody.neutral | {
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "echo": (False,),
        "best_of": (1,),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    tools: ToolList | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None


def prompt_value(value: Any) -> str | list[Any]:
    """Checked here, as pydantic would try each of the four types on all of it."""
    is_texts = isinstance(value, list) and set(map(type, value)) <= {str}
    if isinstance(value, str) or is_texts or is_token_ids(value):
        return value
    is_lists = isinstance(value, list) and len(value) <= _MAX_PROMPTS and all(map(is_token_ids, value))
    if not is_lists:
        raise ValueError(
            "must be a text, a list of texts, a list of token ids, or a list of such lists, of which there are "
            f"{_MAX_PROMPTS} at most"
        )
    return value


class CompletionBody(GenerationBody):
    prompt: Annotated[
        str | list[Any],
        PlainValidator(prompt_value, json_schema_input_type=str | list[TokenId] | list[str] | list[list[TokenId]]),
    ]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Count | None = None
