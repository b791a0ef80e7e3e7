"""Answers that follow a JSON schema, or the grammar of calls of tools, through llguidance."""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.engine.sampling.sampler import Constraint
from loraplex.errors import RequestError
from loraplex.extras import require_extra

MAX_SCHEMA_BYTES = 2**16
MAX_TOOL_GRAMMAR_BYTES = 2**18  # with the schemas of all tools
MAX_SCHEMA_DEPTH = 32  # objects and lists in one another
_MAX_LEXER_STATES = 50_000  # of some 2 kB each
_MAX_COMPILED = 32  # grammars that are kept
_LONGEST_ERROR = 300  # characters of llguidance's own words
# Between JSON's parts: nothing, a space, or a new line with its indentation. The format allows whitespace without an
# end, and small models write it until they run out of tokens.
_WHITESPACE = r"( |\n[ \t]{0,32})"


def make_constraint(schema: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Constraint:
    """Raises MissingExtraError without llguidance, and RequestError for a schema that it can't follow."""
    require_extra("json", "json_schema")
    text = _checked_text(schema)
    return _JsonSchema(_grammars_of(tokenizer, vocab_size).matcher(text))


def make_tool_constraint(
    grammar: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, end_tokens: Collection[int]
) -> Constraint:
    """What a grammar in llguidance's form of Lark allows; where it may end, so may the answer, by any end token.

    Raises MissingExtraError without llguidance, and RequestError for a grammar that it can't follow.
    """
    require_extra("json", "tools that are called by a schema")
    if len(grammar) > MAX_TOOL_GRAMMAR_BYTES:
        raise RequestError(
            f"the tools make a grammar of {len(grammar)} characters; {MAX_TOOL_GRAMMAR_BYTES} are possible. Give fewer "
            "or smaller ones."
        )
    try:
        matcher = _grammars_of(tokenizer, vocab_size).matcher(grammar, is_lark=True)
    except RequestError as error:
        raise RequestError(str(error).replace("json_schema", "the grammar of the tools", 1)) from error
    return _ToolGrammar(matcher, sorted(end_tokens))


def _grammars_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> "_Grammars":
    with _lock:
        grammars = _grammars.get(tokenizer)
        if grammars is None:
            grammars = _grammars[tokenizer] = _Grammars(tokenizer, vocab_size)
    return grammars


def _checked_text(schema: Mapping[str, Any] | str) -> str:
    """The schema's JSON. Raises RequestError for what is none, or too large or deep to be looked at."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is no JSON: {error}. Give a valid JSON schema.") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"json_schema has {len(text)} characters; {MAX_SCHEMA_BYTES} are possible. Give a smaller one."
        )
    try:
        level: list[Any] = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is no JSON: {error}. Give a valid JSON schema.") from error
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        level = [value for container in level for value in _values(container)]
        if not level:
            return text
    raise RequestError(f"json_schema is nested more than {MAX_SCHEMA_DEPTH} deep. Give a flatter one, with $defs.")


def _values(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return list(container.values())
    return container if isinstance(container, list) else []


class _Grammars:
    """The schemas of late, compiled for one tokenizer: the answers of a request share one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, bool], Any] = OrderedDict()
        self._tokenizer: Any = None
        self._fault = ""
        try:
            from llguidance.hf import from_tokenizer

            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size)  # type: ignore[arg-type]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Rust's, of many kinds; its panics are no Exceptions
            self._fault = (
                f"json_schema can't be followed with this model's {type(tokenizer).__name__}: {error}. Ask without."
            )

    def matcher(self, text: str, *, is_lark: bool = False) -> Any:
        """Of a JSON schema, or of a grammar. Raises RequestError."""
        key = (text, is_lark)
        if self._fault:
            raise RequestError(self._fault)
        with self._lock:
            known = self._compiled.get(key)
            if known is None:
                known = self._compiled[key] = self._compile(key)
            self._compiled.move_to_end(key)
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            return known.deep_copy()

    def _compile(self, key: tuple[str, bool]) -> Any:
        import llguidance

        text, is_lark = key
        limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        try:
            spaces: Any = {"whitespace_pattern": _WHITESPACE}
            grammar = text if is_lark else llguidance.LLMatcher.grammar_from_json_schema(text, overrides=spaces)
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise RequestError(f"json_schema can't be followed: {error}. Give a valid JSON schema.") from error
        _check(matcher)
        first = matcher.deep_copy()
        first.compute_bitmask()  # a $ref that leads to itself is found here: no token begins it
        _check(first)
        return matcher


class _JsonSchema:
    """What one answer's schema allows next. An answer that can't go on as the schema wants fails with RequestError."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, logits: Tensor) -> None:
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        _check(self._matcher)
        allowed = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1  # [bytes, 8]
        logits[allowed.flatten()[: len(logits)].to(logits.device) == 0] = float("-inf")
        logits[mask.numel() * 8 :] = float("-inf")

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise RequestError(
                f"the answer can't go on as json_schema wants: its token {token} is not allowed here. Where logit_bias "
                "forbids what the schema needs, leave it out."
            )

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class _ToolGrammar(_JsonSchema):
    """The same of a grammar whose answers may be over before nothing can follow: then by any of the end tokens."""

    def __init__(self, matcher: Any, end_tokens: list[int]) -> None:
        super().__init__(matcher)
        self._ends = end_tokens
        self._has_ended = False

    def allow(self, logits: Tensor) -> None:
        ends = [token for token in self._ends if token < len(logits)] if self._matcher.is_accepting() else []
        kept = logits[ends]
        super().allow(logits)
        logits[ends] = kept

    def take(self, token: int) -> None:
        if token in self._ends and self._matcher.is_accepting():
            self._has_ended = True
        else:
            super().take(token)

    @property
    def is_complete(self) -> bool:
        return self._has_ended or super().is_complete


def _check(matcher: Any) -> None:
    """Raise RequestError for a matcher in its error state, in which it would seem to have stopped."""
    if matcher.is_error():
        told = matcher.get_error().partition("<state>")[0].strip()[:_LONGEST_ERROR]
        raise RequestError(f"json_schema can't be followed: {told}. Give a valid, simpler JSON schema.")


# Reading a tokenizer takes a second.
_grammars: "WeakKeyDictionary[PreTrainedTokenizerBase, _Grammars]" = WeakKeyDictionary()
_lock = threading.Lock()
