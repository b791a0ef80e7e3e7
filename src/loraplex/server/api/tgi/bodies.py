"""The bodies of /generate and /generate_stream, with TGI's and LoRAX's names."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import Count, Grammar, StopText
from loraplex.server.api.body import NullableBody
from loraplex.server.api.refused_fields import NEUTRAL

_MAX_ADAPTERS = 64


class MergedAdapters(NullableBody):
    """LoRAX's: adapters with weights, here a link."""

    neutral: ClassVar = {name: NEUTRAL[name] for name in ("merge_strategy", "density", "majority_sign_method")}

    ids: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)]
    weights: Annotated[list[float], Field(max_length=_MAX_ADAPTERS)] | None = None


class TgiGrammar(NullableBody):
    type: Literal["json", "regex", "json_object"]
    value: dict[str, Any] | Grammar


class LoraxFormat(NullableBody):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class GenerateParameters(NullableBody):
    """Both servers' names."""

    neutral: ClassVar = {name: NEUTRAL[name] for name in ("adapter_source", "api_token", "typical_p", "watermark")}

    adapter_id: str | None = Field(None, max_length=8192)
    adapters: MergedAdapters | None = None
    merged_adapters: MergedAdapters | None = None
    best_of: Count | None = None
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    max_new_tokens: Count | None = None
    ignore_eos_token: bool | None = None
    stop: Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16)] | None = None
    return_full_text: bool | None = None
    truncate: Count | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = Field(None, ge=1, le=20)
    top_n_tokens: int | None = Field(None, ge=0, le=20)
    apply_chat_template: bool | None = None
    grammar: TgiGrammar | None = None
    response_format: LoraxFormat | None = None


class GenerateBody(NullableBody):
    inputs: str = Field(min_length=1)
    parameters: GenerateParameters | None = None
    stream: bool | None = None


def model_of(parameters: Any, base_name: str = "") -> str:
    """What `model` is in OpenAI's API; the base model's name without adapters. Of a body that may be anything."""
    merged = _field(parameters, "merged_adapters") or _field(parameters, "adapters")
    ids, weights = _field(merged, "ids"), _field(merged, "weights")
    if not isinstance(ids, list) or not ids:
        return str(_field(parameters, "adapter_id") or base_name)
    weights = weights if isinstance(weights, list) and weights else [1.0] * len(ids)
    return "+".join(f"{name}:{weight!r}" for name, weight in zip(ids, weights, strict=False))


def _field(holder: Any, name: str) -> Any:
    """Of a JSON object, or of what was made of one."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def check_parameters(parameters: GenerateParameters, *, stream: bool) -> None:
    """Raise ApiError for parameters that contradict one another."""
    adapters = [parameters.adapter_id, parameters.adapters, parameters.merged_adapters]
    if sum(bool(given) for given in adapters) > 1:
        raise ApiError(BAD_REQUEST, "give one of adapter_id, adapters and merged_adapters.", param="adapter_id")
    for merged in (parameters.adapters, parameters.merged_adapters):
        if merged is not None and merged.weights is not None and len(merged.weights) != len(merged.ids):
            message = f"there are {len(merged.ids)} ids, but {len(merged.weights)} weights."
            raise ApiError(BAD_REQUEST, message, param="merged_adapters.weights")
    if (stream or parameters.apply_chat_template) and (parameters.best_of or 1) > 1:
        message = "best_of above 1 can't be streamed, and doesn't go with apply_chat_template."
        raise ApiError(BAD_REQUEST, message, param="best_of")
