"""/generate, /generate_stream and /info, as LoRAX's and TGI's clients call them, with their shapes."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

import loraplex
from loraplex.engine.request import Completion, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.errors import LoraplexError
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import ChatBody, CompletionBody, Count, Grammar, Message, NullableBody, StopText
from loraplex.server.api.engine_requests import allowed_tokens
from loraplex.server.api.json_route import TGI_ERROR, JsonRoute, documented, json_response
from loraplex.server.api.refused_fields import NEUTRAL
from loraplex.server.api.response_parts import News
from loraplex.server.api.routes.chat import ChatCall
from loraplex.server.api.routes.completions import CompletionCall, best
from loraplex.server.api.streaming import EventStream, PiecesResponse, gathered, json_pieces, sse
from loraplex.server.handlers import Run, running
from loraplex.server.state import RequestContext, ServerState, context_of, in_thread, state_of, until_client_leaves

router = APIRouter(route_class=JsonRoute)
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


_GENERATED = documented(
    "The answer.",
    *(401, 404, 422, 429),
    required=("generated_text",),
    media="text/event-stream",
    error=TGI_ERROR,
)


@router.post("/", responses=_GENERATED, include_in_schema=False)
async def generate_at_root(body: GenerateBody, http: HttpRequest) -> Response:
    """Where both servers' clients send to, which get a list of one answer there."""
    return await _answer(body, http, stream=bool(body.stream), as_list=True)


@router.post("/generate", responses=_GENERATED)
async def generate(body: GenerateBody, http: HttpRequest) -> Response:
    """Continue a text, as LoRAX and TGI do; with `stream` as /generate_stream."""
    return await _answer(body, http, stream=bool(body.stream))


@router.post("/generate_stream", responses=_GENERATED)
async def generate_stream(body: GenerateBody, http: HttpRequest) -> Response:
    """The same, one event for each token."""
    return await _answer(body, http, stream=True)


@router.get("/info", responses=documented("The model.", 401, 429, required=("model_id", "max_total_tokens")))
async def info(http: HttpRequest) -> Response:
    """What TGI and LoRAX tell of their model and limits."""
    state = state_of(http)
    config, base = state.config, state.model.base
    engine = state.engine
    told = {
        "model_id": config.model.model,
        "model_sha": None,
        "model_dtype": f"torch.{str(base.dtype).removeprefix('torch.')}",
        "model_device_type": base.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": config.network.max_connections,
        "max_best_of": config.limits.max_choices,
        "max_stop_sequences": 16,
        "max_input_length": engine.max_length - 1,
        "max_input_tokens": engine.max_length - 1,
        "max_total_tokens": engine.max_length,
        "max_new_tokens": allowed_tokens(context_of(http).principal, config.limits),
        "max_batch_size": config.engine.max_running,
        "validation_workers": 4,
        "router": "loraplex",
        "version": loraplex.__version__,
        "sha": None,
        "docker_label": None,
    }
    return json_response(told)


def model_of(parameters: Any, base_name: str = "") -> str:
    """What `model` is in OpenAI's API; the base model's name without adapters. Of a body that may be anything."""
    get = parameters.get if isinstance(parameters, Mapping) else lambda name: getattr(parameters, name, None)
    merged = get("merged_adapters") or get("adapters")
    if not merged:
        return str(get("adapter_id") or base_name)
    of = merged.get if isinstance(merged, Mapping) else lambda name: getattr(merged, name, None)
    ids = list(of("ids") or ())
    weights = of("weights") or [1.0] * len(ids)
    return "+".join(f"{name}:{weight!r}" for name, weight in zip(ids, weights, strict=False))


async def _answer(body: GenerateBody, http: HttpRequest, *, stream: bool, as_list: bool = False) -> Response:
    state, context = state_of(http), context_of(http)
    parameters = body.parameters or GenerateParameters.model_validate({})
    _check(parameters, stream=stream)
    choice = state.catalog.choice(model_of(parameters, state.catalog.base_name), context.principal)
    try:
        call = await in_thread(http, partial(GenerateCall, body, parameters, state, context, choice, stream=stream))
    except LoraplexError as error:
        raise context.refusal(error) from error
    if state.config.logs.log_prompts:
        context.log["prompts"] = [body.inputs]
    if stream:
        stack = AsyncExitStack()
        run = await stack.enter_async_context(running(state, context, call.requests, wants_deltas=True))
        limit_s = state.config.limits.stall_timeout_s
        return EventStream(call.events(run), limit_s, stack.aclose, done=b"", path="/generate_stream")
    pieces = await until_client_leaves(http.receive, _whole(call, state, context, as_list=as_list))
    return PiecesResponse(pieces, state.config.limits.stall_timeout_s)


async def _whole(call: "GenerateCall", state: ServerState, context: RequestContext, *, as_list: bool) -> list[bytes]:
    async with running(state, context, call.requests, wants_deltas=False) as run:
        (result,) = await run.results()

    def write() -> list[bytes]:
        answer = call.answer(result)
        return gathered(json_pieces([answer] if as_list else answer))

    return await state.workers.run(context.owner, write)


def _check(parameters: GenerateParameters, *, stream: bool) -> None:
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


class GenerateCall:
    """One call, as a call of OpenAI's API underneath; made in a thread."""

    def __init__(
        self,
        body: GenerateBody,
        parameters: GenerateParameters,
        state: ServerState,
        context: RequestContext,
        choice: Any,
        *,
        stream: bool,
    ) -> None:
        self._inputs, self._parameters = body.inputs, parameters
        options = _options(parameters, allowed_tokens(context.principal, state.config.limits))
        options |= {
            "model": "-",
            "stream": stream,
            "prompt_logprobs": 0 if parameters.decoder_input_details and not stream else None,
        }
        num_top = max(parameters.return_k_alternatives or 0, parameters.top_n_tokens or 0)
        self.call: ChatCall | CompletionCall
        if parameters.apply_chat_template:
            options |= {
                "messages": [Message.model_validate({"role": "user", "content": body.inputs})],
                "top_logprobs": num_top,
            }
            self.call = ChatCall(ChatBody.model_construct(logprobs=True, **options), state, context, choice)
        else:
            options |= {"prompt": body.inputs, "logprobs": num_top, "best_of": parameters.best_of}
            self.call = CompletionCall(CompletionBody.model_construct(**options), state, context, choice)
        self.requests = self.call.requests
        self._seed = self.requests[0].sampling.seed
        self._tokenizer = self.call.row_tokenizer
        self._special = frozenset(self._tokenizer.tokenizer.all_special_ids)
        self._ends = self.requests[0].sampling.stop_strings

    def answer(self, result: RequestResult) -> dict[str, Any]:
        """The whole answer, its details where they are wanted."""
        (chosen,) = best(result.completions, 1)
        others = [completion for completion in result.completions if completion is not chosen]
        told: dict[str, Any] = {"generated_text": self._text(chosen.text)}
        if self._parameters.details or self._parameters.decoder_input_details:
            told["details"] = self._details(chosen, result) | {"prompt_tokens": len(result.prompt_token_ids)}
            if others:
                told["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(other.text)} | self._details(other, result) for other in others
                ]
        return told

    async def events(self, run: Run) -> AsyncGenerator[bytes, None]:
        """One for each token; the last has the whole text and the details."""
        whole, number, held = "", 0, b""
        async for events in run.batches():
            found, failure = run.gather(events, holds_end=False)
            for news in found:
                whole += news.text
                for position, entry in enumerate(news.logprobs):
                    if held:
                        yield held
                    number += 1
                    is_last = news.finish_reason is not None and position + 1 == len(news.logprobs)
                    held = b"" if is_last else sse(self._event(entry, number))
                    if is_last:
                        yield sse(self._event(entry, number) | self._end(news, whole, number))
            if held:
                yield held
                held = b""
            if failure is not None:
                raise failure

    def _event(self, entry: TokenLogprobs, number: int) -> dict[str, Any]:
        return {"index": number, "token": self._token(entry), "generated_text": None, "details": None} | self._tops(
            [entry], "top_tokens"
        )

    def _end(self, news: News, text: str, number: int) -> dict[str, Any]:
        details = {
            "finish_reason": self._reason(news.finish_reason, news.token_ids, text),
            "generated_tokens": number,
            "skipped_tokens": 0,
            "prompt_tokens": len(news.prompt),
            "input_length": len(news.prompt),
            "seed": self._seed,
        }
        return {"generated_text": self._text(text), "details": details}

    def _details(self, completion: Completion, result: RequestResult) -> dict[str, Any]:
        entries = completion.logprobs or ()
        return {
            "finish_reason": self._reason(completion.finish_reason, completion.token_ids, completion.text),
            "generated_tokens": len(completion.token_ids),
            "skipped_tokens": 0,
            "seed": self._seed,
            "prefill": self._prefill(result),
            "tokens": [self._token(entry) for entry in entries],
        } | self._tops(entries, "top_tokens", nested=True)

    def _prefill(self, result: RequestResult) -> list[dict[str, Any]]:
        """The prompt's tokens; the first has no probability."""
        if not self._parameters.decoder_input_details or result.prompt_logprobs is None:
            return []
        pairs = zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
        return [
            {"id": token, "text": self._of(token), "logprob": None if entry is None else entry.logprob}
            for token, entry in pairs
        ]

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        told = {
            "id": entry.token_id,
            "text": self._of(entry.token_id),
            "logprob": entry.logprob,
            "special": entry.token_id in self._special,
            "skipped": False,  # LoRAX's, of its speculation
        }
        number = self._parameters.return_k_alternatives
        if number:
            told["alternative_tokens"] = [
                {"id": token, "text": self._of(token), "logprob": logprob} for token, logprob in entry.top[:number]
            ]
        return told

    def _tops(self, entries: Sequence[TokenLogprobs], name: str, *, nested: bool = False) -> dict[str, Any]:
        number = self._parameters.top_n_tokens
        if not number:
            return {}
        tops = [
            [
                {"id": token, "text": self._of(token), "logprob": logprob, "special": token in self._special}
                for token, logprob in entry.top[:number]
            ]
            for entry in entries
        ]
        return {name: tops if nested else tops[0]}

    def _of(self, token: int) -> str:
        return self._tokenizer.texts.of(token)

    def _text(self, text: str) -> str:
        return self._inputs + text if self._parameters.return_full_text else text

    def _reason(self, reason: str | None, token_ids: Sequence[int], text: str) -> str:
        """An end is a stop sequence's where the text has one at its end."""
        if reason != "stop":
            return "length"
        return "stop_sequence" if any(text.endswith(stop) for stop in self._ends) else "eos_token"


