"""The forms in which models write calls of tools.

The texts are those of the models' own chat templates: Hermes 2 Pro and 3, Qwen 2.5 and 3 (hermes), Llama 3.1 and 3.2
(llama3_json), Mistral's instruct models (mistral), Qwen3-Coder and Qwen 3.5 (qwen), SmolLM2-1.7B-Instruct (smollm2).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """The texts around calls: begin, start, call, separator, call, ..., close."""

    name: str
    kind: Literal["json", "xml"] = "json"
    begin: str  # what calls begin with in an answer; empty: the answer itself begins with them
    start: str = ""  # between that and the first call
    before_name: str = '{"name": "'
    before_arguments: str = '", "arguments": '
    after_arguments: str = "}"
    separator: str
    close: str = ""
    end: str = ""  # what may follow a call, for readers: the text that closes what `begin` opened
    example: str = ""  # what the system prompt shows where a template has no tools; empty: it can't be shown
    id_length: int | None = None  # characters of a call's id; None: any
    max_calls: int = 16  # of an answer that a grammar makes

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One call as a text."""
        written = json.dumps(arguments, ensure_ascii=False)
        return f"{self.before_name}{name}{self.before_arguments}{written}{self.after_arguments}"

    def calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls as an answer has them."""
        return self.begin + self.start + self.separator.join(self.call(*call) for call in calls) + self.close


HERMES = CallForm(
    name="hermes",
    begin="<tool_call>",
    start="\n",
    separator="\n</tool_call>\n<tool_call>\n",
    close="\n</tool_call>",
    end="</tool_call>",
    example=(
        "For each function call return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    ),
)
SMOLLM2 = CallForm(
    name="smollm2",
    begin="<tool_call>",
    start="[",
    separator=", ",
    close="]</tool_call>",
    end="</tool_call>",
    example=(
        "The output MUST strictly adhere to the following format, and NO other text MUST be included where functions "
        'are called:\n<tool_call>[\n{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": '
        '"value2"}},\n... (more tool calls as required)\n]</tool_call>'
    ),
)
LLAMA3_JSON = CallForm(
    name="llama3_json",
    begin="",
    before_arguments='", "parameters": ',
    separator="; ",
    max_calls=1,  # their template takes no turn of more
)
MISTRAL = CallForm(
    name="mistral",
    begin="[TOOL_CALLS]",
    start=" [",
    separator=", ",
    close="]",
    id_length=9,
)
MISTRAL_PLAIN = CallForm(  # tokenizers from version 11 on
    name="mistral",
    begin="[TOOL_CALLS]",
    before_name="",
    before_arguments="[ARGS]",
    after_arguments="",
    separator="[TOOL_CALLS]",
    id_length=9,
)
MISTRAL_BARE = CallForm(  # the same without a token between name and arguments
    name="mistral",
    begin="[TOOL_CALLS]",
    before_name="",
    before_arguments="",
    after_arguments="",
    separator="[TOOL_CALLS]",
    id_length=9,
)
QWEN = CallForm(
    name="qwen",
    kind="xml",
    begin="<tool_call>",
    start="\n",
    before_name="<function=",
    before_arguments=">\n",
    after_arguments="</function>",
    separator="\n</tool_call>\n<tool_call>\n",
    close="\n</tool_call>",
    end="</tool_call>",
)
FORMS: Mapping[str, CallForm] = {form.name: form for form in (HERMES, LLAMA3_JSON, MISTRAL, QWEN, SMOLLM2)}
PARSERS = (AUTO, *FORMS)
