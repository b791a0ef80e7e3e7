"""Where the first user turn's content begins: before it all records look alike; nothing tells what will be asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.models.text.chat_template import render_chat

_PROBES = ("a7", "z7")  # contents that differ from their first character on


class BeforeFirstUser:
    """Counts the tokens that a chat template, and messages before it, put in front of the first user turn's content."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}  # tokens by what comes before

    def count(self, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> int:
        """Of a conversation with these tokens; 0 without a user turn. A token with a part of the content isn't one."""
        first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            return 0
        before = self._before(messages[:first], messages[first])
        return next((n for n, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), len(before))

    def _before(self, earlier: Sequence[Mapping[str, Any]], user: Mapping[str, Any]) -> list[int]:
        key = repr(earlier)
        if key not in self._known:
            turns = [[*earlier, {**user, "content": probe}] for probe in _PROBES]
            try:
                texts = [render_chat(self._tokenizer, messages, add_generation_prompt=False) for messages in turns]
            except RequestError:  # a template that asks for something else: what is before isn't known
                texts = [""]
            text = _common_start(texts)
            self._known[key] = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return self._known[key]


def _common_start(texts: Sequence[str]) -> str:
    """The characters that all texts begin with."""
    shortest = min(texts, key=len)
    return next((shortest[:n] for n, _ in enumerate(shortest) if len({text[n] for text in texts}) > 1), shortest)
