"""The messages of a chat as tokens: a template's control tokens are real, those that a message spells are text."""

import inspect
import json
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypedDict

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loraplex.errors import RequestError
from loraplex.models.text.chat_template import render_chat
from loraplex.server.api.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from loraplex.server.api.engine_requests import EncodedPrompt, encode_text, encode_with
from loraplex.server.api.messages import Turn

_FIRST_ALIAS, _NUM_ALIASES = 0xF0000, 0xFFFE  # a plane of private use: no text means anything by it


class ControlTokens:
    """The special tokens of a tokenizer, and secret aliases under which a second one knows them.

    The second tokenizer is the first but for the names of its special tokens. So whoever doesn't know an alias can't
    write a control token, and all rules about spaces and pieces beside them hold as they did. An alias is as long as
    what it stands for: tokens of both stand for the same characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        described = json.loads(self._backend.to_str())
        special = [token for token in described["added_tokens"] if token["special"]]
        model = described["model"]
        unknown = (model.get("unk_token"), model.get("unk_id"))  # comes of ordinary texts too
        self.ids = frozenset(
            int(token["id"]) for token in special if token["content"] != unknown[0] and token["id"] != unknown[1]
        )
        self._aliases = {str(token["content"]): _alias(len(token["content"])) for token in special}
        longest_first = sorted(filter(None, self._aliases), key=len, reverse=True)
        self._spellings = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def is_spelt_in(self, text: str) -> bool:
        return self._spellings.search(text) is not None

    def is_alias_in(self, text: str) -> bool:
        return any(alias in text for alias in self._aliases.values())

    def aliased(self, text: str) -> str:
        """The text with aliases for the control tokens that it spells."""
        return self._spellings.sub(lambda found: self._aliases[found[0]], text)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that knows aliases alone."""
        described = json.loads(self._backend.to_str()) | {"truncation": None, "padding": None}
        for token in described["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = described["model"]
        model["unk_token"] = self._renamed(model.get("unk_token"))
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(piece): token for piece, token in model["vocab"].items()}
        else:  # of a unigram model: pieces with their scores
            model["vocab"] = [[self._renamed(piece), score] for piece, score in model["vocab"]]
        return Tokenizer.from_str(json.dumps(described))

    def _renamed(self, piece: Any) -> Any:
        return self._aliases.get(piece, piece)


def _alias(length: int) -> str:
    return "".join(chr(_FIRST_ALIAS + secrets.randbelow(_NUM_ALIASES)) for _ in range(length))


_TEXTS = ("content", "name", "reasoning_content")  # of a turn, which templates write as they are
# Around a placeholder: what `trim` takes away and nothing else does, so that it shows on which sides a template trims.
_LEFT, _RIGHT = "\u2003\x0b", "\x0b\u2003"


class _Options(TypedDict):
    add_special_tokens: bool
    most: int
    param: str


def _unlimited(options: _Options) -> _Options:
    return {**options, "most": sys.maxsize}


