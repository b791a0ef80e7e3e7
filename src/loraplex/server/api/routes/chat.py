"""/v1/chat/completions: from its body to a request, and from its result to the answer."""

from collections.abc import Mapping, Sequence
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
from loraplex.server.api.chat_images import images_of
from loraplex.server.api.completion_answers import ANSWERS, respond
from loraplex.server.api.engine_requests import (
    EncodedPrompt,
    Truncation,
    allowed_tokens,
    check_length,
    engine_request,
    sampling_params,
)
from loraplex.server.api.json_route import JsonRoute
from loraplex.server.api.messages import Turn, as_turns
from loraplex.server.api.response_parts import (
    Extras,
    News,
    auto_json,
    chosen_model,
    envelope,
    prompt_logprobs_json,
    usage,
)
from loraplex.server.api.routes.completions import check_num_prompt_logprobs, check_prompt_logprobs
from loraplex.server.api.streaming import Choice
from loraplex.server.api.tools.chat_output import ChatAnswers
from loraplex.server.api.tools.use import ToolUse
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
        self._base_name = state.catalog.base_name
        self.body = body
        self.n = body.n or 1
        self.extras = Extras.of_body(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(BAD_REQUEST, "top_logprobs needs logprobs: true.", param="top_logprobs")
        check_prompt_logprobs(body)
        if body.max_tokens == 0:
            raise ApiError(BAD_REQUEST, "max_tokens must be at least 1.", param="max_tokens")
        config, principal = state.config, context.principal
        images = images_of(body.messages, state.model.base.config, config.engine.max_images, param="messages")
        functions = [tool.function for tool in body.tools or ()]
        use = ToolUse.of(functions, body.tool_choice, parallel=body.parallel_tool_calls)
        turns, tools = use.prepared(as_turns(body.messages), self.row_tokenizer.tools)
        self.prompts = [turns]
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = sampling_params(
            body,
            principal,
            config.limits,
            state.sampling_defaults,
            max_tokens=allowed_tokens(principal, config.limits) if max_tokens is None else max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=None if body.stream else body.prompt_logprobs,
        )
        sampling = use.sampling(sampling, self.row_tokenizer.tools)
        encoded = self._encode(turns, tools, state.engine.max_length)
        self.requests = [
            engine_request(
                body, encoded, sampling, adapters=adapters, principal=principal, config=config, images=images
            )
        ]
        check_num_prompt_logprobs(body, self.requests)
        self.envelope = envelope("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion", body)
        self._answers = ChatAnswers(use, self.row_tokenizer.tools)
        self._has_told_prompt = False

    def _encode(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], max_length: int) -> EncodedPrompt:
        body, most = self.body, max_length - 1
        cut = Truncation.of_body(body, max_length)
        encoded = self.row_tokenizer.chats.encode(
            turns,
            most=most if cut is None else cut.most(most),
            tools=tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
            variables=body.chat_template_kwargs or {},
        )
        if cut is None:
            return encoded
        encoded = cut.of_prompt(encoded, self.row_tokenizer.tokenizer)
        check_length(len(encoded.ids), most, "messages")
        return encoded

    def answer(self, results: Sequence[RequestResult]) -> dict[str, Any]:
        """The whole answer."""
        (result,) = results
        chosen = auto_json(result.auto, self._base_name)
        choices = [Choice(self._choice(completion) | chosen) for completion in result.completions]
        model = chosen_model([result.auto], self._base_name)
        told: dict[str, Any] = {}
        if self.body.return_token_ids:
            told["prompt_token_ids"] = list(result.prompt_token_ids)
        if self.body.prompt_logprobs is not None:
            wanted, texts = self.body.prompt_logprobs, self.row_tokenizer.texts
            told["prompt_logprobs"] = prompt_logprobs_json(result.prompt_logprobs, wanted, texts)
        return self.envelope | model | {"choices": choices, "usage": usage(results)} | told

    def chunk_fields(self, news: News) -> dict[str, Any]:
        if not self.body.return_token_ids or self._has_told_prompt:
            return {}
        self._has_told_prompt = True
        return {"prompt_token_ids": list(news.prompt)}

    def chunk_choice(self, news: News) -> dict[str, Any]:
        delta, finish_reason = self._answers.delta(news.index, news.text, news.finish_reason)
        return {
            "index": news.index,
            "delta": delta,
            "logprobs": self._logprobs(news.logprobs),
            "finish_reason": finish_reason,
        } | ({"token_ids": news.token_ids} if self.body.return_token_ids else {})

    def _choice(self, completion: Completion) -> dict[str, Any]:
        message, finish_reason = self._answers.message(completion.text, completion.finish_reason)
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": finish_reason,
            **({"token_ids": list(completion.token_ids)} if self.body.return_token_ids else {}),
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
