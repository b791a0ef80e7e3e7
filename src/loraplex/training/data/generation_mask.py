"""Which tokens of a conversation are the assistant's, as a chat template with `{% generation %}` blocks says itself."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marks_generations(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template tells the assistant's tokens, and the tokenizer where each token stands in the text."""
    template = tokenizer.chat_template
    return isinstance(template, str) and tokenizer.is_fast and _MARK.search(template) is not None


def generation_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[range]]:
    """A conversation's tokens, and where the assistant's turns stand. Raises RequestError if the template refuses."""
    try:
        made: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:  # a template is a program, which may fail in any way
        raise RequestError(f"the chat template refuses these messages: {error}.") from error
    return list(made["input_ids"]), _runs(made["assistant_masks"])


def _runs(mask: Sequence[int]) -> list[range]:
    """Where the mask is 1, in runs."""
    edges = [index for index in range(len(mask) + 1) if (mask[index : index + 1] or [0])[0] != ([0, *mask])[index]]
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
