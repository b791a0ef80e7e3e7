"""From what a client wrote to the tokens that the engine gets, and to the spans that a steering finds in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.residual.steering import Range, Span, Steering, TokenOffsets, ranges_of_text
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.schemas.generation import Steer

T = TypeVar("T")
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


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, most: int, param: str = "prompt"
) -> EncodedPrompt:
    """Raises ApiError for what is no text, and for more than `most` tokens before anything is done with them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the character {error.start} is half of a surrogate pair, which no text has alone."
        raise ApiError(BAD_REQUEST, message, param=param) from None
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
        made.append(Steering(spans=spans, strength=steer.strength, layers=layers, heads=heads))
    return tuple(made)


def _check_kinds(body: Sequence[Steer], prompt: EncodedPrompt) -> None:
    for place, steer in enumerate(body):
        param = f"steer.{place}"
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
    text, wanted = prompt.text, steer.text
    assert text is not None, "texts are looked up in texts"
    return _told(lambda: ranges_of_text(text, wanted, most), param)


def _spans(
    steer: Steer, ranges: list[Range] | None, prompt: EncodedPrompt, offsets: TokenOffsets | None, param: str
) -> tuple[Span, ...]:
    if ranges is None:
        assert steer.start is not None, "a steering without a text has a start"
        assert steer.end is not None, "and an end"
        return ((steer.start, steer.end),)
    found, text = offsets, prompt.text
    assert found is not None, "ranges come from a text with offsets"
    assert text is not None, "ranges come from a text with offsets"
    return _told(lambda: found.spans(ranges, text), param)


def _told(look: Callable[[], T], param: str) -> T:
    try:
        return look()
    except RequestError as error:
        raise ApiError(BAD_REQUEST, f"{param}: {error}", param=param, quotes_request=True) from None


def _distinct(places: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if places is None else tuple(dict.fromkeys(places))
