"""/v1/models: what a key may name as `model`."""

from typing import Any

from fastapi import APIRouter, Request, Response

from loraplex.adapters.names import AUTO
from loraplex.routing.adapter_spec import is_auto
from loraplex.server.api.engine_requests import allowed_tokens
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.auth.access import Entry, Principal, adapter_names
from loraplex.server.state import ServerState, context_of, state_of

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/models", responses=documented("The models.", 401, 429, required=("object", "data")))
async def models(http: Request) -> Response:
    """The base model, adapters, mixtures and residuals that this key may use; links are made of their names."""
    state, principal = state_of(http), context_of(http).principal
    base = [Entry(name=state.catalog.base_name, kind="base")] if principal.may_use_base else []
    entries = [*base, *_auto(state, principal), *state.catalog.visible(principal)]
    return json_response({"object": "list", "data": [_as_json(entry, state, principal) for entry in entries]})


@router.get("/v1/models/{name:path}", responses=documented("The model.", 400, 401, 404, 429, required=("id",)))
async def model(name: str, http: Request) -> Response:
    """One of them, or a link of them."""
    state, principal = state_of(http), context_of(http).principal
    own = _auto(state, principal) if is_auto(name) else []
    if is_auto(name) or state.catalog.entry(name) is not None:
        return json_response(_as_json(own[0] if own else state.catalog.find(name, principal), state, principal))
    link = state.catalog.choice(name, principal)
    entry = Entry(name=name, kind="base") if link is None else Entry(name=name, kind="link", parts=adapter_names(link))
    return json_response(_as_json(entry, state, principal))


def _auto(state: ServerState, principal: Principal) -> list[Entry]:
    """The entry of `auto`, where there is something to choose from."""
    return [Entry(name=AUTO, kind="auto")] if state.catalog.offers_auto(principal) else []


def _as_json(entry: Entry, state: ServerState, principal: Principal) -> dict[str, Any]:
    base = state.catalog.base_name
    most = min(allowed_tokens(principal, state.config.limits), state.engine.max_length - 1)
    return {
        "id": entry.name,
        "object": "model",
        "created": state.started,
        "owned_by": "loraplex",
        "root": entry.name,
        "parent": None if entry.kind == "base" else base,
        "max_model_len": state.engine.max_length,
        "max_new_tokens": most,  # more max_tokens are as many
        "default_sampling": dict(state.sampling_defaults),
        "kind": entry.kind,
        "experts": list(entry.experts),
    } | ({"adapters": list(entry.parts)} if entry.kind == "link" else {})
