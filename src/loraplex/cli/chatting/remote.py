"""A server with OpenAI's API, loraplex's or another. By the standard library: the base install has no HTTP client."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from loraplex.cli.chatting.turns import BASE, AnswerPiece, Turn
from loraplex.errors import RemoteError
from loraplex.json_files import lines_of, parse_json

_SHOWN = 500  # characters of an answer that isn't what it should be
_WAIT_S = 600.0  # without a token: a request may wait for its turn
_MAX_BYTES = 16 << 20  # of a list of models
_MAX_ERROR_BYTES = 1 << 16


class _NoRedirects(HTTPRedirectHandler):
    """The key is for the server that was named."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class RemoteChat:
    """Answers of a server; adapters are what it calls models."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        """Raises RemoteError where the server can't be reached or lists no models."""
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise RemoteError(f"--url is {url!r}; it must begin with http:// or https://.")
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._opener = build_opener(_NoRedirects())
        models = self._models()
        base = [entry["id"] for entry in models if entry.get("parent") is None and entry.get("kind") in (None, "base")]
        self._base = model or next(iter(base), None)  # None: this key may not use it
        self.title = f"{self._base or 'a server'} at {self._url}"

    def answer(self, turn: Turn) -> Iterator[AnswerPiece]:
        name = self._base if turn.adapters == BASE else turn.adapters
        if name is None:
            raise RemoteError(f"the base model of {self._url} may not be used. Name adapters: {_listed(self.names())}.")
        body = {"model": name, "messages": [*turn.messages], **turn.options}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._request("/v1/chat/completions", body) as response:
            yield from _pieces(response, self._base)

    def names(self) -> Sequence[str]:
        return [str(entry["id"]) for entry in self._models() if entry["id"] != self._base]

    def load(self, name: str, folder: str) -> None:
        with self._request("/v1/adapters", {"name": name, "path": folder}) as response:
            response.read(_MAX_BYTES)

    def close(self) -> None:
        """Nothing is open between requests."""

    def _models(self) -> list[dict[str, Any]]:
        with self._request("/v1/models") as response:
            text = response.read(_MAX_BYTES).decode(errors="replace")
        try:
            models = parse_json(text)["data"]
            if not all(isinstance(entry["id"], str) for entry in models):
                raise TypeError("a name is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"{self._url}/v1/models answers no list of models: {text[:_SHOWN]}") from error
        return list(models)

    @contextmanager
    def _request(self, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        """A response that is well; leaving the block closes its connection. Raises RemoteError."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(self._url + path, data=data, headers=self._headers)
            with self._opener.open(request, timeout=_WAIT_S) as response:
                yield response
        except HTTPError as error:
            raise RemoteError(f"{self._url}{path} answers {error.code}: {_reason(error)}") from None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no address
            self._unreachable(error)

    def _unreachable(self, error: Exception) -> NoReturn:
        why = getattr(error, "reason", None) or error or type(error).__name__
        raise RemoteError(f"{self._url} can't be reached: {why}. Check --url.") from error


def _pieces(response: HTTPResponse, base: str | None) -> Iterator[AnswerPiece]:
    """Server-sent events up to `[DONE]`. Raises RemoteError."""
    finish_reason, num_tokens, chosen = None, None, None
    for _, line in lines_of(response):
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
                yield AnswerPiece(text=(choice.get("delta") or {}).get("content") or "", chosen=chosen)
        except (ValueError, AttributeError, TypeError) as error:
            raise RemoteError(f"the server's stream can't be read: {data[:_SHOWN]}") from error
    if finish_reason is None:
        raise RemoteError("the server's answer was cut off.")
    yield AnswerPiece(num_tokens=num_tokens, finish_reason=finish_reason, chosen=chosen)


def _reason(error: HTTPError) -> str:
    """What a refusal says, in the forms of OpenAI and FastAPI."""
    text = error.read(_MAX_ERROR_BYTES).decode(errors="replace")
    try:
        body = parse_json(text)
        return _message(body.get("error") or body.get("detail") or body)
    except (ValueError, AttributeError):
        return text[:_SHOWN]


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:_SHOWN]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "there are none"
