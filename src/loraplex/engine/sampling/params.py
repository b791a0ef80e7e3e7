"""How a request's tokens are chosen from the logits, and when it ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.errors import RequestError

_LARGEST = 3.4028234663852886e38  # that float32 can hold
MAX_ANSWERS = 4096  # each holds memory before its first token
STRUCTURES = ("json_schema", "regex", "choice", "grammar", "tool_grammar")
_LISTS = {
    "stop": "a text or several",
    "stop_token_ids": "a tuple of token ids",
    "logit_bias": "a mapping from token ids to numbers",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The options of one request. The defaults are greedy search."""

    max_tokens: int = 128  # new ones
    min_tokens: int = 0  # before an end token or stop string counts
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # least probability, relative to the likeliest token's
    repetition_penalty: float = 1.0  # of tokens in the prompt or the answer (CTRL, arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted once from the logit of each token in the answer
    frequency_penalty: float = 0.0  # subtracted for each time it occurs there
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id, added to its logit
    seed: int | None = None  # gives the same tokens in any batch
    n: int = 1  # answers
    stop: tuple[str, ...] | str = ()  # end the answer before any of these
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # the chosen token's log-probability, and those of so many of the likeliest
    # the same of each token of the prompt but the first; its keys and values are then computed, not reused
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None  # the answer is JSON of this schema
    json_whitespace: bool = True  # between its parts; False: none at all
    regex: str | None = None  # the whole answer matches it
    choice: tuple[str, ...] | None = None  # the answer is one of these
    grammar: str | None = None  # the answer follows it: Lark's or GBNF's form
    allowed_token_ids: tuple[int, ...] | None = None  # no others
    bad_words: tuple[str, ...] = ()  # a word's last token never follows its others
    include_stop: bool = False  # the text ends with the stop string or stop token that ended it
    tool_grammar: str | None = None  # of answers that call tools, in llguidance's form of Lark
    skip_special_tokens: bool = True  # in the text

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens, 1)
        _check_count("min_tokens", self.min_tokens, 0)
        _check_count("top_k", self.top_k, 0)
        _check_count("n", self.n, 1)
        if self.n > MAX_ANSWERS:
            raise RequestError(f"n is {self.n}; at most {MAX_ANSWERS} answers a request are possible. Send several.")
        for option in ("logprobs", "prompt_logprobs"):
            if getattr(self, option) is not None:
                _check_count(option, getattr(self, option), 0)
        if self.seed is not None:
            _check_count("seed", self.seed, 0)
        _check_number("temperature", self.temperature, 0, math.inf)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        for option in ("presence_penalty", "frequency_penalty"):
            _check_number(option, getattr(self, option), -math.inf, math.inf)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf)
        if self.repetition_penalty == 0 or self.top_p == 0:
            raise RequestError("repetition_penalty and top_p must be above 0; 1 leaves the logits as they are.")
        self._check_lists()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature and the filters touches the logits."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.has_structure
            or self.allowed_token_ids is not None
            or self.bad_words
        )

    @property
    def has_structure(self) -> bool:
        """Whether the answer follows a schema, an expression, choices or a grammar."""
        return any(getattr(self, option) is not None for option in STRUCTURES)

    def _check_lists(self) -> None:
        kinds = {"stop": str | Sequence, "stop_token_ids": Sequence, "logit_bias": Mapping}
        for option, kind in kinds.items():
            if not isinstance(getattr(self, option), kind):
                raise RequestError(f"{option} is {getattr(self, option)!r}; give {_LISTS[option]}.")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise RequestError(f"stop is {self.stop!r}; give texts of at least one character.")
        for token in (*self.stop_token_ids, *self.logit_bias):
            _check_count("a token id in stop_token_ids or logit_bias", token, 0)
        for token, bias in self.logit_bias.items():
            is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not is_number or not (bias == -math.inf or -_LARGEST <= bias <= _LARGEST):  # not for NaN
                raise RequestError(
                    f"the logit_bias of token {token} is {bias!r}; it must be a number that float32 can hold, or "
                    "-infinity."
                )
        if self.json_schema is not None and not isinstance(self.json_schema, str | Mapping):
            raise RequestError(f"json_schema is {self.json_schema!r}; give a JSON schema as a mapping or a text.")
        self._check_structures()
        self._check_restrictions()

    def _check_structures(self) -> None:
        given = [option for option in STRUCTURES if getattr(self, option) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} can't all hold for one answer. Give one of them.")
        for option in ("regex", "grammar", "tool_grammar"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and value):
                raise RequestError(f"{option} is {value!r}; give a text of at least one character.")
        if self.choice is not None and not _are_texts(self.choice):
            raise RequestError(f"choice is {repr(self.choice)[:200]}; give a tuple of texts, none of them empty.")

    def _check_restrictions(self) -> None:
        allowed = self.allowed_token_ids
        if allowed is not None:
            if not isinstance(allowed, tuple | list) or not allowed:
                raise RequestError(f"allowed_token_ids is {repr(allowed)[:200]}; give a tuple of token ids, or None.")
            for token in allowed:
                _check_count("a token id in allowed_token_ids", token, 0)
        if self.bad_words and not _are_texts(self.bad_words):
            raise RequestError(f"bad_words is {repr(self.bad_words)[:200]}; give a tuple of texts, none of them empty.")
        for option in ("include_stop", "skip_special_tokens", "json_whitespace"):
            if not isinstance(getattr(self, option), bool):
                raise RequestError(f"{option} is {getattr(self, option)!r}; give True or False.")


def _are_texts(values: object) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    return is_list and all(isinstance(text, str) and text.strip() for text in values)  # type: ignore[attr-defined]


def _check_count(option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{option} is {value!r}; it must be a whole number of at least {least}.")


def _check_number(option: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not max(least, -_LARGEST) <= value <= min(most, _LARGEST):  # type: ignore[operator]
        raise RequestError(f"{option} is {value!r}; it must be a finite number from {least:g} to {most:g}.")
