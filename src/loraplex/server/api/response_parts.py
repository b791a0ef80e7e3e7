"""The parts that answers of both APIs have: ids, usage, what extensions add."""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loraplex.engine.request import Completion, Delta, RequestResult, TokenScalings
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.models.auto.selection import AutoChoice
from loraplex.residual.capture import AttentionCapture
from loraplex.server.api.bodies import GenerationBody
from loraplex.server.api.streaming import Encoding, Numbers
from loraplex.server.state import TokenTexts
from loraplex.xlora.scalings.row_scalings import RowScalings

_MAX_SMALL_ANSWER_TOKENS = 32


@dataclass
class News:
    """What came for one answer since its last chunk."""

    place: int  # of the request among those of the HTTP request
    index: int  # of the answer among the request's
    prompt: Sequence[int] = ()  # the request's, with its images' tokens
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scalings: list[TokenScalings] = field(default_factory=list)
    finish_reason: str | None = None
    completion: Completion | None = None  # with its last
    auto: AutoChoice | None = None

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
        self.auto = delta.auto or self.auto


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The extensions that a request asked for."""

    scalings: bool
    capture: bool
    encoding: Encoding

    @classmethod
    def of_body(cls, body: GenerationBody) -> "Extras":
        capture = body.capture_attention
        return cls(
            scalings=bool(body.return_scalings),
            capture=capture is not None,
            encoding="base64" if capture is None else capture.encoding,
        )

    @property
    def any(self) -> bool:
        return self.scalings or self.capture

    def of(self, completion: Completion, texts: TokenTexts) -> dict[str, Any]:
        """The fields of a choice that the body asked for."""
        fields: dict[str, Any] = {}
        if completion.scalings is not None:
            fields["scalings"] = [scalings_json(row, texts, self.encoding) for row in completion.scalings]
        if completion.capture is not None:
            fields["captured_attention"] = capture_json(completion.capture, self.encoding)
        return fields

    def live(self, news: News, texts: TokenTexts) -> dict[str, Any]:
        """Each new token with its mean scalings [mixtures][experts]."""
        if not self.scalings or not news.token_ids:
            return {}
        tokens = texts.of_all(news.token_ids)
        return {"token_scalings": {"tokens": tokens, "values": news.scalings}}


def scalings_json(row: RowScalings, texts: TokenTexts, encoding: Encoding) -> dict[str, Any]:
    """A mixture's scalings of every token that was run, prompt included."""
    return {
        "mixture": row.mixture,
        "experts": list(row.experts),
        "layers": list(row.layers),
        "tokens": [texts.of(token) for token in row.token_ids],
        "values": array_json(row.values.numpy(), encoding),
    }


def capture_json(capture: AttentionCapture, encoding: Encoding) -> dict[str, Any]:
    return {
        "layers": list(capture.layers),
        "heads": None if capture.heads is None else list(capture.heads),
        "query_positions": list(capture.query_positions),
        "tokens": list(capture.key_tokens),
        "weights": array_json(capture.weights, encoding),
        "residual_norms": None if capture.residual_norms is None else array_json(capture.residual_norms, encoding),
    }


def array_json(array: np.ndarray, encoding: Encoding) -> dict[str, Any]:
    """Shape, type and numbers: nested lists, or the little-endian bytes in base64."""
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": Numbers(array, encoding)}


def auto_json(choice: AutoChoice | None, base_name: str) -> dict[str, Any]:
    """The field of a choice that tells what `auto` chose for its prompt."""
    if choice is None:
        return {}
    return {"auto": {"model": choice.name or base_name, "score": choice.score}}


def chosen_model(choices: Iterable[AutoChoice | None], base_name: str) -> dict[str, Any]:
    """An answer's `model`, where `auto` chose one for all its prompts; else it stays what was asked."""
    names = {choice.name or base_name for choice in choices if choice is not None}
    return {"model": names.pop()} if len(names) == 1 else {}


def envelope(prefix: str, kind: str, body: GenerationBody) -> dict[str, Any]:
    """What an answer and all its chunks begin with."""
    return {
        "id": f"{prefix}-{body.request_id or secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
    }


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


_BLOCK = 32  # characters, of which a chunk's text and its obfuscation together have a multiple
_SMALLEST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's value


def obfuscation(text: str) -> str:
    """Random characters, so that a chunk's size doesn't tell the length of its text, as OpenAI sends them."""
    missing = _BLOCK - len(text.encode()) % _BLOCK
    return secrets.token_hex(_BLOCK)[:missing]


def chunk_usage(num_prompt: int, num_new: int) -> dict[str, int]:
    """Of one answer, as far as it is now."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


def prompt_logprobs_json(
    entries: Sequence[TokenLogprobs | None] | None, num_top: int, texts: TokenTexts
) -> list[dict[str, Any] | None]:
    """vLLM's: for each token of the prompt but the first its own entry, then the likeliest ones', by their ids."""
    told: list[dict[str, Any] | None] = []
    for entry in entries or ():
        if entry is None:
            told.append(None)
            continue
        found = {str(entry.token_id): _logprob_json(entry.token_id, entry.logprob, entry.rank, texts)}
        for rank, (token, logprob) in enumerate(entry.top[:num_top], 1):
            found.setdefault(str(token), _logprob_json(token, logprob, rank, texts))
        told.append(found)
    return told


def _logprob_json(token: int, logprob: float, rank: int, texts: TokenTexts) -> dict[str, Any]:
    return {"logprob": max(logprob, _SMALLEST_LOGPROB), "rank": rank, "decoded_token": texts.of(token)}


def top_texts(logprobs: TokenLogprobs, text: Callable[[int], str]) -> dict[str, float]:
    """The likeliest tokens by their texts, the chosen one among them; of equal texts the likelier counts."""
    found = {text(logprobs.token_id): logprobs.logprob}
    for token, value in logprobs.top:
        found[text(token)] = max(value, found.get(text(token), value))
    return found
