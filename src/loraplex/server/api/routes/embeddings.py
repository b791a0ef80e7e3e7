"""/v1/embeddings and /v1/score: the last hidden states of texts, through a row's adapters, as vectors."""

import base64
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field, PlainValidator
from starlette.responses import Response
from torch import Tensor

from loraplex.engine.request import Pooling, Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import LoraplexError
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.bodies import NullableBody, TokenId, prompt_value
from loraplex.server.api.engine_requests import (
    EncodedPrompt,
    Truncation,
    cache_salt,
    check_length,
    encode_text,
    encode_truncated,
)
from loraplex.server.api.json_route import JsonRoute, documented
from loraplex.server.api.streaming import Choice, Numbers, PiecesResponse, gathered, json_pieces
from loraplex.server.handlers import running
from loraplex.server.state import RequestContext, ServerState, context_of, in_thread, state_of, until_client_leaves

router = APIRouter(route_class=JsonRoute)
_AT_ONCE = 64  # requests of one body in the engine

Texts = Annotated[
    str | list[Any],
    PlainValidator(prompt_value, json_schema_input_type=str | list[TokenId] | list[str] | list[list[TokenId]]),
]


class PoolingBody(NullableBody):
    """What texts become vectors with."""

    model: str = Field(min_length=1, max_length=8192)
    pooling: Pooling | None = None  # the mean over a text's tokens, or its last token's; None: the mean
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    truncation_side: Literal["left", "right"] | None = None
    user: str | None = Field(None, max_length=1024)
    priority: int | None = Field(None, ge=-1000, le=1000)
    cache_salt: str | None = Field(None, max_length=1024)
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,128}$")


class EmbeddingsBody(PoolingBody):
    neutral: ClassVar = {"embed_dtype": ("float32",), "endianness": ("native", "little")}

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1)
    normalize: bool | None = None  # to length 1; None: yes
    use_activation: bool | None = None  # vLLM's name for it


class ScoreBody(PoolingBody):
    """vLLM's names: two texts, one and several, or as many of both."""

    neutral: ClassVar = {"max_tokens_per_query": (0,), "max_tokens_per_doc": (0,), "use_activation": (True,)}

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


@router.post(
    "/v1/embeddings",
    responses=documented("The vectors.", 400, 401, 404, 429, required=("object", "data", "model", "usage")),
)
async def embeddings(body: EmbeddingsBody, http: HttpRequest) -> Response:
    """Texts as vectors: the means of their tokens' last hidden states, of length 1."""
    vectors, num_tokens = await _vectors(body, _listed(body.input), http, "input")
    state, context = state_of(http), context_of(http)
    write = partial(_embeddings_json, body, vectors, num_tokens)
    pieces = await state.workers.run(context.owner, write)
    return PiecesResponse(pieces, state.config.limits.stall_timeout_s)


@router.post(
    "/v1/score",
    responses=documented("The similarities.", 400, 401, 404, 429, required=("object", "data", "model", "usage")),
)
async def score(body: ScoreBody, http: HttpRequest) -> Response:
    """How alike texts are: the cosines of their vectors, as vLLM scores with models that embed."""
    first, second = _pairs(body)
    texts = [*first, *second]
    vectors, num_tokens = await _vectors(body, texts, http, "text_1")
    left, right = vectors[: len(first)], vectors[len(first) :]
    scores = (left.expand_as(right) * right).sum(dim=-1).tolist()  # both have length 1
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    pieces = gathered(json_pieces(_envelope("score", body) | {"data": data, "usage": _usage(num_tokens)}))
    return PiecesResponse(pieces, state_of(http).config.limits.stall_timeout_s)


async def _vectors(body: PoolingBody, texts: Sequence[Any], http: HttpRequest, param: str) -> tuple[Tensor, int]:
    """Of each text its vector [texts, hidden], of length 1 unless that isn't wanted; and the tokens of them all."""
    state, context = state_of(http), context_of(http)
    most = state.config.limits.max_inputs
    if len(texts) > most:
        raise ApiError(TOO_LARGE, f"{len(texts)} texts; {most} are possible (max_inputs).", param=param)
    _check(body, state, context)
    choice = state.catalog.choice(body.model, context.principal)
    try:
        requests = await in_thread(http, partial(_requests, body, texts, choice, state, context))
    except LoraplexError as error:
        raise context.refusal(error) from error
    results = await until_client_leaves(http.receive, _results(requests, state, context))
    vectors = torch.stack([_of(result) for result in results])
    if not isinstance(body, EmbeddingsBody) or (body.normalize is not False and body.use_activation is not False):
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return vectors, sum(len(result.prompt_token_ids) for result in results)


