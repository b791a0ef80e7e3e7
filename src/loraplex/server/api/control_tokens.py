"""A tokenizer beside a model's own, to which the spellings of its control tokens are text like any other."""

import json
import re
import secrets
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

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
