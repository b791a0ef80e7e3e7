"""Calls of tools in an answer's text, found while it comes.

A call is told as soon as its name is known to be a tool's and its arguments begin; they follow as the model writes
them. What looks like a call and is none (another name, no JSON) stays content. Between calls, and before the first one,
blanks are no content.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from loraplex.server.api.tools.definitions import FunctionDefinition
from loraplex.server.api.tools.events import ArgumentsPiece, CallBegin, ContentPiece, ToolEvent, ToolParser, joined
from loraplex.server.api.tools.forms import CallForm
from loraplex.server.api.tools.grammar import is_json_coded
from loraplex.server.api.tools.json_scanner import JsonScanner

_JSON_HEAD = re.compile(
    r'\s*(?:\[\s*)?\{\s*"name"\s*:\s*("[A-Za-z0-9_-]*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# No two blanks side by side: what a model writes could be matched in ways without number.
_PLAIN_HEAD = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(?:\[ARGS\]\s*)?(?=\{)")
_PLAIN_HEAD_SO_FAR = re.compile(r"\s*(?:[A-Za-z0-9_-]{1,64}\s*(?:\[A?R?G?S?\]?\s*)?)?")
_BEFORE_OBJECT = re.compile(r"\s*(?:\[\s*)?")
_PYTHON_TAG = "<|python_tag|>"  # of Llama 3, before calls
_XML_HEAD = re.compile(r"\s*<function=([^>\n]*)>")
_XML_HEAD_SO_FAR = re.compile(r"<?|<f[a-z]{0,7}|<function=[^>\n]*")
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
_XML_END = re.compile(r"\s*</function>")
_LONGEST_HEAD = 2**14  # characters in which a call's name and the beginning of its arguments must stand


def make_parser(form: CallForm, functions: Mapping[str, FunctionDefinition]) -> ToolParser:
    """A parser of one answer in a form; only calls of these functions are calls."""
    return _XmlCalls(form, functions) if form.kind == "xml" else _JsonCalls(form, functions)


class _Calls(ABC):
    """Content until calls begin; what follows is the form's."""

    def __init__(self, form: CallForm, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._buffer = ""
        self._events: list[ToolEvent] = []
        self._space = ""  # blanks at the end of content, which are none before a call
        self._skipped = ""  # what was read of a call that may turn out to be none
        self._num_calls = 0
        self.is_in_call = False
        self._read = self._read_content

    def feed(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        while self._buffer and self._read():
            pass
        events, self._events = joined(self._events), []
        return events

    def end(self) -> list[ToolEvent]:
        if self._read in (self._read_content, self._read_head, self._read_rest_as_content):
            self._add_content(self._skipped + self._buffer)
            if not self._num_calls and self._space:
                self._events.append(ContentPiece(self._space))
        events, self._events, self._buffer = joined(self._events), [], ""
        return events

    # Each reads some of the buffer, and tells whether there may be more to do; else more text is needed.

    def _read_content(self) -> bool:
        if not self._form.begin:
            return self._read_first()
        start = self._buffer.find(self._form.begin)
        if start < 0:
            kept = _overlap(self._buffer, self._form.begin)
            self._add_content(self._take(len(self._buffer) - kept))
            return False
        self._add_content(self._take(start))
        self._begin_call(self._take(len(self._form.begin)))
        return True

    def _read_first(self) -> bool:
        """Of a form without a mark: the answer is calls if it begins like one."""
        start = self._buffer.lstrip()
        if start.startswith("{"):
            self._begin_call("")
        elif start.startswith(_PYTHON_TAG):
            self._begin_call(self._take(self._buffer.index(_PYTHON_TAG) + len(_PYTHON_TAG)))
        elif _PYTHON_TAG.startswith(start):  # so far
            return False
        else:
            self._read = self._read_rest_as_content
        return True

    def _read_rest_as_content(self) -> bool:
        self._add_content(self._take(len(self._buffer)))
        return False

    @abstractmethod
    def _read_head(self) -> bool:
        """A call's name, and what stands before its arguments."""

    def _begin_call(self, skipped: str) -> None:
        self._skipped = skipped
        self._read = self._read_head

    def _start_call(self, name: str) -> None:
        self._skipped = self._space = ""
        self._events.append(CallBegin(self._num_calls, name))
        self.is_in_call = True
        self._num_calls += 1

    def _add_arguments(self, text: str) -> None:
        if text:
            self._events.append(ArgumentsPiece(self._num_calls - 1, text))

    def _is_no_call(self) -> bool:
        """What was skipped is content, and so may be what follows."""
        skipped, self._skipped = self._skipped, ""
        self._add_content(skipped)
        self._read = self._read_content if self._form.begin else self._read_rest_as_content
        return True

    def _add_content(self, text: str) -> None:
        text = self._space + text
        told = text.rstrip()
        self._space = text[len(told) :]
        if told:
            self._events.append(ContentPiece(told))

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken


class _JsonCalls(_Calls):
    """JSON objects with a name and arguments, in lists or one after another; or a name and then its arguments."""

    def __init__(self, form: CallForm, functions: Mapping[str, FunctionDefinition]) -> None:
        super().__init__(form, functions)
        self._is_plain = not form.before_name
        self._scanner = JsonScanner()
        self._scanned = 0  # characters of the buffer

    def _begin_call(self, skipped: str) -> None:
        super()._begin_call(skipped)
        self._scanner, self._scanned = JsonScanner(), 0

    def _read_head(self) -> bool:
        first = self._buffer.lstrip()[:1]
        if not first:
            return False
        self._is_plain = self._form.name == "mistral" and first not in "[{"  # its models write either
        found = (_PLAIN_HEAD if self._is_plain else _JSON_HEAD).match(self._buffer)
        if found is None and self._is_plain:
            is_open = len(self._buffer) <= _LONGEST_HEAD and _PLAIN_HEAD_SO_FAR.fullmatch(self._buffer)
            return False if is_open else self._is_no_call()
        if found is None:
            return self._read_object() if first in "[{" else self._is_no_call()
        name = found[1] if self._is_plain else json.loads(found[1])
        if name not in self._names:
            return self._is_no_call()
        self._take(found.end())
        self._start_call(name)
        self._scanner, self._read = JsonScanner(), self._read_arguments
        return True

    def _read_object(self) -> bool:
        """A call in another order, or without arguments: read when it is complete."""
        start = _BEFORE_OBJECT.match(self._buffer)
        assert start is not None, "the pattern matches nothing at least"
        self._scanned = max(self._scanned, start.end())
        stop = self._scanner.scan(self._buffer[self._scanned :])
        if stop is not None:
            return self._read_whole_call(start.end(), self._scanned + stop)
        self._scanned = len(self._buffer)
        is_over = self._form.end and self._form.end in self._buffer
        return self._is_no_call() if is_over or self._scanned > _LONGEST_HEAD else False

    def _read_whole_call(self, start: int, stop: int) -> bool:
        call = _call_of(self._buffer[start:stop])
        if call is None or call[0] not in self._names:
            return self._is_no_call()
        self._take(stop)
        self._start_call(call[0])
        self._add_arguments(call[1])
        self.is_in_call = False
        self._read = self._read_after
        return True

    def _read_arguments(self) -> bool:
        stop = self._scanner.scan(self._buffer)
        self._add_arguments(self._take(len(self._buffer) if stop is None else stop))
        if stop is not None:
            self.is_in_call = False
            self._scanner = JsonScanner(depth=1)
            self._read = self._read_after if self._is_plain else self._read_rest_of_object
        return stop is not None

    def _read_rest_of_object(self) -> bool:
        """Up to the end of the object that has the call; more fields, such as an id, say nothing here."""
        stop = self._scanner.scan(self._buffer)
        self._take(len(self._buffer) if stop is None else stop)
        self._read = self._read_rest_of_object if stop is None else self._read_after
        return stop is not None

    def _read_after(self) -> bool:
        """Another call, the end of calls, or content."""
        rest = self._buffer.lstrip()
        if not rest:
            return False
        if rest[0] in ",;" and not self._is_plain:
            self._begin_call(self._take(len(self._buffer) - len(rest) + 1))
            return True
        if rest[0] == "]":
            self._take(len(self._buffer) - len(rest) + 1)
            return True
        if self._form.end and rest.startswith(self._form.end):
            self._take(len(self._buffer) - len(rest) + len(self._form.end))
        elif self._form.end and self._form.end.startswith(rest):
            return False
        self._read = self._read_content if self._form.begin else self._read_rest_as_content
        return True


class _XmlCalls(_Calls):
    """`<function=NAME>` and a `<parameter=NAME>` for each argument, whose text stands between lines of its own."""

    def __init__(self, form: CallForm, functions: Mapping[str, FunctionDefinition]) -> None:
        super().__init__(form, functions)
        self._functions = functions
        self._properties: Mapping[str, Any] = {}
        self._num_arguments = 0

    def _read_head(self) -> bool:
        found = _XML_HEAD.match(self._buffer)
        if found is None:
            head = self._buffer.lstrip()
            is_open = _XML_HEAD_SO_FAR.fullmatch(head) is not None and len(head) < _LONGEST_HEAD
            return False if is_open else self._is_no_call()
        if found[1] not in self._names:
            return self._is_no_call()
        self._take(found.end())
        self._start_call(found[1])
        self._properties = (self._functions[found[1]].parameters or {}).get("properties") or {}
        self._num_arguments = 0
        self._read = self._read_parameters
        return True

    def _read_parameters(self) -> bool:
        if (end := _XML_END.match(self._buffer)) is not None:
            self._take(end.end())
            self._add_arguments("}" if self._num_arguments else "{}")
            self.is_in_call = False
            self._read = self._read_after
            return True
        if "</parameter>" not in self._buffer:
            return False
        found = _XML_PARAMETER.match(self._buffer)
        if found is None:  # what no parameter is, and what stands behind it, says nothing
            self._take(self._buffer.index("</parameter>") + len("</parameter>"))
            return True
        self._take(found.end())
        value = json.dumps(_xml_value(found[2], self._properties.get(found[1])), ensure_ascii=False)
        self._add_arguments(("{" if not self._num_arguments else ", ") + f"{json.dumps(found[1])}: {value}")
        self._num_arguments += 1
        return True

    def _read_after(self) -> bool:
        rest = self._buffer.lstrip()
        if not rest or (self._form.end.startswith(rest) and rest != self._form.end):
            return False
        if rest.startswith(self._form.end):
            self._take(len(self._buffer) - len(rest) + len(self._form.end))
        self._read = self._read_content
        return True


def _xml_value(text: str, schema: Any) -> Any:
    """A parameter's text as the value that its schema wants: texts as they stand, all else as JSON where it is some."""
    schema = schema if isinstance(schema, dict) else {}
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if types == ["string"] and not (is_json_coded(schema) and text.startswith('"')):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if types == ["string"] or "string" not in types or _json_type(value) in types else text


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _call_of(text: str) -> tuple[str, str] | None:
    """The name and arguments of a whole call; None for what is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # JSON in a text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
