"""/tokenize and /detokenize, as vLLM's."""

from functools import partial
from typing import Annotated, ClassVar

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field

from loraplex.errors import LoraplexError
from loraplex.routing.adapter_spec import AdapterSpec, is_auto, parse_adapter_spec
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.bodies import TemplateVariables, TokenIds
from loraplex.server.api.body import NullableBody
from loraplex.server.api.engine_requests import encode_text
from loraplex.server.api.json_route import JsonRoute, documented
from loraplex.server.api.messages import Message, as_turns
from loraplex.server.api.refused_fields import NEUTRAL
from loraplex.server.api.tools.definitions import ToolList
from loraplex.server.api.tools.use import ToolUse
from loraplex.server.state import RequestContext, RowTokenizer, ServerState, context_of, in_thread, state_of

router = APIRouter(route_class=JsonRoute)


class Tokenize(NullableBody):
    """vLLM's body: a prompt, or the messages of a chat."""

    neutral: ClassVar = {name: NEUTRAL[name] for name in ("continue_final_message", "mm_processor_kwargs")}

    model: str | None = Field(None, max_length=8192)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: ToolList | None = None  # of a chat
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None


class Detokenize(NullableBody):
    model: str | None = Field(None, max_length=8192)
    tokens: TokenIds


@router.post(
    "/tokenize",
    responses=documented("The tokens.", 400, 401, 404, 429, required=("count", "max_model_len", "tokens")),
)
async def tokenize(body: Tokenize, http: Request) -> Response:
    """The token ids of a prompt, or of a chat's messages as the model reads them."""
    state = state_of(http)
    adapters = _adapters(body.model, http)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(BAD_REQUEST, "give either prompt or messages.", param="prompt")
    content = await in_thread(http, partial(_tokenized, body, adapters, state, context_of(http)))
    return Response(content, media_type="application/json")


@router.post("/detokenize", responses=documented("The text.", 400, 401, 404, 429, required=("prompt",)))
async def detokenize(body: Detokenize, http: Request) -> Response:
    """The text of token ids."""
    state = state_of(http)
    adapters = _adapters(body.model, http)
    work = partial(_detokenized, body.tokens, adapters, state, context_of(http))
    return Response(await in_thread(http, work), media_type="application/json")


def _adapters(model: str | None, http: Request) -> AdapterSpec:
    """What the model's name stands for, if the client may know it."""
    choice = None if model is None else state_of(http).catalog.choice(model, context_of(http).principal)
    return None if is_auto(choice) else choice  # prompts of `auto` are read with the base model's tokens


def _row_tokenizer(adapters: AdapterSpec, state: ServerState, context: RequestContext) -> RowTokenizer:
    try:
        return state.row_tokenizer(adapters)
    except LoraplexError as error:
        raise context.refusal(error) from error


def _tokenized(body: Tokenize, adapters: AdapterSpec, state: ServerState, context: RequestContext) -> bytes:
    own, most = _row_tokenizer(adapters, state, context), state.config.limits.max_body_values
    tokenizer = own.tokenizer
    if body.messages is not None:
        if any(isinstance(message.content, list) for message in body.messages):
            raise ApiError(BAD_REQUEST, "the tokens of images aren't counted here. Leave them out.", param="messages")
        tool_use = ToolUse.of([tool.function for tool in body.tools or ()], None, parallel=None)
        turns, tools = tool_use.prepared(as_turns(body.messages), own.tools)
        ids = own.chats.encode(
            turns,
            tools=tools,
            most=most,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
            variables=body.chat_template_kwargs or {},
        ).ids
    else:
        assert body.prompt is not None, "there are either messages or a prompt"
        add = True if body.add_special_tokens is None else body.add_special_tokens
        ids = encode_text(tokenizer, body.prompt, add_special_tokens=add, most=most).ids
    strings = tokenizer.convert_ids_to_tokens(list(ids)) if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": state.engine.max_length, "tokens": ids, "token_strs": strings}
    return orjson.dumps(answer)


def _detokenized(tokens: list[int], adapters: AdapterSpec, state: ServerState, context: RequestContext) -> bytes:
    own = _row_tokenizer(adapters, state, context)
    vocabulary = state.model.registry.vocabulary(parse_adapter_spec(adapters))
    most = state.engine.vocab_size if vocabulary is None else vocabulary.num_tokens
    largest = max(tokens, default=0)
    if largest >= most:
        raise ApiError(BAD_REQUEST, f"the token id {largest} is none of 0 to {most - 1}.", param="tokens")
    return orjson.dumps({"prompt": own.tokenizer.decode(tokens)})
