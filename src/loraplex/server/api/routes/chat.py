"""/v1/chat/completions: from its body to a request, and from its result to the answer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from loraplex.engine.request import Completion, RequestResult
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import ChatBody
from loraplex.server.api.engine_requests import allowed_tokens, engine_request, sampling_params
from loraplex.server.api.json_route import JsonRoute
from loraplex.server.api.messages import as_turns
from loraplex.server.api.response_parts import Extras, News, envelope, usage
from loraplex.server.api.streaming import Choice
from loraplex.server.api.tools.chat_output import ChatAnswers
from loraplex.server.api.tools.use import ToolUse
from loraplex.server.handlers import ANSWERS, respond
from loraplex.server.state import RequestContext, ServerState

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses=ANSWERS)
async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
    """Answer the last message of a chat."""
    return await respond(body, http, partial(ChatCall, body))


class ChatCall:
    """One call: checked, and its messages tokenized, when it is made; that is work for a thread."""

    def __init__(self, body: ChatBody, state: ServerState, context: RequestContext, adapters: AdapterSpec) -> None:
        self.row_tokenizer = state.row_tokenizer(adapters)
        self.body = body
        self.n = body.n or 1
        self.extras = Extras.of_body(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(BAD_REQUEST, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if body.max_tokens == 0:
            raise ApiError(BAD_REQUEST, "max_tokens must be at least 1.", param="max_tokens")
        config, principal = state.config, context.principal
        functions = [tool.function for tool in body.tools or ()]
        use = ToolUse.of(functions, body.tool_choice, parallel=body.parallel_tool_calls)
        turns, tools = use.prepared(as_turns(body.messages), self.row_tokenizer.tools)
        self.prompts = [turns]
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = sampling_params(
            body,
            principal,
            config.limits,
            max_tokens=allowed_tokens(principal, config.limits) if max_tokens is None else max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        sampling = use.sampling(sampling, self.row_tokenizer.tools)
        encoded = self.row_tokenizer.chats.encode(turns, tools=tools, most=state.engine.max_length - 1)
        self.requests = [engine_request(body, encoded, sampling, adapters=adapters, principal=principal, config=config)]
        self.envelope = envelope("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion", body)
        self._answers = ChatAnswers(use, self.row_tokenizer.tools)

    def answer(self, results: Sequence[RequestResult]) -> dict[str, Any]:
        """The whole answer."""
        (result,) = results
        choices = [Choice(self._choice(completion)) for completion in result.completions]
        return self.envelope | {"choices": choices, "usage": usage(results)}

    def chunk_choice(self, news: News) -> dict[str, Any]:
        delta, finish_reason = self._answers.delta(news.index, news.text, news.finish_reason)
        return {
            "index": news.index,
            "delta": delta,
            "logprobs": self._logprobs(news.logprobs),
            "finish_reason": finish_reason,
        }

    def _choice(self, completion: Completion) -> dict[str, Any]:
        message, finish_reason = self._answers.message(completion.text, completion.finish_reason)
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": finish_reason,
        } | self.extras.of(completion, self.row_tokenizer.texts)

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
        text = self.row_tokenizer.texts.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
