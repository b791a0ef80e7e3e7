"""The parts that answers of both APIs have: ids, usage, what extensions add."""

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from loraplex.engine.request import Completion, Delta, RequestResult, TokenScalings
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.event_stream import sse, sse_pieces
from loraplex.server.api.extensions import extras
from loraplex.server.api.json_pieces import Encoding
from loraplex.server.api.token_texts import TokenTexts
from loraplex.server.handlers import Run

InThread = Callable[[Callable[[], list[bytes]]], Awaitable[list[bytes]]]
_MAX_SMALL_ANSWER_TOKENS = 32


@dataclass
class News:
    """What came for one answer since its last chunk."""

    place: int  # of the request among those of the HTTP request
    index: int  # of the answer among the request's
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scalings: list[TokenScalings] = field(default_factory=list)
    finish_reason: str | None = None
    completion: Completion | None = None  # with its last

    @property
    def is_large(self) -> bool:
        """Whether writing it would hold up the event loop."""
        return self.completion is not None or len(self.logprobs) + len(self.scalings) > _MAX_SMALL_ANSWER_TOKENS

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.scalings += delta.scalings
        self.finish_reason = delta.finish_reason or self.finish_reason


class Format(Protocol):
    """How one of the APIs writes an answer."""

    envelope: dict[str, Any]
    n: int

    def chunk_choice(self, news: News) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The extensions that a request asked for."""

    scalings: bool
    capture: bool
    encoding: Encoding

    @property
    def any(self) -> bool:
        return self.scalings or self.capture

    def of(self, completion: Completion, texts: TokenTexts) -> dict[str, Any]:
        return extras(completion, texts, self.encoding) if self.any else {}

    def live(self, news: News, texts: TokenTexts) -> dict[str, Any]:
        """Each new token with its mean scalings [mixtures][experts]."""
        if not self.scalings or not news.token_ids:
            return {}
        tokens = texts.of_all(news.token_ids)
        return {"token_scalings": {"tokens": tokens, "values": news.scalings}}


async def stream_chunks(
    run: Run, form: Format, wanted: Extras, texts: TokenTexts, *, include_usage: bool, in_thread: InThread
) -> AsyncGenerator[bytes, None]:
    """The answer's chunks: for each answer that has news one, then what extensions add, then the usage."""
    results: list[RequestResult] = []
    nothing: dict[str, Any] = {"usage": None} if include_usage else {}

    def chunk(news: News) -> list[bytes]:
        choice = form.chunk_choice(news) | wanted.live(news, texts)
        if news.completion is not None:
            choice |= wanted.of(news.completion, texts)
        return sse_pieces(form.envelope | {"choices": [choice]} | nothing)

    async for events in run.batches():
        found, failure = gather(events, run, holds_end=wanted.any)
        for news in found:
            for piece in await in_thread(partial(chunk, news)) if news.is_large else chunk(news):
                yield piece
        if failure is not None:  # what came before it has been told
            raise failure
        results += [event for event in events if isinstance(event, RequestResult)]
    if include_usage:
        yield sse(form.envelope | {"choices": [], "usage": usage(results)})


def gather(events: Sequence[Delta | RequestResult], run: Run, *, holds_end: bool) -> tuple[list[News], ApiError | None]:
    """One News for each answer, up to the first failure.

    With `holds_end` an answer's finish_reason comes with what extensions add.
    """
    found: dict[tuple[int, int], News] = {}
    last: list[News] = []
    for event in events:
        place = run.places[event.request_id]
        if isinstance(event, Delta):
            try:
                run.check(event)
            except ApiError as error:
                return list(found.values()), error
            news = found.setdefault((place, event.index), News(place, event.index))
            news.add(event)
            if holds_end:
                news.finish_reason = None
        elif holds_end:
            last += [
                News(place, completion.index, finish_reason=completion.finish_reason, completion=completion)
                for completion in event.completions
            ]
    return [*found.values(), *last], None


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(results: Sequence[RequestResult], *, num_dropped: int = 0) -> dict[str, Any]:
    """Tokens of prompts and answers."""
    num_prompt = sum(len(result.prompt_token_ids) for result in results)
    num_new = sum(len(completion.token_ids) for result in results for completion in result.completions) - num_dropped
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(result.num_cached_tokens for result in results)},
    }


def top_texts(logprobs: TokenLogprobs, text: Callable[[int], str]) -> dict[str, float]:
    """The likeliest tokens by their texts, the chosen one among them; of equal texts the likelier counts."""
    found = {text(logprobs.token_id): logprobs.logprob}
    for token, value in logprobs.top:
        found[text(token)] = max(value, found.get(text(token), value))
    return found
