"""How a request's tokens are chosen from the logits, and when it ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.errors import RequestError

_LARGEST = 3.4028234663852886e38  # that float32 can hold
MAX_ANSWERS = 4096  # each holds memory before its first token
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
            or self.json_schema is not None
            or self.tool_grammar is not None
        )

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
        if self.tool_grammar is not None and not isinstance(self.tool_grammar, str):
            raise RequestError(f"tool_grammar is {self.tool_grammar!r}; give a text, or None.")
        if self.tool_grammar is not None and self.json_schema is not None:
            raise RequestError("json_schema and tool_grammar can't both hold for one answer. Give one of them.")
        if not isinstance(self.skip_special_tokens, bool):
            raise RequestError(f"skip_special_tokens is {self.skip_special_tokens!r}; give True or False.")


def _check_count(option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{option} is {value!r}; it must be a whole number of at least {least}.")


def _check_number(option: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not max(least, -_LARGEST) <= value <= min(most, _LARGEST):  # type: ignore[operator]
        raise RequestError(f"{option} is {value!r}; it must be a finite number from {least:g} to {most:g}.")
