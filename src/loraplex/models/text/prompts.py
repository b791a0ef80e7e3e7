"""From prompts to answers: one call for a batch of texts that each have their own adapters."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from loraplex.errors import BatchError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.chat_template import render_chat
from loraplex.models.text.end_tokens import end_token_ids, generation_ends, stop_rows
from loraplex.routing.adapter_spec import AdapterSpec, parse_adapter_specs
from loraplex.validation import check_text

Prompt = str | Sequence[Mapping[str, str]]  # a text, or the messages of a chat that end with a user's


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """The answers of one batch, in the order of its prompts."""

    texts: list[str]
    num_tokens: list[int]  # generated, the end of the answer included
    seconds: float  # of generation, without tokenizing

    @property
    def tokens_per_s(self) -> float:
        return sum(self.num_tokens) / self.seconds


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, chat: bool = True
) -> BatchEncoding:
    """Token ids and mask [rows, tokens], padded on the left; with `chat`, each prompt is a user's turn or messages.

    Raises BatchError for an empty batch and RequestError without a chat template, or for a text that is none.
    """
    if not prompts:
        raise BatchError("the batch is empty: no prompts were given. Pass at least one.")
    texts = [as_chat(tokenizer, prompt) for prompt in prompts] if chat else [str(prompt) for prompt in prompts]
    for text in texts:
        check_text(text)
    if tokenizer.pad_token_id is None:
        # Masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or str(tokenizer.convert_ids_to_tokens(0))
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat)


def encode_rows(
    model: MultiLoraModel,
    prompts: Sequence[Prompt],
    adapters: Sequence[AdapterSpec] | None,
    *,
    chat: bool = True,
) -> tuple[BatchEncoding, list[PreTrainedTokenizerBase]]:
    """The same for rows that may each have a tokenizer of their own, that of an adapter which brings tokens.

    Raises what `encode_prompts` and `model.tokenizer_of` raise.
    """
    if prompts:
        parse_adapter_specs(adapters, len(prompts))  # which raises for another number of rows
    specs = [None] * len(prompts) if adapters is None else adapters
    tokenizers = [model.tokenizer_of(spec) for spec in specs]
    if all(tokenizer is model.tokenizer for tokenizer in tokenizers):
        return encode_prompts(model.tokenizer, prompts, chat=chat), tokenizers
    rows = [
        encode_prompts(tokenizer, [prompt], chat=chat)["input_ids"][0]
        for tokenizer, prompt in zip(tokenizers, prompts, strict=True)
    ]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)  # masked, so any token will do
    for row, own in enumerate(rows):
        ids[row, longest - len(own) :], mask[row, longest - len(own) :] = own, 1
    return BatchEncoding({"input_ids": ids, "attention_mask": mask}), tokenizers


def generate_texts(
    model: MultiLoraModel,
    prompts: Sequence[Prompt],
    *,
    adapters: Sequence[AdapterSpec] | None = None,
    chat: bool = True,
    max_new_tokens: int = 64,
    **generation: Any,  # whatever else transformers' generate takes
) -> TextBatch:
    """Answer every prompt through its own adapters, in one batch; greedy unless `do_sample=True`."""
    encoded, tokenizers = encode_rows(model, prompts, adapters, chat=chat)
    encoded = encoded.to(model.base.device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
    ends = _row_ends(model, adapters, tokenizers, options)
    start = time.perf_counter()
    sequences = model.generate(encoded["input_ids"], encoded["attention_mask"], adapters=adapters, **options)
    seconds = time.perf_counter() - start
    new_tokens = sequences[:, encoded["input_ids"].shape[1] :]
    return decode_rows(tokenizers, new_tokens, seconds, row_ends=ends)


def _row_ends(
    model: MultiLoraModel,
    adapters: Sequence[AdapterSpec] | None,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    options: dict[str, Any],
) -> list[tuple[int, ...]]:
    """What ends each row; tells `generate` by its options of what it doesn't know. A call's own choice counts."""
    known = generation_ends(model.base, options)
    if "eos_token_id" in options:
        return [known] * len(tokenizers)
    by_tokenizer = {
        tokenizer: end_token_ids(
            model.base, tokenizer, num_tokens=None if tokenizer is model.tokenizer else len(tokenizer)
        )
        for tokenizer in set(tokenizers)
    }
    row_ends = [by_tokenizer[tokenizer] for tokenizer in tokenizers]
    unknown = [tuple(end for end in ends if end not in known) for ends in row_ends]
    if any(unknown):
        stop_rows(options, unknown, model.base)
    of_adapters = model.registry.end_tokens(parse_adapter_specs(adapters, len(tokenizers)))
    return [(*ends, *of_row) for ends, of_row in zip(row_ends, of_adapters, strict=True)]


def decode_batch(
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Tensor,
    seconds: float,
    *,
    end_tokens: Sequence[int] = (),
    row_ends: Sequence[Sequence[int]] | None = None,  # of each row; None: `end_tokens` are all rows'
) -> TextBatch:
    """Text and length of each row's new tokens [rows, tokens], up to the tokenizer's end or one of `end_tokens`."""
    ends = [(*end_tokens, *of_row) for of_row in row_ends or [()] * len(new_tokens)]
    return decode_rows([tokenizer] * len(new_tokens), new_tokens, seconds, row_ends=ends)


def decode_rows(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    new_tokens: Tensor,
    seconds: float,
    *,
    row_ends: Sequence[Sequence[int]],
) -> TextBatch:
    """The same with a tokenizer for each row, up to its end or one of `row_ends`."""
    texts, lengths = [], []
    for tokenizer, row, of_row in zip(tokenizers, new_tokens, row_ends, strict=True):
        ends = [token for token in (tokenizer.eos_token_id, *of_row) if token is not None]
        ended = torch.isin(row, torch.tensor(ends, dtype=torch.int64, device=new_tokens.device)).long()
        lengths.append(int((ended.cumsum(dim=0) - ended == 0).sum()))
        texts.append(str(tokenizer.decode(row[: lengths[-1]], skip_special_tokens=True)).strip())
    return TextBatch(texts=texts, num_tokens=lengths, seconds=seconds)


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """A prompt in the chat template, up to where the answer starts. Raises RequestError as `render_chat`."""
    return render_chat(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


@torch.no_grad()
def first_token_logits(
    model: MultiLoraModel, prompts: Sequence[Prompt], *, adapters: Sequence[AdapterSpec] | None = None
) -> Tensor:  # [rows, vocab]
    """The logits of each answer's first token: enough to judge one-word answers, at the price of a prefill."""
    encoded = encode_rows(model, prompts, adapters)[0].to(model.base.device)
    mask = encoded["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # left padding must not shift absolute positions
    output = model(encoded["input_ids"], mask, adapters=adapters, position_ids=positions, logits_to_keep=1)
    return output.logits[:, -1].float()
