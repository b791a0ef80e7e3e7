"""Tokens that may not come next, by lists of a request: the allowed ones, and those that would complete a bad word."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError

MAX_BAD_WORD_TOKENS = 2**14  # of all bad words together


class Restrictions:
    """Shared by the answers of a request; each tells its own tokens."""

    def __init__(self, allowed: Sequence[int] | None = None, bad_words: Sequence[Sequence[int]] = ()) -> None:
        self._allowed = None if allowed is None else torch.tensor(sorted(set(allowed)), dtype=torch.int64)
        self._endings: dict[tuple[int, ...], list[int]] = {}  # the last tokens of bad words, by what is before them
        for word in bad_words:
            self._endings.setdefault(tuple(word[:-1]), []).append(word[-1])
        self._lengths = sorted({len(beginning) for beginning in self._endings})

    @property
    def longest(self) -> int:
        """How many of an answer's last tokens `apply` looks at."""
        return max(self._lengths, default=0)

    def apply(self, logits: Tensor, last_tokens: Sequence[int]) -> None:  # [vocab]
        """Set the logits of forbidden tokens to -inf; `last_tokens`: of the answer, at least `longest` if it has them.

        As vLLM: of a bad word only its last token is forbidden, and only behind the others.
        """
        if self._allowed is not None:
            allowed = self._allowed.to(logits.device)
            kept = logits[allowed]
            logits.fill_(float("-inf"))
            logits[allowed] = kept
        for length in self._lengths:
            beginning = tuple(last_tokens[len(last_tokens) - length :]) if length else ()
            if len(beginning) == length and beginning in self._endings:
                logits[self._endings[beginning]] = float("-inf")


def bad_word_tokens(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token sequences of words, as vLLM has them: at the beginning of a text, and behind a space.

    The form behind a space counts where it begins with another token and is as long. Raises RequestError.
    """
    found: list[list[int]] = []
    for word in dict.fromkeys(words):
        plain = list(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not plain:
            raise RequestError(f"bad_words has {word[:50]!r}, which has no tokens. Leave it out.")
        found.append(plain)
        spaced = list(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    num_tokens = sum(map(len, found))
    if num_tokens > MAX_BAD_WORD_TOKENS:
        raise RequestError(f"bad_words have {num_tokens} tokens; {MAX_BAD_WORD_TOKENS} are possible. Give fewer.")
    return found
