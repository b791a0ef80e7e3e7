"""Sampling clients, and samples with the log probabilities of their tokens."""

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from loraplex.engine.request import Completion, Request, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import LoraplexError
from loraplex.server.api.api_errors import BAD_REQUEST, NOT_FOUND, RATE_LIMITED, TOO_LARGE, ApiError
from loraplex.server.api.engine_requests import allowed_tokens, cache_salt
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.handlers import Run, running
from loraplex.server.tinker.bodies import CreateSamplingSession, JoinSamplingSession, SampleBody
from loraplex.server.tinker.codec import INFLIGHT, JSON, PROTOBUF, failure, sampler_id
from loraplex.server.tinker.routes.common import PROMISE, TinkerCall
from loraplex.server.tinker.sessions import ClientSession
from loraplex.server.tinker.wire import TopTokens, model_input_error, sample_output
from loraplex.training.service.checkpoints import CheckpointPath

router = APIRouter(route_class=JsonRoute, prefix="/api/v1")
_FIXES = {
    "record_stability_info": "It is for stable_reinforce: set loss_fn to importance_sampling, ppo, cispo or gspo."
}
_SAMPLER = documented("The sampling client.", 400, 401, 404, 429, required=("sampling_session_id",))


@router.post("/create_sampling_session", responses=_SAMPLER)
async def create_sampling_session(body: CreateSamplingSession, http: HttpRequest) -> Response:
    """A client that samples from a checkpoint, or from the base model."""
    call = TinkerCall(http)
    service, principal = call.service, call.principal
    session = service.open_session(body.session_id, principal)
    service.check_base(body.base_model)
    path = None if body.model_path is None else CheckpointPath.parse(body.model_path)
    own = sampler_id(session.id, body.sampling_session_seq_id)

    def create() -> None:
        if path is not None:
            service.checkpoint(path, principal)
            service.adapter_of(path)  # loaded now, not with the first sample
        service.sessions.add_sampler(session, own, None if path is None else str(path))

    if path is None and not principal.may_use_base:
        raise ApiError(NOT_FOUND, "this key may not use the base model.", param="base_model")
    await call.in_thread(create)
    return json_response({"type": "create_sampling_session", "sampling_session_id": own})


@router.post("/join_sampling_session", responses=documented("The copy's number.", 400, 401, 404))
async def join_sampling_session(body: JoinSamplingSession, http: HttpRequest) -> Response:
    """A copy of a sampling client, in another process, gets a number of its own."""
    call = TinkerCall(http)
    session, _ = _sampler(call, body.sampling_session_id)
    session.num_joined += 1
    return json_response({"type": "join_sampling_session", "client_counter": session.num_joined})


@router.get("/samplers/{sampler}", responses=documented("The sampling client.", 401, 404, required=("sampler_id",)))
async def get_sampler(sampler: str, http: HttpRequest) -> Response:
    """What a sampling client samples from."""
    call = TinkerCall(http)
    _, path = _sampler(call, sampler)
    return json_response({"sampler_id": sampler, "base_model": call.service.base_name, "model_path": path})


def _sampler(call: TinkerCall, sampler: str) -> tuple[ClientSession, str | None]:
    """A sampling client's session, and the path that it samples from. Raises ApiError."""
    session = call.service.session(sampler.partition(":")[0], call.principal)
    if sampler not in session.samplers:
        raise ApiError(NOT_FOUND, f"there is no sampling client {sampler[:100]!r}.", param="sampling_session_id")
    return session, session.samplers[sampler]


@router.post("/asample", responses=PROMISE)
async def asample(body: SampleBody, http: HttpRequest) -> Response:
    """Samples of one prompt; the same sampling client and number are the same request."""
    call = TinkerCall(http)
    service, owner = call.service, call.principal.id
    _check(call, body)
    asker = body.sampling_session_id or f"{secrets.token_hex(8)}:sample:0"
    request_id = f"{asker}:{secrets.token_hex(4) if body.seq_id is None else body.seq_id}"
    answer = {
        "request_id": request_id,
        "sample_sequence_ids": [f"{request_id}:{index}" for index in range(body.num_samples)],
    }
    known = service.futures.find(request_id)
    if known is not None and known.owner == owner:
        return json_response(answer)
    path = _path(call, body)
    request = await call.in_thread(partial(_engine_request, call, body, path, request_id))
    future = service.futures.add(request_id, owner)
    stack = AsyncExitStack()
    try:
        run = await stack.enter_async_context(running(call.state, call.context, [request], wants_deltas=False))
    except BaseException:
        service.futures.drop(request_id)
        raise
    future.task = asyncio.create_task(_finished(call, run, stack, body))
    return json_response(answer)


