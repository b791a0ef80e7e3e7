"""vLLM's calls for loading and unloading, with its bodies and statuses."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from loraplex.server.adapter_admin import AdapterLibrary
from loraplex.server.api.api_errors import BAD_REQUEST, NOT_FOUND, ApiError
from loraplex.server.api.body import Body
from loraplex.server.api.json_route import JsonRoute, documented
from loraplex.server.state import state_of

router = APIRouter(route_class=JsonRoute)
_ERRORS = (400, 401, 403, 404, 409, 429)


class VllmLoadAdapter(Body):
    """vLLM's body."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"base_model_name": (None,), "is_3d_lora_weight": (None, False)}

    lora_name: str = Field(max_length=128)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class VllmUnloadAdapter(Body):
    """vLLM's body; its number has no meaning here."""

    lora_name: str = Field(max_length=128)
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", responses=documented("Loaded.", *_ERRORS, media="text/plain"))
async def load_lora_adapter(body: VllmLoadAdapter, http: Request) -> Response:
    """As vLLM's: an adapter that is loaded already is a 400, unless load_inplace."""
    if not body.lora_name or not body.lora_path:
        raise ApiError(BAD_REQUEST, "Both 'lora_name' and 'lora_path' must be provided.")
    library = AdapterLibrary(http)
    try:
        library.check_load(body.lora_name)
        if body.load_inplace and library.is_loaded(body.lora_name):
            await library.replace(body.lora_name, body.lora_path)
        else:
            await library.load(body.lora_name, body.lora_path)
    except ApiError as error:
        if error.status.code != "adapter_exists":
            raise
        raise ApiError(BAD_REQUEST, _taken(body.lora_name, http), param="lora_name") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=documented("Unloaded.", *_ERRORS, media="text/plain"))
async def unload_lora_adapter(body: VllmUnloadAdapter, http: Request) -> Response:
    """As vLLM's."""
    if not body.lora_name:
        raise ApiError(BAD_REQUEST, "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    library = AdapterLibrary(http)
    library.check_load(body.lora_name)
    if not library.is_loaded(body.lora_name):
        raise ApiError(NOT_FOUND, f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name")
    await library.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _taken(name: str, http: Request) -> str:
    if name == state_of(http).catalog.base_name:
        return f"The lora adapter '{name}' conflicts with a served base model."
    return (
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )
