"""The page at /, its files, and the load that it shows."""

import hashlib
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from loraplex.server.api.api_errors import NOT_FOUND, ApiError
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.state import context_of, state_of

router = APIRouter(route_class=JsonRoute)

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_FOLDERS = ("", "vendor/")  # of others' files, with their licences
# Only its own files; no script or style in the text of a page; no frames, no forms that go elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked every time, and answered by the ETag
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """All files by their names, read once: no path that a client sends is ever opened."""
    found = {}
    for folder in _FOLDERS:
        for file in files("loraplex.server").joinpath(f"page/{folder}").iterdir():
            suffix = file.name[file.name.rfind(".") :]
            if suffix in _TYPES:
                content = file.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[folder + file.name] = PageFile(content, _TYPES[suffix], etag)
    return found


@router.get("/", include_in_schema=False)
async def page(http: Request) -> Response:
    """The page."""
    return _sent("index.html", http)


@router.get("/page/{name:path}", include_in_schema=False)
async def page_file(name: str, http: Request) -> Response:
    """What the page is made of."""
    return _sent(name, http)


@router.get("/favicon.ico", include_in_schema=False)
async def icon(http: Request) -> Response:
    """The page's icon."""
    return _sent("icon.svg", http)


@router.get(
    "/v1/stats",
    responses=documented("The engine's load.", 401, 403, 429, required=("time_s", "running", "waiting", "new_tokens")),
)
async def stats(http: Request) -> Response:
    """What runs and waits, and counts since the start; `time_s` is a clock to take differences by."""
    state = state_of(http)
    if not state.config.access.open_metrics:
        context_of(http).principal.check_manage()
    now = state.engine.stats()
    load = {
        "time_s": time.monotonic(),
        "running": now.num_running,
        "waiting": now.num_waiting,
        "cache_blocks": now.num_blocks,
        "cache_blocks_held": now.num_blocks_held,
        "prompt_tokens": now.counts.num_prompt_tokens,
        "new_tokens": now.counts.num_new_tokens,
        "drafts": now.counts.num_drafted,
        "drafts_accepted": now.counts.num_accepted,
        "preemptions": now.num_preempted,
    }
    return json_response(load)


def _sent(name: str, http: Request) -> Response:
    file = page_files().get(name)
    if file is None:
        raise ApiError(NOT_FOUND, f"there is no /page/{name[:100]}.")
    headers = _HEADERS | {"etag": file.etag}
    if http.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
