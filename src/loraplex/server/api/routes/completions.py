"""/v1/completions: from its body to requests, and from results to its answers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from loraplex.engine.request import Completion, Request, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.bodies import CompletionBody, GenerationBody
from loraplex.server.api.completion_answers import ANSWERS, respond
from loraplex.server.api.engine_requests import (
    EncodedPrompt,
    Truncation,
    check_length,
    encode_text,
    encode_truncated,
    engine_request,
    sampling_params,
)
from loraplex.server.api.json_route import JsonRoute
from loraplex.server.api.response_parts import (
    Extras,
    News,
    auto_json,
    chosen_model,
    envelope,
    prompt_logprobs_json,
    usage,
)
from loraplex.server.api.streaming import Choice
from loraplex.server.state import RequestContext, ServerState, TokenTexts

router = APIRouter(route_class=JsonRoute)
_DEFAULT_TOKENS = 16  # as OpenAI's
_MAX_PROMPT_LOGPROBS = 2**18  # entries of one answer, of some 64 bytes each


@router.post("/v1/completions", responses=ANSWERS)
async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    """Continue prompts."""
    return await respond(body, http, partial(CompletionCall, body))


class CompletionCall:
    """One call: checked, and its prompts tokenized, when it is made; that is work for a thread."""

    def __init__(
        self, body: CompletionBody, state: ServerState, context: RequestContext, adapters: AdapterSpec
    ) -> None:
        self._state = state
        self.row_tokenizer = state.row_tokenizer(adapters)
        self.body = body
        self.n = body.n or 1
        self._best_of = max(self.n, body.best_of or self.n)
        self._echo = bool(body.echo)
        self.prompts = _prompts(body.prompt)
        self.extras = Extras.of_body(body)
        self._check()
        config, principal = state.config, context.principal
        sampling = sampling_params(
            body,
            principal,
            config.limits,
            state.sampling_defaults,
            max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=(body.logprobs or 0) if self._best_of > self.n else body.logprobs,
            prompt_logprobs=None if body.stream else self._prompt_logprobs(),
        )
        if self._best_of > self.n:
            sampling = replace(sampling, n=self._best_of)
        self._truncation = Truncation.of_body(body, state.engine.max_length)
        self.requests = [
            engine_request(body, self._encode(prompt), sampling, adapters=adapters, principal=principal, config=config)
            for prompt in self.prompts
        ]
        check_num_prompt_logprobs(body, self.requests, times=self.n)  # each answer tells its prompt's
        self._prompt_text = cache(self._decoded)  # of all its answers
        self.envelope = envelope("cmpl", "text_completion", body)
        self._begun: set[tuple[int, int]] = set()
        self._offsets: dict[tuple[int, int], int] = {}

    # Requests

    def _check(self) -> None:
        most = self._state.config.limits.max_prompts
        if len(self.prompts) > most:
            message = f"{len(self.prompts)} prompts; {most} are possible (max_prompts)."
            raise ApiError(TOO_LARGE, message, param="prompt")
        self._check_best_of()
        most, number = self._state.config.limits.max_answers, len(self.prompts) * self._best_of
        if number > most:
            message = (
                f"{len(self.prompts)} prompts times n={self._best_of} are {number} answers; {most} are possible "
                "(max_answers)."
            )
            raise ApiError(TOO_LARGE, message, param="n")
        if self.body.max_tokens == 0 and (not self._echo or self.body.stream):
            raise ApiError(BAD_REQUEST, "max_tokens: 0 needs echo, without stream.", param="max_tokens")
        if self._echo and self.body.stream and self.body.logprobs is not None:
            raise ApiError(BAD_REQUEST, "echo with logprobs can't be streamed.", param="echo")
        check_prompt_logprobs(self.body)
        if self.extras.capture and len(self.prompts) > 1:
            raise ApiError(BAD_REQUEST, "attention is captured for one prompt.", param="capture_attention")

    def _check_best_of(self) -> None:
        given, most = self.body.best_of, self._state.config.limits.max_choices
        if given is None:
            return
        if given < self.n:
            raise ApiError(BAD_REQUEST, f"best_of is {given}, but n is {self.n}; it must not be less.", param="best_of")
        if given > most:
            raise ApiError(TOO_LARGE, f"best_of is {given}; {most} are possible (max_choices).", param="best_of")
        if given > self.n and (self.body.stream or self.extras.any):
            message = "best_of above n can't be streamed, and doesn't go with scalings and captured attention."
            raise ApiError(BAD_REQUEST, message, param="best_of")

    def _prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted of each of the prompt's, for itself or for its echo."""
        wanted = [self.body.prompt_logprobs, self.body.logprobs if self._echo else None]
        return max((number for number in wanted if number is not None), default=None)

    def _encode(self, prompt: str | list[int]) -> EncodedPrompt:
        most = self._state.engine.max_length - 1  # one for the answer
        add = self.body.add_special_tokens is not False
        tokenizer, cut = self.row_tokenizer.tokenizer, self._truncation
        if isinstance(prompt, list):
            ids = prompt if cut is None else cut.of_ids(prompt, tokenizer)
            check_length(len(ids), most, "prompt")
            return EncodedPrompt(ids)
        if cut is None:
            return encode_text(tokenizer, prompt, add_special_tokens=add, most=most)
        encoded = encode_truncated(tokenizer, prompt, cut, add_special_tokens=add, most=most)
        check_length(len(encoded.ids), most, "prompt")
        return encoded

    # Answers

    def answer(self, results: Sequence[RequestResult]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            Choice(self._choice(place, index, result, completion))
            for place, result in enumerate(results)
            for index, completion in enumerate(best(result.completions, self.n))
        ]
        is_empty = self.body.max_tokens == 0
        dropped = sum(len(completion.token_ids) for r in results for completion in r.completions) if is_empty else 0
        model = chosen_model((result.auto for result in results), self._state.catalog.base_name)
        return self.envelope | model | {"choices": choices, "usage": usage(results, num_dropped=dropped)}

    def chunk_fields(self, news: News) -> dict[str, Any]:
        return {}

    def chunk_choice(self, news: News) -> dict[str, Any]:
        text, key = news.text, (news.place, news.index)
        ids: dict[str, Any] = {"token_ids": news.token_ids} if self.body.return_token_ids else {}
        if key not in self._begun:
            self._begun.add(key)
            text = self._prompt_text(news.place) + text if self._echo else text
            if self.body.return_token_ids:
                ids["prompt_token_ids"] = list(news.prompt)
        logprobs = None
        if self.body.logprobs is not None and news.logprobs:
            logprobs = self._logprobs(news.logprobs, self._offsets.get(key, 0))
            self._offsets[key] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return {
            "index": news.place * self.n + news.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": news.finish_reason,
        } | ids

    def _choice(self, place: int, index: int, result: RequestResult, completion: Completion) -> dict[str, Any]:
        is_empty = self.body.max_tokens == 0
        text = "" if is_empty else completion.text
        entries: list[TokenLogprobs | None] = [] if is_empty else list(completion.logprobs or ())
        if self._echo:
            text = self._prompt_text(place) + text
            entries = [*(result.prompt_logprobs or ()), *entries]
        logprobs = None
        if self.body.logprobs is not None:
            first = result.prompt_token_ids[0] if self._echo else None
            logprobs = self._logprobs(entries, 0, first=first)
        return {
            "index": place * self.n + index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if is_empty else completion.finish_reason,
            **auto_json(result.auto, self._state.catalog.base_name),
            **self._ids(result, () if is_empty else completion.token_ids),
        } | self.extras.of(completion, self.row_tokenizer.texts)

    def _ids(self, result: RequestResult, token_ids: Sequence[int]) -> dict[str, Any]:
        """vLLM's fields of a choice, where they are wanted."""
        told: dict[str, Any] = {}
        if self.body.return_token_ids:
            told = {"token_ids": list(token_ids), "prompt_token_ids": list(result.prompt_token_ids)}
        wanted = self.body.prompt_logprobs
        if wanted is not None and not self.body.stream:
            told["prompt_logprobs"] = prompt_logprobs_json(result.prompt_logprobs, wanted, self.row_tokenizer.texts)
        return told

    def _logprobs(
        self, entries: Sequence[TokenLogprobs | None], offset: int, first: int | None = None
    ) -> dict[str, list[Any]]:
        """OpenAI's four lists; the first token of an echoed prompt has no probability."""
        texts = self.row_tokenizer.texts
        listed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = first if entry is None else entry.token_id
            assert token is not None, "only the first token of a prompt has no probability"
            listed["tokens"].append(texts.of(token))
            listed["token_logprobs"].append(None if entry is None else entry.logprob)
            listed["top_logprobs"].append(None if entry is None else _top_texts(entry, self.body.logprobs or 0, texts))
            listed["text_offset"].append(offset)
            offset += len(texts.of(token))
        return listed

    def _decoded(self, place: int) -> str:
        prompt = self.prompts[place]
        return prompt if isinstance(prompt, str) else str(self.row_tokenizer.tokenizer.decode(list(prompt)))


