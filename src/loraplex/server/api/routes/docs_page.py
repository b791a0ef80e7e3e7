"""/docs: the description of /openapi.json as a page, without scripts and without a request to anywhere else."""

import html
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

router = APIRouter()
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_METHODS = ("get", "post", "put", "patch", "delete")


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> Response:
    """Calls with their fields and answers."""
    schema = http.app.openapi()
    return Response(_page(orjson.dumps(schema)), media_type="text/html; charset=utf-8", headers=_HEADERS)


@cache
def _page(schema: bytes) -> bytes:
    """Made once for each description."""
    return "".join(_parts(orjson.loads(schema))).encode()


def _parts(schema: Mapping[str, Any]) -> Iterator[str]:
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    yield (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/favicon.ico"><link rel="stylesheet" href="/page/docs.css"></head>'
        f'<body><main><h1>{title}</h1><p><a href="/openapi.json">openapi.json</a></p>'
    )
    for path, operations in schema["paths"].items():
        for method in _METHODS:
            if method in operations:
                yield from _operation(method, path, operations[method], schema)
    yield "</main></body></html>"


def _operation(method: str, path: str, operation: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    text = html.escape(operation.get("description", operation.get("summary", "")))
    name = html.escape(f"{method.upper()} {path}")
    yield f"<details><summary><code>{name}</code></summary><p>{text}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None:
        yield from _fields(_resolved(content["schema"], schema))
    yield "<table><tr><th>status</th><th>answer</th></tr>"
    for status, answer in operation["responses"].items():
        yield f"<tr><td>{html.escape(status)}</td><td>{html.escape(answer.get('description', ''))}</td></tr>"
    yield "</table></details>"


def _fields(body: Mapping[str, Any]) -> Iterator[str]:
    required = body.get("required", ())
    yield "<table><tr><th>field</th><th>type</th></tr>"
    for name, kind in body.get("properties", {}).items():
        mark = " (required)" if name in required else ""
        yield f"<tr><td><code>{html.escape(name)}</code>{mark}</td><td>{html.escape(_type(kind))}</td></tr>"
    yield "</table>"


def _type(kind: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in kind:
        return " or ".join(_type(other) for other in kind["anyOf"])
    if "$ref" in kind:
        return str(kind["$ref"]).rpartition("/")[2]
    if "enum" in kind or "const" in kind:
        values = kind.get("enum", [kind.get("const")])
        return " or ".join(orjson.dumps(value).decode() for value in values)
    name = str(kind.get("type", "anything"))
    if name == "array":
        return f"list of {_type(kind.get('items', {}))}"
    bounds = [f"{mark} {kind[key]}" for key, mark in _BOUNDS.items() if key in kind]
    return f"{name} ({', '.join(bounds)})" if bounds else name


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "length ≤"}


def _resolved(kind: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = kind.get("$ref")
    if reference is None:
        return kind
    found: Mapping[str, Any] = schema["components"]["schemas"][str(reference).rpartition("/")[2]]
    return found
