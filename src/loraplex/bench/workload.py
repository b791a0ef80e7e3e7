"""What arrives when: Poisson arrivals, adapters that are asked for as often as Zipf has it, prompts of real lengths."""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplex.errors import ConfigError
from loraplex.models.text.chat_template import render_chat
from loraplex.training.data.records import Record, read_records

PromptSource = Callable[[random.Random], list[int]]  # draws a prompt's token ids
NameSource = Callable[[random.Random], str]  # draws an adapter's name


def poisson_times(rate: float, seconds: float, draw: random.Random) -> list[float]:
    """Times of arrival in seconds, `rate` of them a second on average, independent of one another."""
    gaps = (draw.expovariate(rate) for _ in itertools.count())
    return list(itertools.takewhile(lambda at: at < seconds, itertools.accumulate(gaps)))


def zipf_names(names: Sequence[str], exponent: float, seed: int = 0) -> NameSource:
    """Draw the k-th most popular name with probability 1 / k**exponent; who is popular is drawn from `seed`."""
    by_popularity = random.Random(seed).sample(list(names), len(names))
    weights = list(itertools.accumulate((k + 1) ** -exponent for k in range(len(names))))
    return lambda draw: draw.choices(by_popularity, cum_weights=weights)[0]


def uniform_names(names: Sequence[str]) -> NameSource:
    """Draw every name equally often."""
    return lambda draw: draw.choice(names)


def random_prompts(vocab_size: int, num_tokens: int) -> PromptSource:
    """Prompts of one length that have nothing in common, without special tokens, which come first in most models."""
    first = vocab_size // 8
    return lambda draw: [draw.randrange(first, vocab_size) for _ in range(num_tokens)]


def file_prompts(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path]) -> PromptSource:
    """The questions of chat files (JSON lines), as often as they occur. Raises DatasetError."""
    prompts = [tokens for file in files for tokens in _read_prompts(tokenizer, file)]
    return lambda draw: draw.choice(prompts)


def _read_prompts(tokenizer: PreTrainedTokenizerBase, file: Path) -> list[list[int]]:
    prompts = []
    for record in read_records(file):
        asked = question_of(record)
        text = asked if isinstance(asked, str) else render_chat(tokenizer, asked)
        prompts.append(list(tokenizer(text, add_special_tokens=isinstance(asked, str))["input_ids"]))
    return prompts


def question_of(record: Record) -> str | list[dict[str, Any]]:
    """A record without its answer: a text, or the turns of a chat. Raises ConfigError if there is nothing to ask."""
    if record.messages is None:
        return record.prompt or record.text or ""
    turns = [dict(turn) for turn in record.messages]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ConfigError(f"{record.place} has no turn besides the assistant's, so nothing to ask.")
    return turns
