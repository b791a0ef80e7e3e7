"""A tokenizer's chat template: messages as the text that the model reads, and the token that ends an answer in it."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a chat, up to where its answer starts; `variables` are the template's.

    A message's content is a text, or a list of parts: {"type": "text", "text": ..} or {"type": "image"}.

    Raises RequestError without a template, or if it refuses.
    """
    if tokenizer.chat_template is None:
        raise RequestError(
            "the model's tokenizer has no chat template, so a prompt can't be made a user's turn. Pass chat=False (on "
            "the command line --raw, over HTTP /v1/completions) to continue the prompt as it is."
        )
    turns = [dict(message) for message in messages]  # templates may change them
    has_parts = any(isinstance(turn.get("content"), list) for turn in turns)
    if has_parts or _needs_parts(str(tokenizer.chat_template), tokenizer):
        turns = [_in_parts(turn) for turn in turns]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
        )
        return str(text)
    except Exception as error:  # a template is a program, which may fail in any way
        raise RequestError(f"the chat template refuses these messages: {error}.") from error


def _in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    return turn | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


@lru_cache(maxsize=64)
def _needs_parts(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template leaves texts out that are no lists of parts, as those of some vision-language models do."""
    return not _shows(tokenizer, _PROBE) and _shows(tokenizer, [{"type": "text", "text": _PROBE}])


def _shows(tokenizer: PreTrainedTokenizerBase, content: Any) -> bool:
    try:
        return _PROBE in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception as error:  # a template is a program, which may fail in any way
        logger.debug("the chat template refuses a probe: %s", error)
        return False


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
