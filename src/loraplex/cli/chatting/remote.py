"""A server with OpenAI's API: loraplex's, or another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from loraplex.cli.chatting.turns import BASE, Piece, Turn
from loraplex.errors import RemoteError
from loraplex.json_files import parse_json

_SHOWN = 500  # characters of an answer that isn't what it should be
_CONNECT_S = 10.0
_READ_S = 600.0  # without a token: a request may wait for its turn
_MAX_ERROR_BYTES = 1 << 16


class RemoteChat:
    """Answers of a server; adapters are what it calls models."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        """Raises RemoteError where the server can't be reached or lists no models."""
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S))
        models = self._models()
        base = [entry["id"] for entry in models if entry.get("parent") is None and entry.get("kind") in (None, "base")]
        self._base = model or next(iter(base), None)  # None: this key may not use it
        self.title = f"{self._base or 'a server'} at {self._url}"

    def answer(self, turn: Turn) -> Iterator[Piece]:
        name = self._base if turn.adapters == BASE else turn.adapters
        if name is None:
            raise RemoteError(f"the base model of {self._url} may not be used. Name adapters: {_listed(self.names())}.")
        body = {"model": name, "messages": [*turn.messages], **turn.options}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._request("POST", "/v1/chat/completions", json=body) as response:
            yield from _pieces(response, self._base)

    def names(self) -> Sequence[str]:
        return [str(entry["id"]) for entry in self._models() if entry["id"] != self._base]

    def load(self, name: str, folder: str) -> None:
        with self._request("POST", "/v1/adapters", json={"name": name, "path": folder}) as response:
            response.read()

    def close(self) -> None:
        self._http.close()

    def _models(self) -> list[dict[str, Any]]:
        with self._request("GET", "/v1/models") as response:
            text = response.read().decode(errors="replace")
        try:
            models = parse_json(text)["data"]
            if not all(isinstance(entry["id"], str) for entry in models):
                raise TypeError("a name is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"{self._url}/v1/models answers no list of models: {text[:_SHOWN]}") from error
        return list(models)

    @contextmanager
    def _request(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        """A response that is well. Raises RemoteError."""
        try:
            with self._http.stream(method, self._url + path, **content) as response:
                if response.status_code != 200:
                    raise RemoteError(f"{self._url}{path} answers {response.status_code}: {_reason(response)}")
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"{self._url} can't be reached: {error or type(error).__name__}. Check --url.") from error


def _pieces(response: httpx.Response, base: str | None) -> Iterator[Piece]:
    """Server-sent events up to `[DONE]`. Raises RemoteError."""
    finish_reason, num_tokens, chosen = None, None, None
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data:
            continue
        if data == "[DONE]":
            break
        try:
            chunk = parse_json(data)
            if chunk.get("error"):
                raise RemoteError(f"the server ended the answer: {_message(chunk['error'])}")
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
            for choice in chunk.get("choices") or ():
                auto = (choice.get("auto") or {}).get("model")
                chosen = (BASE if auto == base else auto) or chosen
                finish_reason = choice.get("finish_reason") or finish_reason
                yield Piece(text=(choice.get("delta") or {}).get("content") or "", chosen=chosen)
        except (ValueError, AttributeError, TypeError) as error:
            raise RemoteError(f"the server's stream can't be read: {data[:_SHOWN]}") from error
    if finish_reason is None:
        raise RemoteError("the server's answer was cut off.")
    yield Piece(num_tokens=num_tokens, finish_reason=finish_reason, chosen=chosen)


def _reason(response: httpx.Response) -> str:
    """What a refusal says, in the forms of OpenAI and FastAPI."""
    content = b""
    for part in response.iter_bytes():
        content += part
        if len(content) > _MAX_ERROR_BYTES:
            break
    text = content[:_MAX_ERROR_BYTES].decode(errors="replace")
    try:
        body = parse_json(text)
        return _message(body.get("error") or body.get("detail") or body)
    except (ValueError, AttributeError):
        return text[:_SHOWN]


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:_SHOWN]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "there are none"
