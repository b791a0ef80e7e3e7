"""What a chat template does with tools, seen by rendering some; and messages for one that does nothing with them."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.models.text.chat_template import render_chat
from loraplex.server.api.messages import Turn
from loraplex.server.api.tools.forms import (
    AUTO,
    FORMS,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_BARE,
    MISTRAL_PLAIN,
    QWEN,
    SMOLLM2,
    CallForm,
)

logger = logging.getLogger(__name__)

Content = str | list[dict[str, str]]  # of a turn

_NAME, _ID = "probe_x7qz", "abcdefghi"  # ids of nine characters are what some templates want
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"k": {"type": "string", "description": "A key."}}},
    },
}
_CALL = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": {"k": "v"}}}
_QUESTION = {"role": "user", "content": "a"}
_HISTORY: tuple[Turn, ...] = (
    _QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "b", "tool_call_id": _ID, "name": _NAME},
)
# How a rendered call shows its form; the first that is found counts.
_SIGNS: tuple[tuple[str, CallForm], ...] = (
    (rf"\[TOOL_CALLS\]\s*\[\s*\{{[^\n]*{_NAME}", MISTRAL),
    (rf"\[TOOL_CALLS\]\s*{_NAME}[^{{\n]*\[ARGS\]", MISTRAL_PLAIN),
    (rf"\[TOOL_CALLS\]\s*{_NAME}\s*\{{", MISTRAL_BARE),
    (rf"<tool_call>\s*<function={_NAME}>", QWEN),
    (rf"<tool_call>\s*\[\s*\{{[^<]*{_NAME}", SMOLLM2),
    (rf"<tool_call>\s*\{{[^<]*{_NAME}", HERMES),
    (rf'\{{\s*"name"\s*:\s*"{_NAME}"\s*,\s*"parameters"', LLAMA3_JSON),
)


class ToolTemplate:
    """The tools of one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parser: str = AUTO) -> None:
        self._tokenizer = tokenizer
        self._parser = parser

    @cached_property
    def has_tools(self) -> bool:
        """Whether the template writes the tools that it is given."""
        return _NAME in self._rendered([_QUESTION])

    @cached_property
    def form(self) -> CallForm:
        """The form of the model's calls. Raises RequestError where none is known."""
        written = self._written
        if self._parser != AUTO:
            form = FORMS[self._parser]
            form = written if written is not None and written.name == form.name else form
        elif self.has_tools:
            if written is None:
                raise RequestError(
                    "the model's chat template writes calls of tools in a form that none of the parsers reads: "
                    f"{', '.join(FORMS)}. Name the nearest one with --tool-call-parser, or ask without tools."
                )
            form = written
        else:
            form = SMOLLM2 if "SmolLM" in str(self._tokenizer.chat_template) else HERMES
        if not self.has_tools and not form.example:
            raise RequestError(
                f"the model's chat template has no place for tools, and calls in the form {form.name!r} can't be asked "
                "for without. Start the server with --tool-call-parser hermes."
            )
        return form

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens that the form's texts have in them."""
        form = self.form
        texts = (form.begin, form.start, form.before_name, form.before_arguments, form.separator, form.close, form.end)
        known = {str(token): number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return {token: number for token, number in known.items() if any(token in text for text in texts)}

    def prepared(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Turn], list[Mapping[str, Any]]]:
        """Turns and tools for the template; where it has no tools, they are turns' texts. Raises RequestError."""
        if self.has_tools:
            return [self._with_short_ids(turn) for turn in turns], list(tools)
        if tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
            return self._as_texts(turns, tools), []
        return list(turns), []

    @cached_property
    def _written(self) -> CallForm | None:
        """The form in which the template writes calls."""
        text = self._rendered(_HISTORY)
        return next((form for sign, form in _SIGNS if re.search(sign, text)), None)

    def _rendered(self, turns: Sequence[Turn]) -> str:
        """With the probe as the only tool; nothing where the template refuses that."""
        try:
            return render_chat(self._tokenizer, turns, tools=[_TOOL], add_generation_prompt=False)
        except RequestError as error:
            logger.debug("the chat template takes no tools: %s", error)
            return ""

    def _with_short_ids(self, turn: Turn) -> Turn:
        """With ids as long as the template wants them; other servers' may be longer."""
        length = self.form.id_length if "tool_calls" in turn or "tool_call_id" in turn else None
        if length is None:
            return turn
        turn = dict(turn)
        if "tool_call_id" in turn:
            turn["tool_call_id"] = turn["tool_call_id"][-length:]
        if "tool_calls" in turn:
            turn["tool_calls"] = [call | {"id": call.get("id", "")[-length:]} for call in turn["tool_calls"]]
        return turn

    # Templates without tools

    def _as_texts(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
        written: list[Turn] = []
        for turn in turns:
            if turn["role"] == "tool":
                content = _joined("<tool_response>\n", turn["content"], "\n</tool_response>")
                if written and written[-1].get("is_response"):
                    written[-1]["content"] = _joined(written[-1]["content"], "\n", content)
                else:
                    written.append({"role": "user", "content": content, "is_response": True})
            elif "tool_calls" in turn:
                written.append({"role": "assistant", "content": self._called(turn)})
            else:
                written.append(dict(turn))
        written = [{field: value for field, value in turn.items() if field != "is_response"} for turn in written]
        return self._with_system(written, _offer(tools, self.form)) if tools else written

    def _called(self, turn: Turn) -> Content:
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in turn["tool_calls"]]
        content = turn["content"]
        return _joined(content, "\n" if content else "", self.form.calls(calls))

    def _with_system(self, turns: list[Turn], text: str) -> list[Turn]:
        """The text in the system's turn, or where a template has none before the first turn's text."""
        if turns[0]["role"] == "system" or not self._takes_system:
            first = turns[0]
            content, is_system = first["content"], first["role"] == "system"
            joined = _joined(content, "\n\n", text) if is_system else _joined(text, "\n\n", content)
            return [first | {"content": joined}, *turns[1:]]
        return [{"role": "system", "content": text}, *turns]

    @cached_property
    def _takes_system(self) -> bool:
        try:
            render_chat(self._tokenizer, [{"role": "system", "content": "s"}, _QUESTION])
        except RequestError:
            return False
        return True


def _joined(*contents: Content) -> Content:
    """One text; parts where there are some, such as images."""
    if all(isinstance(content, str) for content in contents):
        return "".join(contents)  # type: ignore[arg-type]
    parts: list[dict[str, str]] = []
    for content in contents:
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [part for part in parts if part.get("text") != ""]


def _offer(tools: Sequence[Mapping[str, Any]], form: CallForm) -> str:
    """The system's text that offers tools, as Hermes 2 Pro has it."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML "
        "tags. You may call one or more functions to assist with the user query. Don't make assumptions about what "
        f"values to plug into functions.\n<tools>\n{lines}\n</tools>\n{form.example}"
    )
