"""Answers that follow a JSON schema, through llguidance."""

import json
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.engine.token_choice import Constraint
from loraplex.errors import ConfigError, RequestError

_tokenizers: "WeakKeyDictionary[PreTrainedTokenizerBase, Any]" = WeakKeyDictionary()  # reading one takes a second
_lock = threading.Lock()
# Between JSON's parts: nothing, a space, or a new line with its indentation. The format allows whitespace without an
# end, and small models write it until they run out of tokens.
_WHITESPACE = r"( |\n[ \t]{0,32})"


def make_constraint(schema: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Constraint:
    """Raises ConfigError if llguidance is not installed and RequestError for a schema that it can't follow."""
    try:
        import llguidance
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ConfigError(
            "json_schema needs the package llguidance, which is not installed. Install it: pip install "
            "'loraplex[json]'."
        ) from error
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is no JSON: {error}. Give a valid JSON schema.") from error
    with _lock:
        known = _tokenizers.get(tokenizer)
        if known is None:
            try:
                known = from_tokenizer(tokenizer, n_vocab=vocab_size)  # type: ignore[arg-type]
            except Exception as error:  # Rust's, of many kinds
                raise RequestError(
                    f"json_schema can't be followed with this model's {type(tokenizer).__name__}: {error}. Ask without."
                ) from error
            _tokenizers[tokenizer] = known
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
        matcher = llguidance.LLMatcher(known, grammar)
    except ValueError as error:
        raise RequestError(f"json_schema can't be followed: {error}. Give a valid JSON schema.") from error
    if matcher.is_error():
        raise RequestError(f"json_schema can't be followed: {matcher.get_error()}. Give a valid JSON schema.")
    return _JsonSchema(matcher)


class _JsonSchema:
    """What one answer's schema allows next."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, logits: Tensor) -> None:
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1  # [bytes, 8]
        logits[allowed.flatten()[: len(logits)].to(logits.device) == 0] = float("-inf")
        logits[mask.numel() * 8 :] = float("-inf")

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped())
