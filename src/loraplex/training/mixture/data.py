"""The examples of a mixture's training: sources mixed in their shares, and which of them a step takes."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from loraplex.models.text.end_tokens import TrainingEnds, training_ends
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.data.examples import Example, hold_out, load_examples, steps_per_epoch
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.sources import DataSource, add_source, read_source


class Sourced(NamedTuple):
    """An example and the number of its source."""

    source: int
    example: Example


@dataclass(frozen=True, kw_only=True)
class MixtureData:
    """What a mixture trains on and is evaluated on, in tokens."""

    names: Sequence[str]  # of the sources, those of eval_data included
    train: Sequence[Sequence[Example]]  # by source
    held_out: Sequence[Sourced]
    per_epoch: Sequence[int]  # records of each source in an epoch
    num_steps: int
    records_per_step: int
    seed: int
    digest: str  # of all records

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(sum(self.per_epoch), self.records_per_step)

    @property
    def num_truncated(self) -> int:
        """Training records that lost tokens on the left."""
        return sum(example.num_truncated > 0 for examples in self.train for example in examples)

    def examples_of_step(self, step: int) -> list[Sourced]:
        """The records that step `step` (from 0) takes; the last step of an epoch takes what is left."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.records_per_step
        return [
            Sourced(source, self.train[source][number])
            for source, number in _epoch(self.seed, epoch, tuple(map(len, self.train)), tuple(self.per_epoch))[
                first : first + self.records_per_step
            ]
        ]

    def needed(self) -> list[Example]:
        """All examples that the run's steps and evaluations take, in the order of the data."""
        if self.num_steps >= self.steps_per_epoch and all(
            count >= len(examples) for count, examples in zip(self.per_epoch, self.train, strict=True)
        ):
            trained = [example for examples in self.train for example in examples]
        else:
            used = {id(item.example) for step in range(self.num_steps) for item in self.examples_of_step(step)}
            trained = [example for examples in self.train for example in examples if id(example) in used]
        return trained + [item.example for item in self.held_out]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, sizes: tuple[int, ...], per_epoch: tuple[int, ...]) -> list[tuple[int, int]]:
    """(source, number of the record) in an epoch's order.

    Each source is gone through again and again, every time in an order of its own; an epoch takes its next records.
    """
    items = [
        (source, _stream(seed, source, position, size))
        for source, (size, count) in enumerate(zip(sizes, per_epoch, strict=True))
        for position in range(epoch * count, (epoch + 1) * count)
    ]
    order = torch.randperm(len(items), generator=generator(seed, Purpose.ORDER, epoch, 0)).tolist()
    return [items[index] for index in order]


def _stream(seed: int, source: int, position: int, size: int) -> int:
    through, index = divmod(position, size)
    return _permutation(seed, source, through, size)[index]


@lru_cache(maxsize=64)
def _permutation(seed: int, source: int, through: int, size: int) -> list[int]:
    draw = generator(seed, Purpose.ORDER, through, 1 + source)
    order: list[int] = torch.randperm(size, generator=draw).tolist()
    return order


def records_per_epoch(sizes: Sequence[int], shares: Sequence[float | None]) -> list[int]:
    """How many records each source gives to an epoch: all of them, or its share of as many as there are in all.

    Shares are met by the largest remainders; no source gives less than one record.
    """
    if any(share is None for share in shares):
        return list(sizes)
    weights = [float(share) for share in shares if share is not None]
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: sum(sizes) - sum(counts)]:
        counts[source] += 1
    return [max(1, count) for count in counts]


def load_mixture_data(
    label: str,
    sources: Sequence[DataSource],
    config: MixtureTrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    ends: TrainingEnds | None = None,
) -> MixtureData:
    """Read, check, tokenize and split all sources. Raises DatasetError or ConfigError."""
    known_ends = ends or training_ends(None, tokenizer)
    steps, evaluation = config.steps, config.evaluation

    def load(source: DataSource) -> list[Example]:
        place = f"data source {source.name!r}"
        records, longest = read_source(source), steps.max_length
        return load_examples(label, records, place, tokenizer, vocab_size, max_length=longest, ends=known_ends)

    names = [str(source.name) for source in sources]
    examples = [load(source) for source in sources]
    digest = hashlib.sha256()
    held_out: list[Sourced] = []
    eval_sources = config.eval_sources
    if eval_sources is None:
        for number, whole in enumerate(examples):
            draw = generator(config.seed, Purpose.SPLIT, number)
            examples[number], held = hold_out(label, whole, evaluation.eval_fraction, draw, names[number])
            held_out += [Sourced(number, example) for example in held[: evaluation.eval_records]]
    for source in eval_sources or []:
        if source.name not in names:
            names.append(str(source.name))
        number = names.index(str(source.name))
        held_out += [Sourced(number, example) for example in load(source)[: evaluation.eval_records]]
    for source in [*sources, *(eval_sources or [])]:
        add_source(digest, source)
    per_epoch = records_per_epoch([len(part) for part in examples], [source.share for source in sources])
    return MixtureData(
        names=names,
        train=examples,
        held_out=held_out,
        per_epoch=per_epoch,
        num_steps=steps.count(label, steps_per_epoch(sum(per_epoch), steps.records_per_step), config.optimizer),
        records_per_step=steps.records_per_step,
        seed=config.seed,
        digest=digest.hexdigest(),
    )