def _check(body: PoolingBody, state: ServerState, context: RequestContext) -> None:
    principal = context.principal
    if body.priority and principal.max_priority is not None and body.priority > principal.max_priority:
        message = f"priority is {body.priority}; this key may have {principal.max_priority}."
        raise ApiError(TOO_LARGE, message, param="priority")
    if isinstance(body, EmbeddingsBody):
        own = int(state.model.base.config.get_text_config(decoder=True).hidden_size)
        if body.dimensions not in (None, own):
            message = f"dimensions is {body.dimensions}; the vectors of this model have {own}, and aren't cut."
            raise ApiError(BAD_REQUEST, message, param="dimensions")


def _requests(
    body: PoolingBody, texts: Sequence[Any], choice: AdapterSpec, state: ServerState, context: RequestContext
) -> list[Request]:
    """Tokenized, which is work for a thread. Raises ApiError and LoraplexError."""
    tokenizer, max_length = state.row_tokenizer(choice), state.engine.max_length
    cut, most = _truncation(body, max_length), max_length - 1
    add = body.add_special_tokens is not False
    salt = cache_salt(body.cache_salt, context.principal, isolated=state.config.access.prefix_isolation)

    def encoded(text: str | list[int]) -> EncodedPrompt:
        if isinstance(text, list):
            return EncodedPrompt(text if cut is None else cut.of_ids(text, tokenizer.tokenizer))
        if cut is None:
            return encode_text(tokenizer.tokenizer, text, add_special_tokens=add, most=most, param="input")
        return encode_truncated(tokenizer.tokenizer, text, cut, add_special_tokens=add, most=most)

    found = []
    for text in texts:
        ids = encoded(text).ids
        check_length(len(ids), most, "input")
        found.append(
            Request(
                ids,
                adapters=choice,
                sampling=SamplingParams(max_tokens=1),
                priority=body.priority or 0,
                cache_salt=salt,
                pooling=body.pooling or "mean",
            )
        )
    return found


def _truncation(body: PoolingBody, max_length: int) -> Truncation | None:
    return Truncation.of(body.truncate_prompt_tokens, body.truncation_side, max_length)


async def _results(requests: Sequence[Request], state: ServerState, context: RequestContext) -> list[RequestResult]:
    """Some at a time, so that one body doesn't fill the queue."""
    results: list[RequestResult] = []
    for start in range(0, len(requests), _AT_ONCE):
        async with running(state, context, requests[start : start + _AT_ONCE], wants_deltas=False) as run:
            results += await run.results()
    return results


def _of(result: RequestResult) -> Tensor:
    assert result.embedding is not None, "a finished request has no vector"
    return result.embedding


def _embeddings_json(body: EmbeddingsBody, vectors: Tensor, num_tokens: int) -> list[bytes]:
    data = []
    for index, vector in enumerate(vectors.numpy()):
        if body.encoding_format == "base64":
            embedding: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            embedding = Numbers(vector, "list")
        data.append(Choice({"object": "embedding", "index": index, "embedding": embedding}))
    return gathered(json_pieces(_envelope("embd", body) | {"data": data, "usage": _usage(num_tokens)}))


def _envelope(prefix: str, body: PoolingBody) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{body.request_id or secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
    }


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _listed(given: Any) -> list[Any]:
    """One entry for each vector: a text or token ids."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ApiError(BAD_REQUEST, "there is no text.", param="input")
    return list(given)


def _pairs(body: ScoreBody) -> tuple[list[Any], list[Any]]:
    """The texts on both sides: one and several, or as many of both. Raises ApiError."""
    sides = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
    given = [(a, b) for a, b in sides if getattr(body, a) is not None or getattr(body, b) is not None]
    if len(given) != 1 or any(getattr(body, name) is None for name in given[0]):
        raise ApiError(BAD_REQUEST, "give text_1 and text_2, or queries and documents.", param="text_1")
    first, second = (_listed(getattr(body, name)) for name in given[0])
    if len(first) not in (1, len(second)):
        message = f"{given[0][0]} has {len(first)} texts and {given[0][1]} {len(second)}: give one, or as many."
        raise ApiError(BAD_REQUEST, message, param=given[0][0])
    return first, second
