"""The tools of one request: its prompt, what its answers may be, and reading them."""

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import RequestError
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.messages import Turn
from loraplex.server.api.tools.definitions import FunctionDefinition, NamedToolChoice, checked_functions, template_tool
from loraplex.server.api.tools.events import ToolParser
from loraplex.server.api.tools.grammar import CallRules, UnwritableSchemaError, call_grammar
from loraplex.server.api.tools.parser import make_parser
from loraplex.server.api.tools.templates import ToolTemplate

_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Which functions a request offers, and whether its answers must call one."""

    offered: tuple[FunctionDefinition, ...] = ()  # that the model is told of
    functions: tuple[FunctionDefinition, ...] = ()  # that it may call
    must_call: bool = False
    parallel: bool = True

    @classmethod
    def of(
        cls, functions: Sequence[FunctionDefinition], choice: str | NamedToolChoice | None, *, parallel: bool | None
    ) -> "ToolUse":
        """Raises ApiError that names the field. With "none" the model is told of no tools."""
        offered = checked_functions(functions)
        if choice in (None, "auto", "none"):
            offered = [] if choice == "none" else offered
            return cls(offered=tuple(offered), functions=tuple(offered), parallel=parallel is not False)
        if not offered:
            raise ApiError(BAD_REQUEST, "tool_choice needs tools.", param="tool_choice")
        if isinstance(choice, NamedToolChoice):
            named = [function for function in offered if function.name == choice.function.name]
            if not named:
                known = ", ".join(function.name for function in offered[:5])
                message = f"tool_choice names {choice.function.name!r}, which is none of the tools: {known}."
                raise ApiError(BAD_REQUEST, message, param="tool_choice", quotes_request=True)
            return cls(offered=tuple(offered), functions=tuple(named), must_call=True, parallel=False)
        return cls(offered=tuple(offered), functions=tuple(offered), must_call=True, parallel=parallel is not False)

    @property
    def any(self) -> bool:
        return bool(self.functions)

    def prepared(self, turns: Sequence[Turn], template: ToolTemplate) -> tuple[list[Turn], list[Mapping[str, Any]]]:
        """Turns and tools for the chat template. Raises ApiError."""
        has_calls = any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
        if not self.any and not has_calls:
            return list(turns), []
        try:
            return template.prepared(turns, [template_tool(function) for function in self.offered])
        except RequestError as error:
            raise ApiError(BAD_REQUEST, str(error), param="tools") from error

    def sampling(self, sampling: SamplingParams, template: ToolTemplate) -> SamplingParams:
        """With the grammar of calls, where the request asks for calls that fit. Raises ApiError."""
        if not self.any:
            return sampling
        content = sampling.json_schema
        assert not isinstance(content, str), "the server's schemas are mappings"
        is_strict = any(function.strict for function in self.functions)
        wants_grammar = self.must_call or is_strict or not self.parallel or content is not None
        if wants_grammar and content is None and sampling.has_structure:
            raise ApiError(
                BAD_REQUEST,
                "an answer that follows a regex, a choice or a grammar can't be a call of a tool. Leave that out, or "
                "tool_choice, parallel_tool_calls: false and strict functions.",
                param="tools",
            )
        try:
            grammar = None
            if wants_grammar:
                rules = CallRules(
                    functions=self.functions,
                    must_call=self.must_call,
                    max_calls=template.form.max_calls if self.parallel else 1,
                    content_schema=content,
                    content_spaces=sampling.json_whitespace,
                )
                grammar = call_grammar(template.form, rules, template.special_tokens)
            shows_special = bool(template.special_tokens)
        except (RequestError, UnwritableSchemaError) as error:
            raise ApiError(BAD_REQUEST, str(error), param="tools", quotes_request=True) from error
        return replace(
            sampling,
            json_schema=None if wants_grammar else content,
            tool_grammar=grammar,
            skip_special_tokens=sampling.skip_special_tokens and not shows_special,
        )

    def parser(self, template: ToolTemplate) -> ToolParser | None:
        """For one answer; None where there are no tools that it could call."""
        if not self.any:
            return None
        return make_parser(template.form, {function.name: function for function in self.functions})


def call_id(template: ToolTemplate) -> str:
    """A new one, of the length that the model's template wants."""
    length = template.form.id_length
    if length is None:
        return f"call_{secrets.token_hex(12)}"
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(length))
