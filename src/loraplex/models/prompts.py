"""From prompts to answers: one call for a batch of texts that each have their own adapters."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from loraplex.errors import BatchError
from loraplex.models.chat_template import render_chat
from loraplex.models.end_tokens import end_token_ids, generation_ends, stop_rows
from loraplex.models.multi_lora import MultiLoraModel
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
    encoded = encode_prompts(model.tokenizer, prompts, chat=chat).to(model.base.device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
    ends = _row_ends(model, adapters, len(prompts), options)
    start = time.perf_counter()
    sequences = model.generate(encoded["input_ids"], encoded["attention_mask"], adapters=adapters, **options)
    seconds = time.perf_counter() - start
    new_tokens = sequences[:, encoded["input_ids"].shape[1] :]
    return decode_batch(model.tokenizer, new_tokens, seconds, row_ends=ends)


def _row_ends(
    model: MultiLoraModel, adapters: Sequence[AdapterSpec] | None, num_rows: int, options: dict[str, Any]
) -> list[tuple[int, ...]]:
    """What ends each row; tells `generate` by its options of what it doesn't know. A call's own choice counts."""
    known, base_ends = generation_ends(model.base, options), end_token_ids(model.base, model.tokenizer)
    if "eos_token_id" in options:
        return [known] * num_rows
    unknown = tuple(end for end in base_ends if end not in known)
    if unknown:
        stop_rows(options, [unknown] * num_rows, model.base)
    of_adapters = model.registry.end_tokens(parse_adapter_specs(adapters, num_rows))
    return [(*base_ends, *of_row) for of_row in of_adapters]


def decode_batch(
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Tensor,
    seconds: float,
    *,
    end_tokens: Sequence[int] = (),
    row_ends: Sequence[Sequence[int]] | None = None,  # of each row; None: `end_tokens` are all rows'
) -> TextBatch:
    """Text and length of each row's new tokens [rows, tokens], up to the tokenizer's end or one of `end_tokens`."""
    always = [token for token in (tokenizer.eos_token_id, *end_tokens) if token is not None]
    ended = torch.stack(
        [
            torch.isin(row, torch.tensor([*always, *ends], dtype=torch.int64, device=new_tokens.device))
            for row, ends in zip(new_tokens, row_ends or [()] * len(new_tokens), strict=True)
        ]
    ).long()
    past_end = (ended.cumsum(dim=1) - ended) > 0
    lengths = (~past_end).sum(dim=1).tolist()
    texts = [
        str(tokenizer.decode(row[:length], skip_special_tokens=True)).strip()
        for row, length in zip(new_tokens, lengths, strict=True)
    ]
    return TextBatch(texts=texts, num_tokens=[int(n) for n in lengths], seconds=seconds)


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """A prompt in the chat template, up to where the answer starts. Raises RequestError as `render_chat`."""
    return render_chat(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


@torch.no_grad()
def first_token_logits(
    model: MultiLoraModel, prompts: Sequence[Prompt], *, adapters: Sequence[AdapterSpec] | None = None
) -> Tensor:  # [rows, vocab]
    """The logits of each answer's first token: enough to judge one-word answers, at the price of a prefill."""
    encoded = encode_prompts(model.tokenizer, prompts).to(model.base.device)
    mask = encoded["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # left padding must not shift absolute positions
    output = model(encoded["input_ids"], mask, adapters=adapters, position_ids=positions, logits_to_keep=1)
    return output.logits[:, -1].float()
