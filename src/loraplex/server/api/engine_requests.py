"""From a body to the engine's request: the prompt's tokens, sampling options, steerings, and the limits of them all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import RequestError
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.steering import Range, Span, Steering, TokenOffsets, ranges_of_text
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.bodies import CaptureAttention, GenerationBody, Steer
from loraplex.server.api.structures import structure_of
from loraplex.server.auth.access import Principal
from loraplex.server.settings import RequestLimits, ServeConfig
from loraplex.validation import check_text

_MAX_TRUNCATED = 8  # times as long as what may be left, a text to be truncated may be
_SLACK = 64  # tokens by which a part of a text may differ from the same part of the whole


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens; of one that was a text also that, and where in it they stand."""

    ids: Sequence[int]
    text: str | None = None
    encoding: Encoding | None = None  # None: the tokenizer doesn't tell where its tokens stand

    @property
    def offsets(self) -> Sequence[Range]:
        """The characters that each token stands for; made when it is asked for."""
        assert self.encoding is not None, "only a fast tokenizer's encoding has offsets"
        return self.encoding.offsets


@dataclass(frozen=True)
class Truncation:
    """Keep so many of a prompt's tokens: the first ("right" is cut off) or the last ("left" is).

    Without a side it is the tokenizer's, and as transformers truncates: special tokens at the ends stay.
    """

    length: int
    side: Literal["left", "right"] | None = None

    @classmethod
    def of_body(cls, body: GenerationBody, max_length: int) -> "Truncation | None":
        return cls.of(body.truncate_prompt_tokens, body.truncation_side, max_length)

    @classmethod
    def of(cls, length: int | None, side: Literal["left", "right"] | None, max_length: int) -> "Truncation | None":
        """Raises ApiError for a length that no prompt can have; -1 is the longest that leaves room for a token."""
        if length is None:
            return None
        if length == 0 or length > max_length:
            message = f"truncate_prompt_tokens is {length}; it must be -1, or from 1 to {max_length}."
            raise ApiError(BAD_REQUEST, message, param="truncate_prompt_tokens")
        return cls(max_length - 1 if length < 0 else length, side)

    def most(self, most: int) -> int:
        """How many tokens a text may have before it is cut."""
        return _MAX_TRUNCATED * most

    def side_for(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return self.side or str(tokenizer.truncation_side)

    def of_ids(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
        if len(ids) <= self.length:
            return ids
        return ids[-self.length :] if self.side_for(tokenizer) == "left" else ids[: self.length]

    def of_prompt(self, prompt: "EncodedPrompt", tokenizer: PreTrainedTokenizerBase) -> "EncodedPrompt":
        """Of tokens that are whole already."""
        if prompt.encoding is None:
            return EncodedPrompt(self.of_ids(prompt.ids, tokenizer), prompt.text)
        prompt.encoding.truncate(self.length, direction=self.side_for(tokenizer))
        return EncodedPrompt(prompt.encoding.ids, prompt.text, prompt.encoding)


def encode_truncated(
    tokenizer: PreTrainedTokenizerBase, text: str, truncation: Truncation, *, add_special_tokens: bool, most: int
) -> EncodedPrompt:
    """As `encode_text`, then cut. Raises ApiError for a text that is many times longer than what may be left."""
    options: dict[str, Any] = {"most": truncation.most(most), "param": "prompt"}
    if truncation.side is not None or not add_special_tokens:
        whole = encode_text(tokenizer, text, add_special_tokens=add_special_tokens, **options)
        return truncation.of_prompt(whole, tokenizer)
    whole = encode_text(tokenizer, text, add_special_tokens=False, **options)
    if whole.encoding is None:
        return EncodedPrompt(tokenizer(text, truncation=True, max_length=truncation.length)["input_ids"], text)
    backend: Tokenizer = tokenizer.backend_tokenizer
    room = max(0, truncation.length - backend.num_special_tokens_to_add(False))
    whole.encoding.truncate(room, direction=truncation.side_for(tokenizer))
    encoding = backend.post_process(whole.encoding, None, True)
    return EncodedPrompt(encoding.ids, text, encoding)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, most: int, param: str = "prompt"
) -> EncodedPrompt:
    """Raises ApiError for what is no text, and for more than `most` tokens before anything is done with them."""
    with _naming(param):
        check_text(text)
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        check_length(len(ids), most, param)
        return EncodedPrompt(ids, text)
    backend: Tokenizer = tokenizer.backend_tokenizer  # whose tokens become Python's objects only when asked for
    return encode_with(backend, text, text, add_special_tokens=add_special_tokens, most=most, param=param)


def encode_with(
    backend: Tokenizer, written: str, text: str, *, add_special_tokens: bool, most: int, param: str
) -> EncodedPrompt:
    """The tokens of `written`, which stand for the characters of `text`; what is far too long shows it early."""
    if backend.truncation is not None:
        backend.no_truncation()
    for num_characters in (int(1.25 * most) + _SLACK, 8 * most):
        if len(written) > num_characters:
            num_tokens = len(_encoding(backend, written[:num_characters], add_special_tokens))
            if num_tokens > 1.1 * most + _SLACK:  # more than the whole could gain by being whole
                check_length(num_tokens, most, param)
    encoding = _encoding(backend, written, add_special_tokens)
    check_length(len(encoding), most, param)
    return EncodedPrompt(encoding.ids, text, encoding)


def _encoding(backend: Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
    """As a batch, since `encode` would hold Python's interpreter all the while."""
    (encoding,) = backend.encode_batch([text], add_special_tokens=add_special_tokens)
    return encoding


def check_length(length: int, most: int, param: str) -> None:
    """Raise ApiError for too many tokens."""
    if length > most:
        message = f"the prompt has {length} tokens or more, but can have {most} here. Shorten it."
        raise ApiError(BAD_REQUEST, message, param=param)


def engine_request(
    body: GenerationBody,
    prompt: EncodedPrompt,
    sampling: SamplingParams,
    *,
    adapters: AdapterSpec,
    principal: Principal,
    config: ServeConfig,
    images: Sequence[bytes] = (),
) -> Request:
    """Raises ApiError that names the field."""
    if images and body.steer:
        raise ApiError(BAD_REQUEST, "steer and images can't stand in one request. Leave one out.", param="steer")
    most_bytes = config.limits.max_capture_bytes
    return Request(
        prompt.ids,
        adapters=adapters,
        images=images,
        sampling=sampling,
        priority=body.priority or 0,
        capture=_capture(body.capture_attention, most_bytes),
        steering=steerings(body.steer, prompt, config.limits.max_steered_spans),
        residual_layers={name: tuple(layers) for name, layers in (body.residual_layers or {}).items()},
        return_scalings=bool(body.return_scalings),
        scalings_budget_bytes=most_bytes,
        cache_salt=cache_salt(body.cache_salt, principal, isolated=config.access.prefix_isolation),
    )


def sampling_params(
    body: GenerationBody,
    principal: Principal,
    limits: RequestLimits,
    defaults: Mapping[str, float | int],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What the body doesn't give is the model's; more tokens than are allowed are as many as are allowed.

    Raises ApiError that names the field.
    """
    _check_limits(body, principal, limits)
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),  # -1 is all, too
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": _logit_bias(body.logit_bias),
        "seed": None if body.seed is None else body.seed % 2**63,
        "n": body.n,
        "stop": tuple(body.stop) if isinstance(body.stop, list) else body.stop,
        "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "max_tokens": max(1, min(max_tokens, allowed_tokens(principal, limits))),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "allowed_token_ids": None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        "bad_words": None if body.bad_words is None else tuple(body.bad_words),
        "include_stop": body.include_stop_str_in_output,
        "skip_special_tokens": body.skip_special_tokens,
    }
    known = {name: value for name, value in given.items() if value is not None}
    try:
        return SamplingParams(**{**defaults, **known, **structure_of(body)})
    except RequestError as error:
        raise ApiError(BAD_REQUEST, str(error), quotes_request=True) from error


def allowed_tokens(principal: Principal, limits: RequestLimits) -> int:
    """New tokens that an answer may have at most."""
    return min(limits.max_new_tokens, principal.max_new_tokens or limits.max_new_tokens)


def cache_salt(given: str | None, principal: Principal, *, isolated: bool) -> str:
    """Requests share a prefix cache only with those of the same salt: the key's, and the one that a client gives."""
    key = principal.key
    own = key.id if key is not None and isolated and not key.shared_prefixes else ""
    return f"{own}:{given}" if given else own


def _check_limits(body: GenerationBody, principal: Principal, limits: RequestLimits) -> None:
    if body.n is not None and body.n > limits.max_choices:
        raise ApiError(TOO_LARGE, f"n is {body.n}; {limits.max_choices} are possible (max_choices).", param="n")
    if body.priority and principal.max_priority is not None and body.priority > principal.max_priority:
        message = f"priority is {body.priority}; this key may have {principal.max_priority}."
        raise ApiError(TOO_LARGE, message, param="priority")
    if body.stream_options is not None and not body.stream:
        raise ApiError(BAD_REQUEST, "stream_options needs stream: true.", param="stream_options")


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    if not all(token.isascii() and token.isdigit() and len(token) < 11 for token in given):
        raise ApiError(BAD_REQUEST, "the keys of logit_bias are token ids, written as texts.", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _capture(body: CaptureAttention | None, budget_bytes: int) -> CaptureRequest | None:
    if body is None:
        return None
    return CaptureRequest(
        layers=None if body.layers is None else tuple(body.layers),
        heads=None if body.heads is None else tuple(body.heads),
        queries=body.queries,
        reduce=body.reduce,
        dtype=body.dtype,
        budget_bytes=budget_bytes,
    )


def steerings(body: Sequence[Steer] | None, prompt: EncodedPrompt, most_spans: int) -> tuple[Steering, ...]:
    """The engine's steerings; texts are looked up in the prompt. Costs no more than tokens + spans * log(tokens)."""
    if not body:
        return ()
    _check_kinds(body, prompt)
    ranges = [_ranges(steer, prompt, f"steer.{place}", most_spans) for place, steer in enumerate(body)]
    num_spans = sum(1 if found is None else len(found) for found in ranges)
    if num_spans > most_spans:
        message = f"the steerings have {num_spans} spans; {most_spans} are possible (max_steered_spans)."
        raise ApiError(TOO_LARGE, message, param="steer")
    offsets = TokenOffsets(prompt.offsets) if any(ranges) else None
    made = []
    for place, (steer, found) in enumerate(zip(body, ranges, strict=True)):
        spans = _spans(steer, found, prompt, offsets, f"steer.{place}")
        layers, heads = _distinct(steer.layers), _distinct(steer.heads)
        strength = 1.0 if steer.strength is None else steer.strength
        made.append(Steering(spans=spans, strength=strength, share=steer.share, layers=layers, heads=heads))
    return tuple(made)


def _check_kinds(body: Sequence[Steer], prompt: EncodedPrompt) -> None:
    for place, steer in enumerate(body):
        param = f"steer.{place}"
        if (steer.strength is None) == (steer.share is None):
            raise ApiError(BAD_REQUEST, f"{param}: give either strength or share.", param=param)
        has_range = steer.start is not None and steer.end is not None
        if has_range == (steer.text is not None) or (steer.start is None) != (steer.end is None):
            raise ApiError(BAD_REQUEST, f"{param}: give either text, or start and end.", param=param)
        if steer.text is None:
            continue
        if prompt.text is None:
            raise ApiError(BAD_REQUEST, f"{param}: a prompt of token ids is steered by start and end.", param=param)
        if prompt.encoding is None:
            message = f"{param}: the model's tokenizer doesn't tell where its tokens stand. Give start and end."
            raise ApiError(BAD_REQUEST, message, param=param)


def _ranges(steer: Steer, prompt: EncodedPrompt, param: str, most: int) -> list[Range] | None:
    """Where the text of a steering stands; None for one that names tokens."""
    if steer.text is None:
        return None
    assert prompt.text is not None, "texts are looked up in texts"
    with _naming(param):
        return ranges_of_text(prompt.text, steer.text, most)


def _spans(
    steer: Steer, ranges: list[Range] | None, prompt: EncodedPrompt, offsets: TokenOffsets | None, param: str
) -> tuple[Span, ...]:
    if ranges is None:
        assert steer.start is not None and steer.end is not None, "a steering without a text has a start and an end"  # noqa: PT018
        return ((steer.start, steer.end),)
    assert offsets is not None and prompt.text is not None, "ranges come from a text with offsets"  # noqa: PT018
    with _naming(param):
        return offsets.spans(ranges, prompt.text)


@contextmanager
def _naming(param: str) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise ApiError(BAD_REQUEST, f"{param}: {error}", param=param, quotes_request=True) from None


def _distinct(places: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if places is None else tuple(dict.fromkeys(places))
