"""/tokenize and /detokenize, as vLLM's."""

import asyncio

from fastapi import APIRouter, Request, Response

from loraplex.server.api_errors import BAD_REQUEST, ApiError
from loraplex.server.chat import as_turns, render
from loraplex.server.json_route import JsonRoute, documented, json_response
from loraplex.server.schemas.other import Detokenize, Tokenize
from loraplex.server.state import ServerState, context_of, state_of

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/tokenize",
    responses=documented("The tokens.", 400, 401, 404, 429, required=("count", "max_model_len", "tokens")),
)
async def tokenize(body: Tokenize, http: Request) -> Response:
    """The token ids of a prompt, or of a chat's messages as the model reads them."""
    state = state_of(http)
    _check_model(body.model, http)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(BAD_REQUEST, "give either prompt or messages.", param="prompt")
    ids = await asyncio.to_thread(_ids, body, state)
    strings = state.model.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": state.engine.max_length, "tokens": ids, "token_strs": strings}
    return json_response(answer)


@router.post("/detokenize", responses=documented("The text.", 400, 401, 404, 429, required=("prompt",)))
async def detokenize(body: Detokenize, http: Request) -> Response:
    """The text of token ids."""
    state = state_of(http)
    _check_model(body.model, http)
    most = state.engine.vocab_size
    wrong = next((token for token in body.tokens if token >= most), None)
    if wrong is not None:
        raise ApiError(BAD_REQUEST, f"the token id {wrong} is none of 0 to {most - 1}.", param="tokens")
    return json_response({"prompt": await asyncio.to_thread(state.model.tokenizer.decode, body.tokens)})


def _check_model(model: str | None, http: Request) -> None:
    if model is not None:  # all share one tokenizer, but a name must not tell whether it exists
        state_of(http).catalog.choice(model, context_of(http).principal)


def _ids(body: Tokenize, state: ServerState) -> list[int]:
    tokenizer = state.model.tokenizer
    if body.messages is None:
        add = True if body.add_special_tokens is None else body.add_special_tokens
        ids: list[int] = tokenizer(body.prompt, add_special_tokens=add)["input_ids"]
        return ids
    text = render(state, as_turns(body.messages), add_generation_prompt=body.add_generation_prompt)
    ids = tokenizer(text, add_special_tokens=bool(body.add_special_tokens))["input_ids"]
    return ids
