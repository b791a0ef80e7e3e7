"""The text of single tokens, for logprobs and scalings."""

from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """Texts by token id, decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self._tokenizer.decode([token], skip_special_tokens=False))
        return text

    def of_all(self, tokens: tuple[int, ...] | list[int]) -> list[str]:
        return [self.of(token) for token in tokens]
