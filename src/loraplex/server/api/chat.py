"""/v1/chat/completions: from its body to a request, and from its result to the answer."""

import time
from collections.abc import Sequence
from typing import Any

from loraplex.engine.request import Completion, Request, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.extensions import capture_request
from loraplex.server.api.json_pieces import Choice
from loraplex.server.api.prompts import steerings
from loraplex.server.api.request_options import allowed_tokens, cache_salt, sampling_params
from loraplex.server.api.response_parts import Extras, News, new_id, usage
from loraplex.server.api.schemas.generation import ChatBody, Message
from loraplex.server.state import RequestContext, ServerState


class ChatCall:
    """One call: checked, and its messages tokenized, when it is made; that is work for a thread."""

    def __init__(self, body: ChatBody, state: ServerState, context: RequestContext, choice: AdapterSpec) -> None:
        self._state = state
        self.body = body
        self.n = body.n or 1
        self.extras = Extras(
            scalings=bool(body.return_scalings),
            capture=body.capture_attention is not None,
            encoding=body.capture_attention.encoding if body.capture_attention else "base64",
        )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(BAD_REQUEST, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if body.max_tokens == 0:
            raise ApiError(BAD_REQUEST, "max_tokens must be at least 1.", param="max_tokens")
        limits = state.config.limits
        self.prompts = [as_turns(body.messages)]
        asked = body.max_completion_tokens or body.max_tokens
        sampling = sampling_params(
            body,
            context.principal,
            limits,
            max_tokens=allowed_tokens(context.principal, limits) if asked is None else asked,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        encoded = state.chats.encode(self.prompts[0], most=state.engine.max_length - 1)
        request = Request(
            encoded.ids,
            adapters=choice,
            sampling=sampling,
            priority=body.priority or 0,
            capture=capture_request(body.capture_attention, limits.max_capture_bytes),
            steering=steerings(body.steer, encoded, limits.max_steered_spans),
            return_scalings=self.extras.scalings,
            scalings_budget_bytes=limits.max_capture_bytes,
            cache_salt=cache_salt(body, context.principal, isolated=state.config.access.prefix_isolation),
        )
        self.requests = [request]
        self.envelope: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._begun: set[int] = set()

    def answer(self, results: Sequence[RequestResult]) -> dict[str, Any]:
        """The whole answer."""
        (result,) = results
        choices = [Choice(self._choice(completion)) for completion in result.completions]
        return self.envelope | {"choices": choices, "usage": usage(results)}

    def chunk_choice(self, news: News) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if news.index not in self._begun:
            self._begun.add(news.index)
            delta = {"role": "assistant", "content": ""}
        if news.text:
            delta["content"] = news.text
        return {
            "index": news.index,
            "delta": delta,
            "logprobs": self._logprobs(news.logprobs),
            "finish_reason": news.finish_reason,
        }

    def _choice(self, completion: Completion) -> dict[str, Any]:
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": completion.finish_reason,
        } | self.extras.of(completion, self._state.texts)

    def _logprobs(self, entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if not self.body.logprobs or entries is None:
            return None
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._state.texts.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def as_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """What a chat template takes; "developer" is OpenAI's newer word for "system"."""
    turns = []
    for message in messages:
        turn = {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        turns.append(turn if message.name is None else turn | {"name": message.name})
    return turns
