"""/v1/adapters: what is loaded, and loading, replacing, pinning and unloading it."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from loraplex.server.adapter_admin import AdapterLibrary
from loraplex.server.api.body import Body
from loraplex.server.api.json_route import JsonRoute, documented, json_response

router = APIRouter(route_class=JsonRoute)
_STATE = ("name", "kind")

Name = Annotated[str, Field(min_length=1, max_length=128)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadAdapter(Body):
    """Load what is in a folder below the adapter roots."""

    name: Name
    path: PathText
    kind: Literal["adapter", "mixture", "residual"] | None = None  # None: what the folder holds
    # In the head's order, the folder of each; null: loaded already.
    experts: dict[Name, PathText | None] | None = Field(None, max_length=64)
    pinned: bool = False


class ReplaceAdapter(Body):
    """Load another version under the same name."""

    path: PathText


class ChangeAdapter(Body):
    pinned: bool


def _library(http: Request) -> AdapterLibrary:
    return AdapterLibrary(http)


@router.get("/v1/adapters", responses=documented("What is loaded.", 401, 429, required=("object", "data", "may_load")))
async def list_adapters(http: Request) -> Response:
    """Adapters, mixtures and residuals with their state, as far as this key may use them; whether it may load more."""
    library = _library(http)
    data: list[dict[str, Any]] = library.states()
    return json_response({"object": "list", "data": data, "may_load": library.may_load})


@router.post("/v1/adapters", responses=documented("Loaded.", 400, 401, 403, 404, 409, 429, required=_STATE))
async def load_adapter(body: LoadAdapter, http: Request) -> Response:
    """Load an adapter, a mixture or a residual from a folder."""
    library = _library(http)
    await library.load(body.name, body.path, kind=body.kind, experts=body.experts)
    if body.pinned:
        await library.pin(body.name, pinned=True)
    return json_response(library.state(body.name))


@router.get("/v1/adapters/{name:path}", responses=documented("Its state.", 400, 401, 404, 429, required=_STATE))
async def adapter(name: str, http: Request) -> Response:
    """One of them."""
    return json_response(_library(http).state(name))


@router.put(
    "/v1/adapters/{name:path}", responses=documented("Replaced.", 400, 401, 403, 404, 409, 429, required=_STATE)
)
async def replace_adapter(name: str, body: ReplaceAdapter, http: Request) -> Response:
    """Load a new version; requests that run keep the one that they began with."""
    library = _library(http)
    await library.replace(name, body.path)
    return json_response(library.state(name))


@router.patch(
    "/v1/adapters/{name:path}", responses=documented("Changed.", 400, 401, 403, 404, 409, 429, required=_STATE)
)
async def change_adapter(name: str, body: ChangeAdapter, http: Request) -> Response:
    """Pin it in its slot, or no longer; of a mixture, all experts."""
    library = _library(http)
    await library.pin(name, pinned=body.pinned)
    return json_response(library.state(name))


@router.delete(
    "/v1/adapters/{name:path}",
    responses=documented("Unloaded.", 400, 401, 403, 404, 409, 429, required=("name", "deleted")),
)
async def unload_adapter(name: str, http: Request) -> Response:
    """Forget it; requests that run with it finish."""
    await _library(http).unload(name)
    return json_response({"name": name, "deleted": True})
