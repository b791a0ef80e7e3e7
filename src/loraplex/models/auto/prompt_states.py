"""The base model's last hidden states at prompts' last tokens, and the centroids that are made of them."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.prompt_centroid import PromptCentroid
from loraplex.errors import RequestError, UnsupportedAdapterError
from loraplex.layers.base.decoder import find_decoder
from loraplex.models.auto.background_prompts import BACKGROUND_PROMPTS
from loraplex.models.text.chat_template import render_chat

MAX_PROMPTS = 64  # that a centroid is made of: the mean of more is hardly another
_BATCH_ROWS = 16

Prompt = str | Sequence[Mapping[str, str]]


@torch.no_grad()
def last_states(base: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:  # [rows, hidden]  float32
    """Of each prompt's tokens. Rows of one length share passes: nothing is padded, which some models can't."""
    decoder = find_decoder(base)
    if decoder is None or getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedAdapterError(
            f"adapters='auto' reads the hidden states of a decoder, and {type(base).__name__} has none. Name adapters."
        )
    found: dict[int, Tensor] = {}
    for batch in _batches(rows):
        ids = torch.tensor([rows[row] for row in batch], device=base.device)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1].float().cpu()
        found |= dict(zip(batch, hidden, strict=True))
    return torch.stack([found[row] for row in range(len(rows))])


def row_states(base: PreTrainedModel, input_ids: Tensor, mask: Tensor | None) -> Tensor:  # [rows, hidden]
    """`last_states` of the rows of a batch, without their padding. Raises RequestError for a row of nothing else."""
    if mask is None:
        mask = torch.ones_like(input_ids)
    rows = [ids[own.bool()].tolist() for ids, own in zip(input_ids, mask, strict=True)]
    if not rows or not all(rows):
        raise RequestError("adapters='auto' needs at least one row, each of at least one token that isn't padding.")
    return last_states(base, rows)


def fit_centroids(
    base: PreTrainedModel,
    prompts: Mapping[str, Sequence[Sequence[int]]],  # tokens
    background_prompts: Sequence[Sequence[int]],  # tokens of prompts about anything
) -> dict[str, PromptCentroid]:
    """A centroid for each name. Raises RequestError for a name without prompts."""
    empty = sorted(name for name, rows in prompts.items() if not rows or not all(rows))
    if empty:
        raise RequestError(
            f"{empty[0]!r} has no prompts to make a centroid of, or one without tokens. Give at least one, none empty."
        )
    background = last_states(base, background_prompts).mean(dim=0)
    return {
        name: PromptCentroid(
            mean=last_states(base, rows[:MAX_PROMPTS]).mean(dim=0),
            background=background,
            num_prompts=min(len(rows), MAX_PROMPTS),
        )
        for name, rows in prompts.items()
    }


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool = True) -> list[int]:
    """A prompt's tokens up to where the answer starts: a text or the messages of a chat."""
    if not chat:
        if not isinstance(prompt, str):
            raise RequestError("messages need a chat template; give a text where chat=False.")
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = tokenizer(render_chat(tokenizer, messages), add_special_tokens=False)["input_ids"]
    return ids


def background_tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts about anything, as chats where the tokenizer has a template."""
    chat = tokenizer.chat_template is not None
    return [prompt_tokens(tokenizer, prompt, chat=chat) for prompt in BACKGROUND_PROMPTS]


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Rows of one length together."""
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(rows):
        by_length.setdefault(len(ids), []).append(row)
    for members in by_length.values():
        for start in range(0, len(members), _BATCH_ROWS):
            yield members[start : start + _BATCH_ROWS]
