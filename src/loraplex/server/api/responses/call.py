"""One call of /v1/responses: from its body to a request, and from what comes to the response and its events."""

import secrets
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import orjson

from loraplex.engine.request import RequestResult
from loraplex.errors import RequestError
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import GenerationBody
from loraplex.server.api.chat_images import images_of
from loraplex.server.api.engine_requests import allowed_tokens, engine_request, sampling_params
from loraplex.server.api.messages import as_turns
from loraplex.server.api.response_parts import chosen_model, obfuscation, usage
from loraplex.server.api.responses.bodies import ResponsesBody, ResponseToolChoice
from loraplex.server.api.responses.items import Event, OutputItems
from loraplex.server.api.responses.turns import response_messages
from loraplex.server.api.tools.definitions import FunctionChoice, FunctionDefinition, NamedToolChoice
from loraplex.server.api.tools.events import ContentPiece, ToolEvent
from loraplex.server.api.tools.use import ToolUse
from loraplex.server.state import RequestContext, ServerState


class ResponsesCall:
    """Checked, and its items tokenized, when it is made; that is work for a thread."""

    def __init__(self, body: ResponsesBody, state: ServerState, context: RequestContext, adapters: AdapterSpec) -> None:
        tokenizer = state.row_tokenizer(adapters)
        config, principal = state.config, context.principal
        self._body = body
        self._base_name = state.catalog.base_name
        self.use = _tool_use(body)
        self._recent, self._owner = state.recent_items, context.owner
        messages = response_messages(body, partial(self._recent.find, self._owner))
        most = config.engine.max_images
        images = images_of(messages, state.model.base.config, most, param="input", numbered=False)
        try:
            turns, tools = self.use.prepared(as_turns(messages), tokenizer.tools)
        except RequestError as error:
            raise ApiError(BAD_REQUEST, str(error), param="input", quotes_request=True) from error
        self.turns = turns
        most = allowed_tokens(principal, config.limits)
        generation = _generation_body(body)
        sampling = sampling_params(
            generation,
            principal,
            config.limits,
            state.sampling_defaults,
            max_tokens=body.max_output_tokens or most,
            logprobs=None,
        )
        sampling = self.use.sampling(sampling, tokenizer.tools)
        encoded = tokenizer.chats.encode(turns, tools=tools, most=state.engine.max_length - 1)
        self.request = engine_request(
            generation, encoded, sampling, adapters=adapters, principal=principal, config=config, images=images
        )
        self._sampling = sampling
        self._obfuscates = bool(body.stream_options and body.stream_options.include_obfuscation)
        self._parser = self.use.parser(tokenizer.tools)
        self._items = OutputItems(tokenizer.tools)
        self._numbers = count()
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
        }

    @property
    def id(self) -> str:
        """The response's."""
        return str(self._head["id"])

    def begin(self) -> Iterator[bytes]:
        """The events before anything was generated."""
        for kind in ("response.created", "response.in_progress"):
            yield self._sse({"type": kind, "response": self.response("in_progress")})

    def add(self, text: str) -> Iterator[bytes]:
        """The events of more of the answer's text."""
        yield from map(self._sse, self._items.add(self._events(text)))

    def end(self, result: RequestResult) -> Iterator[bytes]:
        """The events of the answer's end."""
        status = self._finish(result)
        yield from map(self._sse, self._last)
        yield self._sse({"type": f"response.{status}", "response": self.response(status, result)})

    def fail(self, error: ApiError) -> Iterator[bytes]:
        """The events of an answer that failed after it had begun."""
        told = {"code": error.status.code, "message": error.message, "param": error.param}
        yield self._sse({"type": "error", **told})
        failure = {"code": "server_error", "message": error.message}
        yield self._sse({"type": "response.failed", "response": self.response("failed") | {"error": failure}})

    def answer(self, result: RequestResult) -> dict[str, Any]:
        """The whole response."""
        self._items.add(self._events(result.text))
        return self.response(self._finish(result), result)

    def response(self, status: str, result: RequestResult | None = None) -> dict[str, Any]:
        """The response as it is now."""
        body = self._body
        model = {} if result is None else chosen_model([result.auto], self._base_name)
        return (
            self._head
            | model
            | {
                "status": status,
                "error": None,
                "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
                "instructions": body.instructions,
                "metadata": body.metadata or {},
                "output": self._items.items,
                "parallel_tool_calls": body.parallel_tool_calls is not False,
                "temperature": self._sampling.temperature,
                "top_p": self._sampling.top_p,
                "tools": [tool.model_dump() for tool in body.tools or ()],
                "tool_choice": _dumped(body.tool_choice) or "auto",
                "text": {"format": _dumped(body.text and body.text.format) or {"type": "text"}},
                "max_output_tokens": body.max_output_tokens,
                "previous_response_id": None,
                "background": False,
                "truncation": "disabled",
                "reasoning": {"effort": None, "summary": None},
                "store": False,
                "user": body.user,
                "usage": None if result is None else _usage(result),
            }
        )

    def _events(self, text: str) -> list[ToolEvent]:
        if self._parser is not None:
            return self._parser.feed(text)
        return [ContentPiece(text)] if text else []

    def _finish(self, result: RequestResult) -> str:
        """The status; the last events are kept."""
        status = "incomplete" if result.finish_reason == "length" else "completed"
        last = [] if self._parser is None else self._items.add(self._parser.end())
        self._last: list[Event] = [*last, *self._items.end(is_complete=status == "completed")]
        if self._body.store is not False:
            self._recent.keep(self._owner, self._items.items)
        return status

    def _sse(self, event: Event) -> bytes:
        kind = event["type"].encode()
        if self._obfuscates and kind.endswith(b".delta"):
            event["obfuscation"] = obfuscation(event["delta"])
        return (
            b"event: " + kind + b"\ndata: " + orjson.dumps(event | {"sequence_number": next(self._numbers)}) + b"\n\n"
        )


def _tool_use(body: ResponsesBody) -> ToolUse:
    fields = ("name", "description", "parameters", "strict")
    functions = [FunctionDefinition(**{name: getattr(tool, name) for name in fields}) for tool in body.tools or ()]
    choice = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        choice = NamedToolChoice(type="function", function=FunctionChoice(name=choice.name))
    return ToolUse.of(functions, choice, parallel=body.parallel_tool_calls)


def _generation_body(body: ResponsesBody) -> GenerationBody:
    """The options that both APIs have."""
    text = body.text.format if body.text is not None else None
    fields = {name: getattr(body, name) for name in ("model", "temperature", "top_p", "seed", "priority", "cache_salt")}
    form = None if text is None else text.as_response_format()
    return GenerationBody.model_validate(fields | {"response_format": form})


def _dumped(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_none=True) if hasattr(value, "model_dump") else value


def _usage(result: RequestResult) -> dict[str, Any]:
    told = usage([result])
    return {
        "input_tokens": told["prompt_tokens"],
        "input_tokens_details": told["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": told["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": told["total_tokens"],
    }