def _prompts(given: Any) -> list[Any]:
    """One prompt for each answer: a text or token ids."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    if not given:
        raise ApiError(BAD_REQUEST, "the prompt is empty.", param="prompt")
    return list(given)


def best(completions: Sequence[Completion], number: int) -> list[Completion]:
    """Those of the highest log-probability a token, as OpenAI's best_of chooses; all of them in their order."""
    if number >= len(completions):
        return list(completions)

    def mean_logprob(completion: Completion) -> float:
        entries = completion.logprobs or ()
        return sum(entry.logprob for entry in entries) / max(1, len(entries))

    return sorted(completions, key=mean_logprob, reverse=True)[:number]


def check_prompt_logprobs(body: GenerationBody) -> None:
    """As vLLM: the probabilities of a prompt can't be streamed."""
    if body.stream and body.prompt_logprobs:
        raise ApiError(BAD_REQUEST, "prompt_logprobs can't be streamed.", param="prompt_logprobs")


def check_num_prompt_logprobs(body: GenerationBody, requests: Sequence[Request], *, times: int = 1) -> None:
    """Raise ApiError for more probabilities of prompts than an answer, which tells them so many times, may bring."""
    wanted = requests[0].sampling.prompt_logprobs
    if wanted is None:
        return
    number = sum(len(request.prompt) for request in requests) * (wanted + 1) * times
    if number > _MAX_PROMPT_LOGPROBS:
        name = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        message = f"{name} asks for {number} entries; {_MAX_PROMPT_LOGPROBS} are possible. Send fewer prompts."
        raise ApiError(TOO_LARGE, message, param=name)


def _top_texts(logprobs: TokenLogprobs, number: int, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens by their texts, the chosen one among them; of equal texts the likelier counts."""
    found = {texts.of(logprobs.token_id): logprobs.logprob}
    for token, value in logprobs.top[:number]:
        text = texts.of(token)
        found[text] = max(value, found.get(text, value))
    return found
