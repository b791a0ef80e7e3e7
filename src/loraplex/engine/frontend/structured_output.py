"""Answers that follow a JSON schema, an expression, choices, a grammar or one of tools' calls, through llguidance."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.engine.sampling.params import STRUCTURES, SamplingParams
from loraplex.engine.sampling.sampler import Constraint
from loraplex.errors import RequestError
from loraplex.extras import require_extra

MAX_SCHEMA_BYTES = 2**16
MAX_TOOL_GRAMMAR_BYTES = 2**18  # with the schemas of all tools
MAX_SCHEMA_DEPTH = 32  # objects and lists in one another
MAX_GRAMMAR_BYTES = 2**14  # of a grammar, whose reading in GBNF's form takes a second for each 2**15
_EXPRESSION_FUEL = 100_000  # for the first look at expressions, of which 500,000 take a second
_MAX_LEXER_STATES = 50_000  # of some 2 kB each
_MAX_COMPILED = 32  # grammars that are kept
_LONGEST_ERROR = 300  # characters of llguidance's own words
_NAMES = {"tool_grammar": "the grammar of the tools"}  # of options that requests don't name
_FIXES = {
    "json_schema": "Give a valid, simpler JSON schema.",
    "regex": "Give a valid, simpler regular expression (Rust's syntax, without look-around).",
    "choice": "Give fewer or shorter choices.",
    "grammar": "Give a valid, simpler grammar in Lark's or GBNF's form.",
    "tool_grammar": "Give fewer or simpler tools.",
}
# Between JSON's parts: nothing, a space, or a new line with its indentation. The format allows whitespace without an
# end, and small models write it until they run out of tokens.
_WHITESPACE = r"( |\n[ \t]{0,32})"
_MARKS = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")  # that mean something in an expression


def make_constraint(schema: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Constraint:
    """Raises MissingExtraError without llguidance, and RequestError for a schema that it can't follow."""
    return constraint_of(SamplingParams(json_schema=schema), tokenizer, vocab_size)


def constraint_of(
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    end_tokens: Collection[int] = (),  # that end an answer where a grammar of tools may end
) -> Constraint:
    """What sampling parameters ask for, of which `has_structure`; raises as `make_constraint`."""
    option = next(option for option in STRUCTURES if getattr(sampling, option) is not None)
    require_extra("json", option)
    structure = _structure(sampling)
    with _lock:
        grammars = _grammars.get(tokenizer)
        if grammars is None:
            grammars = _grammars[tokenizer] = _Grammars(tokenizer, vocab_size)
    matcher = grammars.matcher(structure)
    if structure.option == "tool_grammar":
        return _ToolGrammar(matcher, sorted(end_tokens))
    return _Structured(matcher, structure.option)


class _Structure(NamedTuple):
    """What an answer follows: the option that says so, and its text."""

    option: str
    text: str
    whitespace: bool = True  # between the parts of JSON


