"""/v1/completions: from its body to requests, and from results to its answers."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from loraplex.engine.request import Completion, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.bodies import CompletionBody
from loraplex.server.api.engine_requests import (
    EncodedPrompt,
    check_length,
    encode_text,
    engine_request,
    sampling_params,
)
from loraplex.server.api.json_route import JsonRoute
from loraplex.server.api.response_parts import Extras, News, auto_json, chosen_model, envelope, usage
from loraplex.server.api.streaming import Choice
from loraplex.server.handlers import ANSWERS, respond
from loraplex.server.state import RequestContext, ServerState

router = APIRouter(route_class=JsonRoute)
_DEFAULT_TOKENS = 16  # as OpenAI's


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
        self._echo = bool(body.echo)
        self.prompts = _prompts(body.prompt)
        self.extras = Extras.of_body(body)
        self._check()
        config, principal = state.config, context.principal
        sampling = sampling_params(
            body,
            principal,
            config.limits,
            max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if self._echo and not body.stream else None,
        )
        self.requests = [
            engine_request(body, self._encode(prompt), sampling, adapters=adapters, principal=principal, config=config)
            for prompt in self.prompts
        ]
        self._prompt_text = cache(self._decoded)  # of all its answers
        self.envelope = envelope("cmpl", "text_completion", body)
        self._echoed: set[tuple[int, int]] = set()
        self._offsets: dict[tuple[int, int], int] = {}

    # Requests

    def _check(self) -> None:
        most = self._state.config.limits.max_prompts
        if len(self.prompts) > most:
            message = f"{len(self.prompts)} prompts; {most} are possible (max_prompts)."
            raise ApiError(TOO_LARGE, message, param="prompt")
        most, number = self._state.config.limits.max_answers, len(self.prompts) * self.n
        if number > most:
            message = (
                f"{len(self.prompts)} prompts times n={self.n} are {number} answers; {most} are possible (max_answers)."
            )
            raise ApiError(TOO_LARGE, message, param="n")
        if self.body.max_tokens == 0 and (not self._echo or self.body.stream):
            raise ApiError(BAD_REQUEST, "max_tokens: 0 needs echo, without stream.", param="max_tokens")
        if self._echo and self.body.stream and self.body.logprobs is not None:
            raise ApiError(BAD_REQUEST, "echo with logprobs can't be streamed.", param="echo")
        if self.extras.capture and len(self.prompts) > 1:
            raise ApiError(BAD_REQUEST, "attention is captured for one prompt.", param="capture_attention")

    def _encode(self, prompt: str | list[int]) -> EncodedPrompt:
        most = self._state.engine.max_length - 1  # one for the answer
        if isinstance(prompt, list):
            check_length(len(prompt), most, "prompt")
            return EncodedPrompt(prompt)
        return encode_text(self.row_tokenizer.tokenizer, prompt, add_special_tokens=True, most=most)

    # Answers

    def answer(self, results: Sequence[RequestResult]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            Choice(self._choice(place, result, completion))
            for place, result in enumerate(results)
            for completion in result.completions
        ]
        is_empty = self.body.max_tokens == 0
        dropped = sum(len(completion.token_ids) for r in results for completion in r.completions) if is_empty else 0
        model = chosen_model((result.auto for result in results), self._state.catalog.base_name)
        return self.envelope | model | {"choices": choices, "usage": usage(results, num_dropped=dropped)}

    def chunk_choice(self, news: News) -> dict[str, Any]:
        text, key = news.text, (news.place, news.index)
        if self._echo and key not in self._echoed:
            self._echoed.add(key)
            text = self._prompt_text(news.place) + text
        logprobs = None
        if self.body.logprobs is not None and news.logprobs:
            logprobs = self._logprobs(news.logprobs, self._offsets.get(key, 0))
            self._offsets[key] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return {
            "index": news.place * self.n + news.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": news.finish_reason,
        }

    def _choice(self, place: int, result: RequestResult, completion: Completion) -> dict[str, Any]:
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
            "index": place * self.n + completion.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if is_empty else completion.finish_reason,
            **auto_json(result.auto, self._state.catalog.base_name),
        } | self.extras.of(completion, self.row_tokenizer.texts)

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
            listed["top_logprobs"].append(None if entry is None else _top_texts(entry, texts.of))
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


def _top_texts(logprobs: TokenLogprobs, text: Callable[[int], str]) -> dict[str, float]:
    """The likeliest tokens by their texts, the chosen one among them; of equal texts the likelier counts."""
    found = {text(logprobs.token_id): logprobs.logprob}
    for token, value in logprobs.top:
        found[text(token)] = max(value, found.get(text(token), value))
    return found
