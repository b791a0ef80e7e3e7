"""A tokenizer's chat template: messages as the text that the model reads, and the token that ends an answer in it."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError

logger = logging.getLogger(__name__)

_PROBE = "x7qz"  # an answer that stands nowhere else in a rendered chat
_LOOKS_SPECIAL = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)  # <|im_end|>, <end_of_turn>, [/INST], but no run of blanks


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),  # {"type": "function", "function": {"name", "description", "parameters"}}
    add_generation_prompt: bool = True,
) -> str:
    """The text of a chat, up to where its answer starts. Raises RequestError without a template, or if it refuses."""
    if tokenizer.chat_template is None:
        raise RequestError(
            "the model's tokenizer has no chat template, so a prompt can't be made a user's turn. Pass chat=False (on "
            "the command line --raw, over HTTP /v1/completions) to continue the prompt as it is."
        )
    turns = [dict(message) for message in messages]  # templates may change them
    offered: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt, **offered)
        )
    except Exception as error:  # a template is a program, which may fail in any way
        raise RequestError(f"the chat template refuses these messages: {error}.") from error


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an assistant's turn; None: there is none to be seen."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=False)
    except RequestError as error:
        logger.debug("there is no turn to look at: %s", error)
        return None
    _, found, rest = text.rpartition(_PROBE)
    if not found:
        return None
    special = _special_tokens(tokenizer)
    return next((token for token in tokenizer(rest, add_special_tokens=False)["input_ids"] if token in special), None)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {token for token, added in tokenizer.added_tokens_decoder.items() if _LOOKS_SPECIAL.fullmatch(str(added))}
    return {*tokenizer.all_special_ids, *added}
