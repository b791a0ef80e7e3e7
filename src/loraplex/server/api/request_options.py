"""From a body to the engine's request: sampling options and limits."""

from collections.abc import Mapping
from typing import Any

from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import RequestError
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.schemas.generation import GenerationBody, ResponseFormat
from loraplex.server.auth.access import Principal
from loraplex.server.settings import RequestLimits


def sampling_params(
    body: GenerationBody,
    principal: Principal,
    limits: RequestLimits,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Raises ApiError that names the field."""
    _check_limits(body, principal, limits, max_tokens)
    given: dict[str, Any] = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),  # -1 is all, too
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": _logit_bias(body.logit_bias),
        "seed": None if body.seed is None else body.seed % 2**63,
        "n": body.n,
        "stop": tuple(body.stop) if isinstance(body.stop, list) else body.stop,
        "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "json_schema": _json_schema(body.response_format),
        "max_tokens": max(1, max_tokens),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except RequestError as error:
        raise ApiError(BAD_REQUEST, str(error), quotes_request=True) from error


def allowed_tokens(principal: Principal, limits: RequestLimits) -> int:
    """New tokens that an answer may have at most."""
    return min(limits.max_new_tokens, principal.max_new_tokens or limits.max_new_tokens)


def cache_salt(body: GenerationBody, principal: Principal, *, isolated: bool) -> str:
    """Requests share a prefix cache only with those of the same salt: the key's, and the one that a client gives."""
    key = principal.key
    own = key.id if key is not None and isolated and not key.shared_prefixes else ""
    return f"{own}:{body.cache_salt}" if body.cache_salt else own


def _check_limits(body: GenerationBody, principal: Principal, limits: RequestLimits, max_tokens: int) -> None:
    most = allowed_tokens(principal, limits)
    if max_tokens > most:
        raise ApiError(TOO_LARGE, f"max_tokens is {max_tokens}; {most} are possible here.", param="max_tokens")
    if body.n is not None and body.n > limits.max_choices:
        raise ApiError(TOO_LARGE, f"n is {body.n}; {limits.max_choices} are possible (max_choices).", param="n")
    if body.priority and principal.max_priority is not None and body.priority > principal.max_priority:
        message = f"priority is {body.priority}; this key may have {principal.max_priority}."
        raise ApiError(TOO_LARGE, message, param="priority")
    if body.stream_options is not None and not body.stream:
        raise ApiError(BAD_REQUEST, "stream_options needs stream: true.", param="stream_options")


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    if not all(token.isascii() and token.isdigit() and len(token) < 11 for token in given):
        raise ApiError(BAD_REQUEST, "the keys of logit_bias are token ids, written as texts.", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _json_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        message = 'response_format of type "json_schema" needs json_schema: {"schema": ...}.'
        raise ApiError(BAD_REQUEST, message, param="response_format.json_schema")
    return wanted.json_schema.schema_