def _options(parameters: GenerateParameters, most: int) -> dict[str, Any]:
    """As fields of OpenAI's body. Without any sign of sampling it is greedy, as in both servers."""
    sampled = (parameters.temperature, parameters.top_k, parameters.top_p)
    is_sampled = bool(parameters.do_sample) or any(value is not None for value in sampled)
    temperature = parameters.temperature if parameters.temperature is not None else 1.0 if is_sampled else 0.0
    stops = [*(parameters.stop or ()), *(parameters.stop_sequences or ())]
    seed = parameters.seed
    if seed is None and temperature > 0:
        seed = time.time_ns() % 2**31  # told in the details
    options: dict[str, Any] = {
        "max_tokens": most if parameters.max_new_tokens is None else parameters.max_new_tokens,
        "temperature": temperature,
        "top_k": parameters.top_k or 0,
        "top_p": parameters.top_p if parameters.top_p is not None else 1.0,
        "repetition_penalty": parameters.repetition_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "ignore_eos": parameters.ignore_eos_token,
        "seed": seed,
        "stop": stops,
        "include_stop_str_in_output": True,  # TGI's texts end with the stop sequence
        "truncate_prompt_tokens": parameters.truncate,
        "truncation_side": "left",
    }
    return options | _structure(parameters)


def _structure(parameters: GenerateParameters) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if parameters.response_format is not None:
        schema = parameters.response_format.schema_
        found["guided_json"] = {"type": "object"} if schema is None else schema
    grammar = parameters.grammar
    if grammar is not None and grammar.type == "regex":
        if not isinstance(grammar.value, str):
            raise ApiError(BAD_REQUEST, "a grammar of type regex is a text.", param="grammar.value")
        found["guided_regex"] = grammar.value
    elif grammar is not None:
        found["guided_json"] = grammar.value
    return found
