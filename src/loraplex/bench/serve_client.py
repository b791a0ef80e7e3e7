"""One client of an OpenAI-compatible server: which models there are, and one streamed request with its times."""

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from loraplex.errors import RemoteError
from loraplex.json_files import parse_json

_SHOWN = 300  # characters of an answer that make it into an error


@dataclass(kw_only=True)
class Outcome:
    """What one request met; times are seconds since the request was due, so waiting for the generator counts."""

    adapter: str
    status: str = "unfinished"  # "ok", an HTTP status, or what went wrong instead of one
    message: str = ""
    lag_s: float = 0.0  # how late the generator began
    held_s: float = 0.0  # waiting for one of `concurrency` places
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    has_usage: bool = False  # whether the server told the counts; else tokens are the stream's pieces

    @property
    def is_ok(self) -> bool:
        return self.status == "ok"

    @property
    def token_s(self) -> float | None:
        """Mean time of each token after the first."""
        if self.first_token_s is None or self.last_token_s is None or self.num_new_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_new_tokens - 1)


class ServeClient:
    """Connections to one server. Use as an async context manager."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float, connections: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # A proxy from the environment would be measured along with the server.
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout_s, trust_env=False)

    async def __aenter__(self) -> "ServeClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def adapters(self) -> list[str]:
        """The names that the server's /v1/models lists, without the base model's unless there is nothing else."""
        address = f"{self._url}/v1/models"
        try:
            response = await self._http.get(address)
        except httpx.HTTPError as error:
            raise RemoteError(f"{address} can't be reached: {error!r}. Start the server, or correct --url.") from error
        if response.status_code != 200:
            raise RemoteError(f"{address} answers {response.status_code}: {response.text[:_SHOWN]}")
        try:
            models = response.json()["data"]
            names = [model["id"] for model in models]
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"{address} answers no list of models: {response.text[:_SHOWN]}") from error
        # vLLM and loraplex name the base model as the parent of everything that stands on it.
        on_base = [model["id"] for model in models if model.get("parent")]
        if not names:
            raise RemoteError(f"{address} lists no models. Name adapters with --adapters.")
        return on_base or names

    async def stream(self, body: Mapping[str, Any], outcome: Outcome, due: float) -> None:
        """Send a request and read its answer; whatever happens is noted in the outcome."""
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        content = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream("POST", self._url + path, json=content) as response:
                if response.status_code == 200:
                    await _read_stream(response.aiter_lines(), outcome, due)
                else:
                    text = (await response.aread()).decode(errors="replace")
                    outcome.status, outcome.message = str(response.status_code), text[:_SHOWN]
        except httpx.TimeoutException as error:
            outcome.status, outcome.message = "timeout", repr(error)
        except httpx.HTTPError as error:
            outcome.status, outcome.message = "connection", repr(error)
        outcome.end_s = time.perf_counter() - due


async def _read_stream(lines: AsyncIterator[str], outcome: Outcome, due: float) -> None:
    """Server-sent events up to `[DONE]`; an answer is whole if a choice told why it ended."""
    is_whole, num_pieces = False, 0
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            break
        try:
            chunk = parse_json(data)
        except ValueError:
            outcome.status, outcome.message = "bad_stream", data[:_SHOWN]
            return
        if "error" in chunk:
            outcome.status, outcome.message = "stream_error", str(chunk["error"])[:_SHOWN]
            return
        usage = chunk.get("usage")
        if usage:
            outcome.num_prompt_tokens = usage.get("prompt_tokens", 0)
            outcome.num_new_tokens = usage.get("completion_tokens", 0)
            outcome.has_usage = True
        for choice in chunk.get("choices") or ():
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                num_pieces += 1
                outcome.last_token_s = time.perf_counter() - due
                if outcome.first_token_s is None:
                    outcome.first_token_s = outcome.last_token_s
            is_whole |= choice.get("finish_reason") is not None
    if not outcome.has_usage:
        outcome.num_new_tokens = num_pieces
    outcome.status = "ok" if is_whole else "cut_off"
