"""The JSON bodies of the Tinker API, as its SDK sends them."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, Field

from loraplex.errors import RequestError
from loraplex.server.api.body import NullableBody
from loraplex.training.service.settings import AdamParams

Id = Annotated[str, Field(min_length=1, max_length=200)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
PathText = Annotated[str, Field(min_length=1, max_length=400)]
Seq = Annotated[int, Field(ge=0, le=2**31 - 1)]
MAX_METADATA_BYTES = 2**14  # of all keys and values, as JSON


def _check_size(metadata: dict[str, Any]) -> dict[str, Any]:
    size = len(orjson.dumps(metadata))
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"user_metadata has {size} bytes of JSON; {MAX_METADATA_BYTES} are possible")
    return metadata


Metadata = Annotated[dict[str, Any], Field(max_length=64), AfterValidator(_check_size)]
TextMetadata = Annotated[dict[str, str], Field(max_length=64), AfterValidator(_check_size)]


class TinkerBody(NullableBody):
    """A body, whose `type` says what the path says too."""

    ignored = frozenset({"type"})


class ClientConfig(TinkerBody):
    sdk_version: str = Field("", max_length=100)


class CreateSession(TinkerBody):
    tags: list[str] = Field(default_factory=list, max_length=64)
    user_metadata: Metadata | None = None
    sdk_version: str = Field("", max_length=100)
    project_id: str | None = Field(None, max_length=200)
    display_name: str | None = Field(None, max_length=400)


class SessionHeartbeat(TinkerBody):
    session_id: Id


class FinishReason(NullableBody):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(NullableBody):
    reason: FinishReason
    detail: str | None = Field(None, max_length=4000)


class LoraSettings(TinkerBody):
    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerChoice(NullableBody):
    """AdamW; other optimizers are refused by name."""

    type: str = Field("adamw", max_length=100)
    version: int | None = None


class CreateModel(TinkerBody):
    session_id: Id
    model_seq_id: Seq
    base_model: Name
    user_metadata: Metadata | None = None
    lora_config: LoraSettings | None = None
    optimizer_config: OptimizerChoice | None = None


class GetInfo(TinkerBody):
    model_id: Id


class AdamBody(NullableBody):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStepBody(TinkerBody):
    model_id: Id
    seq_id: Seq
    adam_params: AdamBody | None = None
    optimizer_params: Metadata | None = None


class SaveWeights(TinkerBody):
    model_id: Id
    seq_id: Seq
    path: Name | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: TextMetadata | None = None


class SaveForSampler(TinkerBody):
    model_id: Id
    seq_id: Seq
    path: Name | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: TextMetadata | None = None


class SaveExternal(TinkerBody):
    model_id: Id
    seq_id: Seq
    path: Name
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = Field(None, max_length=10)


class LoadWeights(TinkerBody):
    """Into a run, or as the first request of a new one (session_id and model_seq_id)."""

    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: Name | None = None
    user_metadata: Metadata | None = None
    path: PathText
    optimizer: bool
    optimizer_config: OptimizerChoice | None = None
    weights_access_token: str | None = Field(None, max_length=4096)


class RetrieveFuture(TinkerBody):
    request_id: Id
    allow_metadata_only: bool = False


class CancelFuture(TinkerBody):
    request_id: Id


class CreateSamplingSession(TinkerBody):
    session_id: Id
    sampling_session_seq_id: Seq
    base_model: Name | None = None
    model_path: PathText | None = None


class JoinSamplingSession(TinkerBody):
    sampling_session_id: Id


class TextChunk(NullableBody):
    """Others than text are refused by their type."""

    type: str = Field("encoded_text", max_length=100)
    tokens: list[int] = Field(default_factory=list)


class Prompt(NullableBody):
    chunks: list[TextChunk] = Field(max_length=10_000)


class SampleParams(NullableBody):
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(-1, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)


class SampleBody(TinkerBody):
    num_samples: int = Field(1, ge=1)
    prompt: Prompt
    sampling_params: SampleParams
    base_model: Name | None = None
    model_path: PathText | None = None
    sampling_session_id: Id | None = None
    seq_id: Annotated[int, Field(ge=0, le=2**62)] | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0)
    topk_sample_logprobs: int = Field(0, ge=0)
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = Field(0, ge=0)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)
    record_stability_info: bool | None = None


class WeightsInfo(TinkerBody):
    tinker_path: PathText


class ChangeTtl(TinkerBody):
    ttl_seconds: int | None = None


def adam_params(body: OptimStepBody) -> AdamParams:
    """Raises RequestError for another optimizer than AdamW."""
    if body.optimizer_params is not None:
        kind = str(body.optimizer_params.get("type"))[:100]
        raise RequestError(f"optimizer_params are of {kind!r}; this server has AdamW alone. Send adam_params.")
    return AdamParams(**(body.adam_params or AdamBody()).model_dump())