def _check(call: TinkerCall, body: SampleBody) -> None:
    """Raises ApiError for what isn't possible."""
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
        if getattr(body, name):
            fix = _FIXES.get(name, "Leave it out.")
            raise ApiError(BAD_REQUEST, f"{name} isn't possible here. {fix}", param=name)
    most = call.state.config.limits.max_answers
    if body.num_samples > most:
        message = f"num_samples is {body.num_samples}; {most} are possible (max_answers)."
        raise ApiError(TOO_LARGE, message, param="num_samples")
    key = call.principal.key
    if key is not None and key.max_concurrent is not None:
        num_running = call.service.futures.num_running(call.principal.id)
        if num_running >= key.max_concurrent:
            raise ApiError(RATE_LIMITED, f"this key has {num_running} sampling requests running, its limit.")


def _path(call: TinkerCall, body: SampleBody) -> CheckpointPath | None:
    """The checkpoint to sample with; None for the base model. Raises ApiError."""
    if body.sampling_session_id is not None:
        _, text = _sampler(call, body.sampling_session_id)
    else:
        call.service.check_base(body.base_model)
        text = body.model_path
    if text is None:
        if not call.principal.may_use_base:
            raise ApiError(NOT_FOUND, "this key may not use the base model.", param="base_model")
        return None
    path = CheckpointPath.parse(text)
    if body.sampling_session_id is None:
        call.service.checkpoint(path, call.principal)
    return path


def _engine_request(call: TinkerCall, body: SampleBody, path: CheckpointPath | None, request_id: str) -> Request:
    """Raises ApiError or LoraplexError."""
    prompt: list[int] = []
    for chunk in body.prompt.chunks:
        if chunk.type != "encoded_text":
            raise ApiError(BAD_REQUEST, model_input_error(chunk.type), param="prompt")
        prompt += chunk.tokens
    adapters = () if path is None else ((call.service.adapter_of(path), 1.0),)
    isolated = call.state.config.access.prefix_isolation
    # Weights that change under one name: each sampling client has keys and values of its own.
    own = request_id.rpartition(":")[0] if path is not None and path.name == f"_{INFLIGHT}" else None
    return Request(
        prompt,
        adapters=adapters or None,
        sampling=_sampling(call, body),
        cache_salt=cache_salt(own, call.principal, isolated=isolated),
    )


def _sampling(call: TinkerCall, body: SampleBody) -> SamplingParams:
    """`stop` takes the place of the tokens that end an answer otherwise; none at all for an empty list."""
    wanted = body.sampling_params
    most = allowed_tokens(call.principal, call.state.config.limits)
    stops = [wanted.stop] if isinstance(wanted.stop, str) else list(wanted.stop or [])
    wants_prompt = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    return SamplingParams(
        max_tokens=most if wanted.max_tokens is None else min(wanted.max_tokens, most),
        temperature=wanted.temperature,
        top_k=max(0, wanted.top_k),
        top_p=wanted.top_p,
        seed=wanted.seed,
        n=body.num_samples,
        stop=tuple(stop for stop in stops if isinstance(stop, str)),
        stop_token_ids=tuple(stop for stop in stops if isinstance(stop, int)),
        ignore_eos=wanted.stop is not None,
        logprobs=body.topk_sample_logprobs,
        prompt_logprobs=body.topk_prompt_logprobs if wants_prompt else None,
    )


async def _finished(call: TinkerCall, run: Run, stack: AsyncExitStack, body: SampleBody) -> bytes:
    """The answer, encoded, whatever becomes of the request."""
    try:
        results = await run.results()
        encode = partial(_encoded, results[0], body)
        return PROTOBUF + await call.state.workers.run(call.context.owner, encode)
    except ApiError as error:
        return JSON + failure(error.message, by_user=error.status.number < 500)
    except LoraplexError as error:
        return JSON + failure(str(error), by_user=False)
    finally:
        await stack.aclose()


def _encoded(result: RequestResult, body: SampleBody) -> bytes:
    prompt, top = _prompt_logprobs(result, body)
    sequences = [_sequence(completion, wants_top=body.topk_sample_logprobs > 0) for completion in result.completions]
    return sample_output(sequences, prompt, top, result.num_cached_tokens)


def _sequence(completion: Completion, *, wants_top: bool) -> tuple[bool, Sequence[int], Sequence[float], Any]:
    logprobs = completion.logprobs or ()
    top = [entry.top for entry in logprobs] if wants_top else None
    return completion.finish_reason == "length", completion.token_ids, [entry.logprob for entry in logprobs], top


def _prompt_logprobs(result: RequestResult, body: SampleBody) -> tuple[Sequence[float | None] | None, TopTokens | None]:
    """Of the prompt's tokens, or of the last few alone."""
    found: Sequence[TokenLogprobs | None] = result.prompt_logprobs or ()
    last = body.prompt_logprobs_last_n
    if last is not None:
        found = [None if index < len(found) - last else entry for index, entry in enumerate(found)]
    own = [None if entry is None else entry.logprob for entry in found] if body.prompt_logprobs else None
    top = [None if entry is None else entry.top for entry in found] if body.topk_prompt_logprobs else None
    return own, top