def _structure(sampling: SamplingParams) -> _Structure:
    """Checked in size. Raises RequestError."""
    if sampling.json_schema is not None:
        return _Structure("json_schema", _checked_text(sampling.json_schema), sampling.json_whitespace)
    if sampling.regex is not None:
        option, text = "regex", sampling.regex
    elif sampling.choice is not None:
        option, text = "choice", "|".join(sampling.choice)
    elif sampling.tool_grammar is not None:
        option, text = "tool_grammar", sampling.tool_grammar
    else:
        option, text = "grammar", sampling.grammar or ""
    most = {"grammar": MAX_GRAMMAR_BYTES, "tool_grammar": MAX_TOOL_GRAMMAR_BYTES}.get(option, MAX_SCHEMA_BYTES)
    if len(text) > most:
        raise RequestError(
            f"{_NAMES.get(option, option)} has {len(text)} characters; {most} are possible. {_FIXES[option]}"
        )
    if sampling.choice is not None:
        # One expression: of alternatives of a grammar each would be an item of its parser, which has 2,000 at most.
        text = "|".join(_MARKS.sub(r"\\\g<0>", choice) for choice in sampling.choice)
    return _Structure(option, text)


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
    """The grammars of late, compiled for one tokenizer: the answers of a request share one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._lock = threading.Lock()
        self._compiled: OrderedDict[_Structure, Any] = OrderedDict()
        self._tokenizer: Any = None
        self._fault = ""
        try:
            from llguidance.hf import from_tokenizer

            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size)  # type: ignore[arg-type]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Rust's, of many kinds; its panics are no Exceptions
            self._fault = f"can't be followed with this model's {type(tokenizer).__name__}: {error}. Ask without."

    def matcher(self, structure: _Structure) -> Any:
        """Raises RequestError."""
        if self._fault:
            raise RequestError(f"{_NAMES.get(structure.option, structure.option)} {self._fault}")
        with self._lock:
            known = self._compiled.get(structure)
            if known is None:
                known = self._compiled[structure] = self._compile(structure)
            self._compiled.move_to_end(structure)
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            return known.deep_copy()

    def _compile(self, structure: _Structure) -> Any:
        import llguidance

        fuel = None if structure.option in ("json_schema", "tool_grammar") else _EXPRESSION_FUEL
        limits = llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, initial_lexer_fuel=fuel, verbose_errors=False
        )
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, _grammar(structure), log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            told = str(error).partition("<state>")[0].strip()[:_LONGEST_ERROR]
            name = _NAMES.get(structure.option, structure.option)
            raise RequestError(f"{name} can't be followed: {told}. {_FIXES[structure.option]}") from error
        _check(matcher, structure.option)
        first = matcher.deep_copy()
        first.compute_bitmask()  # a $ref that leads to itself is found here: no token begins it
        _check(first, structure.option)
        return matcher


def _grammar(structure: _Structure) -> str:
    """In llguidance's own form. Raises ValueError."""
    import llguidance

    if structure.option == "tool_grammar":
        return structure.text
    if structure.option != "json_schema":
        form: Any = "regex" if structure.option == "choice" else structure.option  # its names are llguidance's
        return str(llguidance.grammar_from(form, structure.text))
    spaces: Any = {"whitespace_pattern": _WHITESPACE} if structure.whitespace else {"whitespace_flexible": False}
    return str(llguidance.LLMatcher.grammar_from_json_schema(structure.text, overrides=spaces))


class _Structured:
    """What one answer's grammar allows next. An answer that can't go on as it wants fails with RequestError."""

    def __init__(self, matcher: Any, option: str) -> None:
        self._matcher = matcher
        self._option = option
        self._mask = b""  # of the next token

    def allow(self, logits: Tensor) -> None:
        self._mask = self._matcher.compute_bitmask()
        mask = torch.frombuffer(bytearray(self._mask), dtype=torch.uint8)
        _check(self._matcher, self._option)
        allowed = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1  # [bytes, 8]
        logits[allowed.flatten()[: len(logits)].to(logits.device) == 0] = float("-inf")
        logits[mask.numel() * 8 :] = float("-inf")

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            if self._allows(token):  # what follows it is too much to be looked at
                _check(self._matcher, self._option)
            raise RequestError(
                f"the answer can't go on as {self._option} wants: its token {token} is not allowed here. Where "
                "logit_bias forbids what it needs, leave that out."
            )

    def _allows(self, token: int) -> bool:
        return token // 8 < len(self._mask) and bool(self._mask[token // 8] >> token % 8 & 1)

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class _ToolGrammar(_Structured):
    """The same of a grammar whose answers may be over before nothing can follow: then by any of the end tokens."""

    def __init__(self, matcher: Any, end_tokens: list[int]) -> None:
        super().__init__(matcher, "tool_grammar")
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


def _check(matcher: Any, option: str) -> None:
    """Raise RequestError for a matcher in its error state, in which it would seem to have stopped."""
    if matcher.is_error():
        told = matcher.get_error().partition("<state>")[0].strip()[:_LONGEST_ERROR]
        raise RequestError(f"{_NAMES.get(option, option)} can't be followed: {told}. {_FIXES[option]}")


# Reading a tokenizer takes a second.
_grammars: "WeakKeyDictionary[PreTrainedTokenizerBase, _Grammars]" = WeakKeyDictionary()
_lock = threading.Lock()