class ChatEncoder:
    """Encodes chats with the template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, allow_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._allows_special = allow_special_tokens

    def prepare(self) -> None:
        """Make the second tokenizer, which takes the first one's reading time once more."""
        if not self._allows_special and self._tokenizer.is_fast and self._tokenizer.chat_template is not None:
            _ = self._control.tokenizer

    def encode(
        self,
        turns: Sequence[Turn],
        *,
        most: int,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),  # of the template
    ) -> EncodedPrompt:
        """Raises ApiError for messages that the template refuses, or whose control tokens can't be told apart.

        And for more than `most` tokens, before they are looked at. Tools and calls of them, which templates write in
        ways of their own, may spell no control token.
        """
        known = () if self._allows_special or not variables else self._special_tokens
        variables = {**_checked(variables, known), "add_generation_prompt": add_generation_prompt}
        if tools:
            variables["tools"] = [dict(tool) for tool in tools]
        text = self._render(turns, variables)
        options: _Options = {"add_special_tokens": add_special_tokens, "most": most, "param": "messages"}
        encoded = encode_text(self._tokenizer, text, **options)
        if self._allows_special:
            return encoded
        structured = list(_structured_texts(turns, tools))
        if not self._tokenizer.is_fast:
            parts = [*_parts(turns), *structured]
            if any(token in part for part in parts for token in self._tokenizer.all_special_tokens):
                raise _refusal()
            return encoded
        if any(map(self._control.is_spelt_in, structured)):
            raise _refusal()
        empty = _Skeleton(turns)
        skeleton = self._render(empty.turns, variables)
        expected = encode_text(self._tokenizer, skeleton, **_unlimited(options))
        is_spelt = any(map(self._control.is_spelt_in, _parts(turns)))
        if not is_spelt and self._control_ids(encoded) == self._control_ids(expected):
            return encoded
        return self._as_text(text, empty.pieces(skeleton), options)

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        marked = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        return tuple({*marked, *self._tokenizer.all_special_tokens})

    def _as_text(self, text: str, pieces: Sequence[tuple[str, bool]], options: "_Options") -> EncodedPrompt:
        """Tokenize a rendered chat of these pieces; each is a message's or the template's."""
        if "".join(piece for piece, _ in pieces) != text or self._control.is_alias_in(text):
            raise _refusal()
        aliased = "".join(piece if is_message else self._control.aliased(piece) for piece, is_message in pieces)
        return encode_with(self._control.tokenizer, aliased, text, **options)

    def _control_ids(self, prompt: EncodedPrompt) -> list[int]:
        return [token for token in prompt.ids if token in self._control.ids]

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self._tokenizer)  # type: ignore[arg-type]  # a fast one

    def _render(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> str:
        try:
            return render_chat(self._tokenizer, turns, **variables)
        except RequestError as error:
            quotes = self._tokenizer.chat_template is not None
            raise ApiError(BAD_REQUEST, str(error), param="messages", quotes_request=quotes) from error


# What the template is run with, or how: no variables of its own.
_NO_VARIABLES = ("messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
_MAX_VARIABLE_VALUES = 1024  # JSON values in all of them


def _checked(variables: Mapping[str, Any], special_tokens: Sequence[str]) -> dict[str, Any]:
    """A template's variables that a request gives.

    Raises ApiError for those that are none, too many values, and texts in which a control token may begin: a variable
    can stand anywhere in what the template writes.
    """
    beginnings = {token[0] for token in special_tokens if token}
    for name in variables:
        if name in _NO_VARIABLES or not name.isidentifier():
            message = f"chat_template_kwargs can't have {name[:64]!r}."
            raise ApiError(BAD_REQUEST, message, param="chat_template_kwargs")
    level: list[Any] = [dict(variables)]
    count = 0
    while level:
        count += len(level)
        if any(isinstance(value, str) and not beginnings.isdisjoint(value) for value in level):
            message = f"texts in chat_template_kwargs can't have {' or '.join(sorted(beginnings))} in them."
            raise ApiError(BAD_REQUEST, message, param="chat_template_kwargs")
        if count > _MAX_VARIABLE_VALUES:
            message = f"chat_template_kwargs have more than {_MAX_VARIABLE_VALUES} values."
            raise ApiError(TOO_LARGE, message, param="chat_template_kwargs")
        level = [
            value
            for container in level
            if isinstance(container, dict | list)
            for value in (container.values() if isinstance(container, dict) else container)
        ]
    return dict(variables)


class _Skeleton:
    """The same turns with placeholders for what messages say, by which a rendered chat shows where that stands."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._mark = f"x{secrets.token_hex(8)}x"
        self._texts: list[str] = []
        self.turns = [
            {field: self._emptied(value) if field in _TEXTS else value for field, value in turn.items()}
            for turn in turns
        ]

    def pieces(self, skeleton: str) -> list[tuple[str, bool]]:
        """The real chat's pieces by the rendered skeleton; true: a message's text, trimmed as the template does."""
        found = re.split(f"({_LEFT})?{self._mark}(\\d+)x({_RIGHT})?", skeleton)
        pieces = [(found[0], False)]
        for left, number, right, rest in zip(found[1::4], found[2::4], found[3::4], found[4::4], strict=True):
            text = self._texts[int(number)]
            text = text if left else text.lstrip()
            pieces += [(text if right else text.rstrip(), True), (rest, False)]
        return pieces

    def _emptied(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._placeholder(content)
        return [part | {"text": self._placeholder(part["text"])} if "text" in part else part for part in content]

    def _placeholder(self, text: str) -> str:
        if not text:  # a template may ask whether there is any
            return text
        self._texts.append(text)
        return f"{_LEFT}{self._mark}{len(self._texts) - 1}x{_RIGHT}"


def _parts(turns: Sequence[Turn]) -> list[str]:
    contents = [value for turn in turns for field, value in turn.items() if field in _TEXTS]
    of_lists = [
        part["text"] for content in contents if not isinstance(content, str) for part in content if "text" in part
    ]
    return [content for content in contents if isinstance(content, str)] + of_lists


def _structured_texts(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts, keys too, of tools, calls and ids."""
    others = (value for turn in turns for field, value in turn.items() if field not in (*_TEXTS, "role"))
    level: list[Any] = [*tools, *others]
    while level:
        value = level.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            level += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            level += value


def _refusal() -> ApiError:
    return ApiError(
        BAD_REQUEST,
        "a message spells one of the model's control tokens, and this model's chat template changes messages in a way "
        "that doesn't let it be told from the template's own. Leave it out (allow_special_tokens_in_content).",
        param="messages",
    )
