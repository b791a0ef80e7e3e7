"""From tokens to text as they come, up to a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a part of a character decodes to
_CONTEXT = 5  # tokens of the prompt: some tokenizers write a word's first space by what stands before it


class Detokenizer:
    """The text of one answer. A part that may belong to a stop string or to half a character is held back."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt[-_CONTEXT:])
        self._first, self._read = 0, len(self._ids)  # decoded together; told already
        self._stops = tuple(stop_strings)
        self._held = ""
        self.total = ""
        self.is_stopped = False  # a stop string was found

    def add(self, token: int) -> str:
        """Take a token; returns the text that is certain now."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        known = self._decode(self._ids[self._first : self._read])
        text = self._decode(self._ids[self._first :])
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def end(self) -> str:
        """The rest of the text, which was held back."""
        if self._tokenizer is None or self.is_stopped:
            return ""
        known = self._decode(self._ids[self._first : self._read])
        rest = self._held + self._decode(self._ids[self._first :])[len(known) :]
        self._held = ""
        self.total += rest
        return rest

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None, "there is no tokenizer"
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens))

    def _release(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        places = [text.find(stop) for stop in self._stops if stop in text]
        if places:
            text, self.is_stopped = text[: min(places)], True
        else:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.total += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
